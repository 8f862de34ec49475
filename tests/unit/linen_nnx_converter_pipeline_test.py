# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#    https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Pipelines: literal trees in and out, and MaxText's own trees."""

import itertools
import json
import zipfile

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_golden_trees as golden
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import pipelines
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

ASSETS = util.FIXTURES / "pipelines"
KERNEL, SCALE, COUNT = ("mlp", "wi", "kernel"), ("norm", "scale"), ("self_attention", "rngs", "params", "count")
# Stages, repeats, layers in a stage, whether these are scanned, layers outside; eight layers in all.
SHAPES = ((2, 4, 1, False, 0), (8, 1, 1, False, 0), (2, 2, 2, False, 0), (2, 1, 4, False, 0), (4, 1, 2, True, 0))
SHAPES += ((2, 2, 2, True, 0), (3, 2, 1, False, 2), (2, 1, 3, True, 2), (3, 1, 2, False, 2))


def layer(n):
  """What layer `n` has: leaf by leaf, no two elements of any layers alike."""
  return {KERNEL: util.array(3, 5, start=100 * n), SCALE: util.array(3, start=-10 * n), COUNT: np.uint32(n)}


def put(tree, path, leaf):
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = leaf


def stacked(layers, sizes, axis=1):
  """Layers stacked in C order along axes of these sizes: from the given axis of a Param on, from the first of others."""
  result = {}
  for path in layers[0] if layers else ():
    parts = np.stack([one[path] for one in layers]).reshape(*sizes, *np.shape(layers[0][path]))
    start = 0 if path == COUNT else min(axis, np.ndim(layers[0][path]))
    result[path] = np.moveaxis(parts, range(len(sizes)), range(start, start + len(sizes)))
  return result


def decoder(modules):
  """A decoder of modules, each with its leaves; as the Linen layout has them, RNG state beside the params."""
  tree = {}
  for module, leaves in modules.items():
    for path, leaf in leaves.items():
      top = ("nnx_aux", "model") if path == COUNT else ("params", "params")
      put(tree, (*top, "decoder", *module.split("/"), *path), leaf)
  return tree


def in_pipeline(layers, stages, repeats, count, is_scanned, axis=1):
  """The modules of a pipeline, its layers laid out by hand: those of a stage, then its stages, then its repeats."""
  grid = np.arange(len(layers)).reshape(repeats, stages, count)
  sizes = (repeats, stages) if repeats > 1 else (stages,)
  module = "pipeline_module/layers"
  if count == 1:
    return {module: stacked([layers[n] for n in grid.ravel()], sizes, 0)}
  if not is_scanned:
    return {f"{module}/layers_{j}": stacked([layers[n] for n in grid[:, :, j].ravel()], sizes, 0) for j in range(count)}
  inner = [stacked([layers[n] for n in row], (count,), axis) for row in grid.reshape(-1, count)]
  return {f"{module}/scanned_layers": stacked(inner, sizes, 0)}


def piped(shape, axis=1, is_unscanned=False):
  stages, repeats, count, is_scanned, outside = shape
  layers = [layer(n) for n in range(8)]
  modules = in_pipeline(layers[: 8 - outside], stages, repeats, count, is_scanned, axis)
  if is_unscanned:
    modules |= {f"layers_outside_pipeline_{n}": layers[8 - outside + n] for n in range(outside)}
  else:
    modules |= {"layers_outside_pipeline": stacked(layers[8 - outside :], (outside,), axis)}
  return decoder(modules)


def plain(axis=1):
  return decoder({"layers": stacked([layer(n) for n in range(8)], (8,), axis)})


def unscanned():
  return decoder({f"layers_{n}": layer(n) for n in range(8)})


def pipeline(shape):
  return pipelines.Pipeline(*shape[:4])


def planned(tree, block="llama2", num_layers=8, dense=0, *, pipeline_of=None, release=(0, 2, 5), **options):
  """The plan by a config."""
  of = decoder_families.Decoder(block, num_layers, dense, model_name="m", pipeline=pipeline_of)
  state = abstract_state.abstract(abstract_state.flatten(tree))
  return util.plan_conversion(state, release=release, decoder=of, **options)


def moved(plan, tree):
  leaves = in_memory.apply(plan, abstract_state.flatten(tree).leaves)
  return abstract_state.unflatten(abstract_state.AbstractState(leaves, plan.target.lists))


class PipelineTest(util.CheckpointTestCase):
  maxDiff = 1000

  def assert_tree(self, found, wanted):
    self.assertEqual(util.flat(found), util.flat(wanted))

  @parameterized.parameters(*itertools.product(SHAPES, (0, 1)))
  def test_the_tree_alone_takes_it_apart(self, shape, axis):
    tree = piped(shape, axis)
    for options, wanted in (({"scan_layers": False}, unscanned()), ({"scan_layers": True}, plain(axis))):
      state = abstract_state.abstract(abstract_state.flatten(tree))
      plan = util.plan_conversion(state, direction="linen_to_linen", param_scan_axis=axis, **options)
      self.assert_tree(moved(plan, tree), wanted)
      self.assertEqual(plan.scan_layers, options["scan_layers"])

  @parameterized.parameters(*itertools.product(SHAPES, (0, 1)))
  def test_a_config_puts_layers_into_a_pipeline(self, shape, axis):
    """From layers scanned and not, and from another pipeline; and the plan's inverse leads back."""
    sources = [plain(axis), unscanned(), piped(SHAPES[SHAPES.index(shape) - 1], axis)]
    for tree, scan_layers in itertools.product(sources, (True, False)):
      plan = planned(tree, pipeline_of=pipeline(shape), scan_layers=scan_layers, param_scan_axis=axis)
      self.assert_tree(moved(plan, tree), piped(shape, axis, not scan_layers))
      self.assertEqual(plan.scan_layers, scan_layers)
      back = plan.inverse()
      back.validate()
      self.assert_tree(moved(back, moved(plan, tree)), tree)

  @parameterized.parameters(*itertools.product(SHAPES, (False, True)))
  def test_without_a_config_and_a_flag_it_stays(self, shape, is_unscanned):
    tree = piped(shape, 1, is_unscanned)
    nnx = converter.convert_linen_to_nnx(tree)
    self.assert_tree(converter.convert_nnx_to_linen(nnx), tree)
    plan = util.plan_conversion(abstract_state.abstract(abstract_state.flatten(tree)))
    self.assertEqual(plan.counts()["copy"], len(plan.moves))
    self.assertIsNone(plan.scan_layers)  # The source's own is kept: the tree does not tell.

  @parameterized.parameters("linen", "nnx")
  def test_deepseek_has_its_dense_layers_and_those_outside_before_the_pipeline(self, trainer):
    layers = [layer(n) for n in range(9)]
    name = "moe_layers" if trainer == "linen" else "moe_layers_outside_pipeline"
    modules = {"dense_layers": stacked(layers[:2], (2,)), name: stacked(layers[2:5], (3,))}
    tree = decoder(modules | in_pipeline(layers[5:], 2, 2, 1, False))
    apart = decoder(
        {f"dense_layers_{n}": layers[n] for n in range(2)} | {f"moe_layers_{n}": layers[2 + n] for n in range(7)}
    )
    options = {"direction": "linen_to_linen", "release": (0, 2, 4), "trainer": trainer}
    state = abstract_state.abstract(abstract_state.flatten(tree))
    plan = util.plan_conversion(state, direction="linen_to_linen", scan_layers=False)
    self.assert_tree(moved(plan, tree), apart)
    back = planned(apart, "deepseek", 9, 2, pipeline_of=pipelines.Pipeline(2, 2), scan_layers=True, **options)
    self.assert_tree(moved(back, apart), tree)

  def test_on_disk_to_the_bit(self):
    """Layers of a pipeline and outside it become one leaf: every element is decoded on both sides and compared."""
    source = self.save("source", util.linen(piped((3, 2, 1, False, 2))["params"]["params"]))
    for scan_layers, wanted in ((True, plain()), (False, unscanned())):
      target = self.tmp / f"target_{scan_layers}"
      options = {"direction": "linen_to_linen", "scan_layers": scan_layers, "verify": "full"}
      converter.convert_checkpoint(source, target, **options)
      self.assert_tree(converter.load_checkpoint(target), util.linen(wanted["params"]["params"]))
      self.assertTrue(comparator.compare_checkpoints(source, target).is_accepted)

  @parameterized.parameters(("circ_s", (2, 2, 1)), ("lps2_s", (2, 1, 2)), ("lps2_u", (2, 1, 2)))
  def test_what_a_trainer_saved(self, name, shape):
    """Out of a pipeline and into it again gives the tree that MaxText 0.2.5's trainer wrote."""
    of = decoder_families.Decoder("llama2", 4, model_name="m", pipeline=pipelines.Pipeline(*shape))
    self.assert_back(golden.read(ASSETS / f"{name}.txt"), of, (0, 2, 5), "nnx", name.endswith("_s"), 1)

  def assert_back(self, state, of, release, trainer, is_scanned, axis):
    """Taken out of the pipeline by the tree alone, and put into it by the config, it is what it was."""
    options = {"param_scan_axis": axis, "direction": "linen_to_linen", "scan_layers": is_scanned}
    # The layers of a stage, and those that are not scanned, share their RNG state, which NNX keeps once.
    wanted = golden.without(state, "rngs")
    apart = util.plan_conversion(wanted, layer_naming="flat", **options).target
    self.assertFalse(any("pipeline" in key for path in apart.leaves for key in path))
    back = util.plan_conversion(apart, release=release, trainer=trainer, decoder=of, **options)
    self.assertEqual(*({"/".join(p): str(leaf) for p, leaf in s.leaves.items()} for s in (back.target, wanted)))
    self.assertEqual((back.target.lists, back.scan_layers), (wanted.lists, is_scanned))

  @parameterized.parameters("0.2.4", "0.2.5")
  def test_maxtexts_own_trees(self, release):
    folder = zipfile.Path(ASSETS / "golden.zip", f"{release}/")
    count = 0
    for path in sorted(folder.glob("*scanned.txt"), key=str):
      case, form, arrangement, _ = path.name.rsplit(".", 3)
      settings = json.loads((folder / f"{case}.config.json").read_text())
      of = golden.decoder_of(settings, pipeline=pipeline_of(settings))
      trainer = "linen" if form == "linen" else "nnx"
      with self.subTest(path.name):
        version, axis = golden.version_of(release), settings["param_scan_axis"]
        if case == "pipeline-gpt-oss":
          self.assert_blocks_stay(golden.read(path), of, version, trainer)
        else:
          self.assert_back(golden.read(path), of, version, trainer, arrangement == "scanned", axis)
        count += 1
    self.assertGreater(count, 5)

  def test_a_param_that_0_2_5_made_another_variable(self):
    """DeepSeek-V3's routing bias has its layer axes first, in a pipeline as outside it."""
    trees = [
        zipfile.Path(ASSETS / "golden.zip", f"{name}.txt")
        for name in ("0.2.4/pipeline-deepseek3.ondisk.scanned", "0.2.5/pipeline-deepseek3.ondisk.unscanned")
    ]
    source, wanted = (golden.without(golden.read(tree), "rngs", "dropout") for tree in trees)
    settings = json.loads((trees[1].parent / "pipeline-deepseek3.config.json").read_text())
    of = golden.decoder_of(settings, pipeline=pipeline_of(settings))
    plan = util.plan_conversion(source, release=(0, 2, 5), decoder=of, scan_layers=False)
    self.assertEqual(*({"/".join(p): str(leaf) for p, leaf in s.leaves.items()} for s in (plan.target, wanted)))
    with self.assertRaisesRegex(errors.ConfigError, "gate/bias: expected the model's name"):
      util.plan_conversion(source, release=(0, 2, 5))

  def assert_blocks_stay(self, state, of, release, trainer):
    """Of GPT-OSS, MaxText pipelines as many blocks of two layers as the model has layers."""
    by_config = {"release": release, "trainer": trainer, "decoder": of}
    plan = util.plan_conversion(state, direction="linen_to_linen", scan_layers=True, **by_config)
    self.assertEqual(plan.counts()["copy"], len(plan.moves))
    for scan_layers in (True, False):
      with self.assertRaisesRegex(errors.LayerStackError, "expected layers whose order is known, .* or of blocks"):
        util.plan_conversion(state, direction="linen_to_linen", scan_layers=scan_layers)

  @parameterized.parameters(
      (
          piped((2, 2, 2, False, 0)),
          {"num_layers": 10},
          "expected 10 layers, as the config says, found 8 in the checkpoint",
      ),
      (
          unscanned(),
          {"block": "gpt_oss"},
          "arrangement kept, .* found layers outside a pipeline, .*=gpt_oss in a pipeline",
      ),
      (unscanned(), {"release": (0, 2, 3)}, "expected the arrangement kept"),
  )
  def test_what_a_config_cannot_put_into_a_pipeline(self, tree, options, message):
    with self.assertRaisesRegex(errors.ConversionError, message):
      planned(tree, pipeline_of=pipelines.Pipeline(2, 2, 2), scan_layers=True, **options)

  @parameterized.parameters(
      (lambda module: module.pop("norm"), "mlp/wi/kernel: expected layers whose order is known, found .* norm's scale"),
      (
          lambda module: put(module, ("mlp", "wo"), util.array(3, 4, 5)),
          "mlp/wo: expected 2 x 4 layers, as .* found 3 x 4",
      ),
      (
          lambda module: put(module, ("post_ffw_norm", "scale"), util.array(2, 4, 3)),
          "expected layers whose order is known",
      ),
      (lambda module: put(module, ("mlp", "wo"), util.array(2)), "mlp/wo: expected 2 layer axes, found shape .2,."),
      (lambda module: put(module, ("layers_0", "mlp", "wo"), util.array(2, 4)), "written in one way"),
  )
  def test_a_tree_that_does_not_tell(self, damage, message):
    tree = {"params": piped((4, 2, 1, False, 0))["params"]}
    damage(tree["params"]["params"]["decoder"]["pipeline_module"]["layers"])
    with self.assertRaisesRegex(errors.ConversionError, message) as caught:
      converter.convert_linen_to_nnx(tree, scan_layers=False)
    self.assertLen(str(caught.exception).splitlines(), 1)

  def test_stages_of_other_sizes_are_refused(self):
    layers = [layer(n) for n in range(7)]
    modules = {"layers_0": stacked(layers[:4], (4,), 0), "layers_1": stacked(layers[4:], (3,), 0)}
    tree = decoder({f"pipeline_module/layers/{name}": leaves for name, leaves in modules.items()})
    with self.assertRaisesRegex(errors.LayerStackError, "expected 4 stages, as .*/layers_0 has, found 3 stages"):
      converter.convert_linen_to_nnx(tree)

  def test_rng_state_that_layers_share_is_named(self):
    """Only the first layer of a stage has it in MaxText's NNX."""
    tree = piped((2, 2, 2, False, 0))
    del tree["nnx_aux"]["model"]["decoder"]["pipeline_module"]["layers"]["layers_1"]
    with self.assertRaisesRegex(errors.LayerStackError, "layers_1/.*leave it out with --nnx_aux=drop"):
      converter.convert_linen_to_nnx(tree, scan_layers=True)
    converter.convert_linen_to_nnx(tree, scan_layers=True, nnx_aux="drop")


def pipeline_of(settings):
  numbers = ("ici_pipeline_parallelism", "num_pipeline_repeats", "num_layers_per_pipeline_stage", "scan_layers_per_stage")
  return pipelines.Pipeline(*(settings[name] for name in numbers))


if __name__ == "__main__":
  absltest.main()
