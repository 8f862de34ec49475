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

"""LoRA adapters merged into the weights that they were trained on: values, what is refused, and that faults are found."""

import shutil
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import lora
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import merged

# inputs, outputs: as `DenseGeneral` has them in an MLP, a query, and the projection out of attention.
KERNELS = {"wi": ((6,), (10,)), "query": ((6,), (2, 5)), "out": ((2, 5), (6,))}
LAYERS, RANK, ALPHA = 3, 2, 8.0


def draw(seed, *shape):
  """Small integers, of which all sums are exact in float32, and in bfloat16 too."""
  return np.random.default_rng(seed).integers(-3, 4, shape).astype(np.float32)


def stacked(layers, axis):
  return np.stack(layers, axis) if axis is not None else layers[0]


def trees(axis):
  """A base, its adapters, and the weights of each layer with these added, as a literal sum over the indices."""
  base, adapters, expected = {}, {}, {}
  for number, (name, (ins, outs)) in enumerate(KERNELS.items()):
    size = lambda sizes: int(np.prod(sizes))
    weights = [draw((number, i, 0), *ins, *outs) for i in range(LAYERS)]
    a = [draw((number, i, 1), size(ins), RANK) for i in range(LAYERS)]
    b = [draw((number, i, 2), RANK, size(outs)) for i in range(LAYERS)]
    base[name] = {"kernel": stacked(weights, axis)}
    adapters[name] = {"kernel_lora_a": stacked(a, axis), "kernel_lora_b": stacked(b, axis)}
    expected[name] = [np.zeros((*ins, *outs), np.float32) for _ in range(LAYERS)]
    for i, into in enumerate(expected[name]):
      for at in np.ndindex(*ins, *outs):
        row = int(np.ravel_multi_index(at[: len(ins)], ins))
        column = int(np.ravel_multi_index(at[len(ins) :], outs))
        into[at] = weights[i][at] + sum(a[i][row, k] * b[i][k, column] for k in range(RANK)) * ALPHA / RANK
  return base, adapters, expected


def model(layers):
  return {"decoder": {"layers": layers, "norm": {"scale": draw(9, 6, LAYERS)}}}


def boxed(tree):
  return {name: boxed(node) if isinstance(node, dict) else {"value": node} for name, node in tree.items()}


class LoraTest(util.CheckpointTestCase):
  product = staticmethod(lora.Adapter._product)

  def setUp(self):
    super().setUp()
    self.base, self.adapters, self.expected = trees(1)
    self.source = self.save("base", {"params": {"params": model(self.base)}})
    self.save_adapters(self.adapters)

  def save_adapters(self, adapters, name="adapters", **metadata):
    """As Tunix's trainer does: boxed, as the item `model_params` of a step."""
    with ocp.CheckpointManager(self.tmp / name, item_names=("model_params",)) as manager:
      tree = boxed({"decoder": {"layers": adapters}})
      manager.save(2, args=ocp.args.Composite(model_params=ocp.args.PyTreeSave(tree)), custom_metadata=metadata)

  def convert(self, target="out", adapters="adapters", **options):
    options = {"direction": "linen_to_linen", "lora_alpha": ALPHA} | options
    return converter.convert_checkpoint(
        self.source, self.tmp / target, lora_restore_path=str(self.tmp / adapters), **options
    )

  def layers(self, target="out"):
    return converter.load_checkpoint(self.tmp / target)["params"]["params"]["decoder"]

  def assert_merged(self, axis=1, dtype=np.float32, target="out"):
    found = self.layers(target)["layers"]
    for name, layers in self.expected.items():
      np.testing.assert_array_equal(found[name]["kernel"], stacked(layers, axis).astype(dtype), name)
      self.assertEqual(found[name]["kernel"].dtype, dtype)

  @parameterized.parameters(True, "full", False)
  def test_values(self, verify):
    before = util.snapshot(self.source), util.snapshot(self.tmp / "adapters")
    done = self.convert(verify=verify)
    self.assert_merged()
    self.assertEqual((util.snapshot(self.source), util.snapshot(self.tmp / "adapters")), before)
    what = f"merged LoRA adapters (rank 2, alpha 8) of {self.tmp}/adapters/2 into 3 weights"
    note = f"{what}, which are no longer the source's"
    self.assertIn(note, done.summary())
    self.assertIn(note, done.record()["notes"])
    np.testing.assert_array_equal(self.layers()["norm"]["scale"], draw(9, 6, LAYERS))

  @parameterized.parameters({"chunk_byte_size": 1024}, {"use_ocdbt": False}, {"use_zarr3": True}, {"copy_mode": "link"})
  def test_however_it_is_stored(self, **options):
    self.convert(**options)
    self.assert_merged()

  def test_in_strips(self):
    with mock.patch.object(lora, "_STRIP", 7), mock.patch.object(merged, "_ELEMENTS", 11):
      self.convert(verify="full")
    self.assert_merged()

  def test_unscanned_at_once(self):
    self.convert(scan_layers=False)
    for name, layers in self.expected.items():
      for i, weight in enumerate(layers):
        np.testing.assert_array_equal(self.layers()[f"layers_{i}"][name]["kernel"], weight)

  def test_some_layers_of_a_stack(self):
    """Layers of which one alone has adapters, stacked at once."""
    layers = {f"layers_{i}": {name: {"kernel": of["kernel"][:, i]} for name, of in self.base.items()} for i in range(3)}
    scales = {f"layers_{i}": {"norm": {"scale": draw(i, 6)}} for i in range(3)}
    tree = {"decoder": {name: layers[name] | scales[name] for name in layers}}
    self.source = self.save("unscanned", {"params": {"params": tree}})
    with ocp.CheckpointManager(self.tmp / "one", item_names=("items",)) as manager:
      adapters = {name: {leaf: of[:, 2] for leaf, of in self.adapters[name].items()} for name in self.adapters}
      manager.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(boxed({"decoder": {"layers_2": adapters}}))))
    self.convert(adapters="one", scan_layers=True)
    for name, of in self.base.items():
      wanted = np.stack([of["kernel"][:, 0], of["kernel"][:, 1], self.expected[name][2]], 1)
      np.testing.assert_array_equal(self.layers()["layers"][name]["kernel"], wanted)

  def test_to_nnx(self):
    converter.convert_checkpoint(
        self.source, self.tmp / "out", lora_restore_path=str(self.tmp / "adapters"), lora_alpha=ALPHA
    )
    found = converter.load_checkpoint(self.tmp / "out")["model"]["decoder"]["layers"]["out"]["kernel"]["value"]
    np.testing.assert_array_equal(found, stacked(self.expected["out"], 1))

  @parameterized.parameters(0, None)
  def test_other_layer_axes(self, axis):
    base, adapters, self.expected = trees(axis)
    if axis is None:
      tree = {"decoder": {"layers_0": base, "norm": {"scale": draw(9, 6)}}}
    else:
      tree = {"decoder": {"layers": base, "norm": {"scale": draw(9, LAYERS, 6)}}}
    self.source = self.save("other", {"params": {"params": tree}})
    with ocp.CheckpointManager(self.tmp / "theirs", item_names=("items",)) as manager:  # As MaxText's trainer saves.
      inside = {"decoder": {"layers" if axis is not None else "layers_0": adapters}}
      items = {"params": {"params": inside}, "step": np.array(3), "opt_state": [{"mu": {"params": inside}}]}
      saved = {"lora": {"lora_rank": RANK, "lora_alpha": ALPHA}}
      manager.save(3, args=ocp.args.Composite(items=ocp.args.PyTreeSave(items)), custom_metadata=saved)
    self.convert(adapters="theirs", param_scan_axis=axis, lora_alpha=None)
    if axis is None:
      found = self.layers()["layers_0"]
      for name, layers in self.expected.items():
        np.testing.assert_array_equal(found[name]["kernel"], layers[0])
    else:
      self.assert_merged(axis)

  @parameterized.parameters((np.float32, "bfloat16"), (ml_dtypes.bfloat16, None), (ml_dtypes.bfloat16, "float32"))
  def test_is_rounded_once(self, stored, weight_dtype):
    """Halfway from 1 to the next bfloat16, and a little more: were the product rounded too, the sum would become 1."""
    base = {name: {"kernel": of["kernel"].astype(stored)} for name, of in self.base.items()}
    base["wi"]["kernel"][:] = stored(1)
    adapters = {name: {leaf: of.copy() for leaf, of in self.adapters[name].items()} for name in self.adapters}
    adapters["wi"] = {leaf: np.zeros_like(of) for leaf, of in adapters["wi"].items()}
    adapters["wi"]["kernel_lora_a"][..., 0] = 2**-8 + 2**-20
    adapters["wi"]["kernel_lora_b"][0] = 1 / 4
    self.source = self.save("of_dtype", {"params": {"params": model(base)}})
    self.save_adapters(adapters, "small")
    self.convert(adapters="small", weight_dtype=weight_dtype, verify="full")
    found = self.layers()["layers"]["wi"]["kernel"]
    rounded = np.float32(1 + 2**-8 + 2**-20).astype(weight_dtype or stored)
    self.assertEqual(found.dtype, rounded.dtype)
    np.testing.assert_array_equal(found, np.full_like(found, rounded))

  @parameterized.product(verify=(True, "full"), factor=(0.0, 1 + 1e-4))
  def test_a_fault_of_the_writer_is_found(self, verify, factor):
    """Were nothing added, the target would be the source's own chunks: that is no proof here."""
    right = lora.Adapter._product
    wrong = lambda adapter, region: right(adapter, region) * np.float32(factor)
    message = "kernel: expected .* at index"
    with mock.patch.object(lora.Adapter, "_product", wrong), self.assertRaisesRegex(errors.VerificationError, message):
      self.convert(verify=verify)
    self.assert_nothing_left("base", "adapters")

  def test_one_element_that_is_off_is_found(self):
    right = lora.Adapter.merged

    def wrong(adapter, *args, **keywords):
      result = right(adapter, *args, **keywords)
      result.flat[-1] = np.nextafter(result.flat[-1], np.float32(np.inf)) + np.float32(1e-3)
      return result

    with mock.patch.object(lora.Adapter, "merged", wrong), self.assertRaises(errors.VerificationError):
      self.convert()

  def test_numbers_that_are_none_stay(self):
    self.base["wi"]["kernel"][0, 0, :3] = np.nan, np.inf, -np.inf
    self.source = self.save("nan", {"params": {"params": model(self.base)}})
    self.convert(verify="full")
    np.testing.assert_array_equal(self.layers()["layers"]["wi"]["kernel"][0, 0, :3], [np.nan, np.inf, -np.inf])

  def test_random_numbers_are_within_the_leeway(self):
    draw_normal = np.random.default_rng(0).standard_normal
    for name in self.base:
      self.base[name]["kernel"] = draw_normal(self.base[name]["kernel"].shape).astype(ml_dtypes.bfloat16)
      for leaf, of in self.adapters[name].items():
        self.adapters[name][leaf] = draw_normal(of.shape).astype(np.float32)
    self.source = self.save("random", {"params": {"params": model(self.base)}})
    self.save_adapters(self.adapters, "normal")
    self.assertTrue(self.convert(adapters="normal").verified)

  def test_what_an_interrupted_run_left_is_taken_where_it_is_right(self):
    staging, real = self.tmp / f"out{atomic_target.SUFFIX}", orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_keep(folder):
        shutil.copytree(staging, self.tmp / "killed")
        return before_commit(folder)

      return real(*args, before_commit=and_keep, **kwargs)

    for factor, taken in ((1, 4), (0, 1)):
      wrong = lambda adapter, region, factor=factor: self.product(adapter, region) * np.float32(factor)
      with mock.patch.object(orbax_writer, "save", save), mock.patch.object(lora.Adapter, "_product", wrong):
        self.convert(use_zarr3=True, verify=False)
      shutil.rmtree(self.tmp / "out")
      (self.tmp / "killed").rename(staging)
      done = self.convert(use_zarr3=True, resume=True)
      self.assertRegex(done.resumed, f"^{taken} lea")
      self.assert_merged()
      shutil.rmtree(self.tmp / "out")

  def test_with_moments_it_is_refused_but_for_the_weights_alone(self):
    self.source = self.save("trained", util.linen(model(self.base)))
    with self.assertRaisesRegex(errors.OptionError, "^opt_state/.*: expected weights alone, .* Pass --params_only"):
      self.convert()
    self.convert(params_only=True)
    self.assert_merged()

  @parameterized.named_parameters(
      (
          "no_weight",
          lambda t: {"gate": t["wi"]},
          "layers/gate/kernel_lora_a: expected its kernel .* found none",
      ),
      ("one_alone", lambda t: {"wi": {"kernel_lora_a": t["wi"]["kernel_lora_a"]}}, "kernel_lora_a: .* found one alone"),
      (
          "a_weight",
          lambda t: t | {"wo": {"kernel": t["wi"]["kernel_lora_a"]}},
          "wo/kernel: expected .* found another leaf",
      ),
      ("of_another_leaf", lambda t: {"wi": {"scale_lora_a": t["wi"]["kernel_lora_a"]}}, "scale_lora_a: .*another leaf"),
      ("of_others", lambda t: {"query": t["out"], "out": t["query"]}, "expected adapters that fit .* found"),
      ("of_fewer_layers", lambda t: {"wi": {k: v[:, :2] for k, v in t["wi"].items()}}, "expected adapters that fit"),
      ("of_one_layer", lambda t: {"wi": {k: v[:, 0] for k, v in t["wi"].items()}}, "expected adapters that fit"),
      ("of_two_ranks", lambda t: t | {"wi": {k: v[..., :1] for k, v in t["wi"].items()}}, "adapters of one rank"),
      ("of_integers", lambda t: {"wi": {k: v.astype(int) for k, v in t["wi"].items()}}, "expected adapters that fit"),
  )
  def test_refused(self, change, message):
    self.save_adapters(change(self.adapters), "changed")
    with self.assertRaisesRegex(errors.LayoutError, message):
      self.convert(adapters="changed")
    self.assert_nothing_left("base", "adapters", "changed")

  @parameterized.parameters(
      ({}, None, "none, here or in their metadata"),
      ({"lora_alpha": 4.0}, 8.0, "4 and 8"),
      ({"lora_alpha": 0.0}, None, "none"),
  )
  def test_an_alpha_that_is_not_known(self, metadata, given, found):
    self.save_adapters(self.adapters, "of_metadata", lora=metadata)
    with self.assertRaisesRegex(errors.OptionError, f"^--lora_alpha: expected the alpha .* found {found}"):
      self.convert(adapters="of_metadata", lora_alpha=given)

  def test_a_rank_that_is_not_that_of_the_metadata(self):
    self.save_adapters(self.adapters, "of_metadata", lora={"lora_rank": 16, "lora_alpha": ALPHA})
    with self.assertRaisesRegex(errors.LayoutError, "of_metadata/2: expected adapters of one rank, .* found 16, 2"):
      self.convert(adapters="of_metadata")

  def test_a_base_with_adapters_of_its_own(self):
    self.base["wi"] |= self.adapters["wi"]
    self.source = self.save("both", {"params": {"params": model(self.base)}})
    with self.assertRaisesRegex(errors.LayoutError, "wi/kernel_lora_a: expected its kernel .* found one with them"):
      self.convert()

  def test_no_such_checkpoint(self):
    with self.assertRaisesRegex(errors.SourceNotFoundError, "nowhere: .* Check --lora_restore_path"):
      self.convert(adapters="nowhere")

  def test_a_config(self):
    """Its `lora_restore_path` is what a run goes on to train, beside the base: it does not ask for a merge."""
    of_lora = types.SimpleNamespace(lora_restore_path="/adapters", lora_alpha=16.0)
    config = types.SimpleNamespace(scan_layers=True, param_scan_axis=1, lora=of_lora)
    found = run_config.with_config(options_lib.Options(), config)
    self.assertEqual((found.lora_restore_path, found.lora_alpha), (None, 16.0))
    with self.assertRaisesRegex(errors.ConfigError, "^--lora_alpha=4.0: expected lora_alpha=16.0, as the config says"):
      run_config.with_config(options_lib.Options(lora_alpha=4.0), config)

  def test_a_dry_run(self):
    lines = list(self.convert(dry_run=True).lines())
    self.assertLen([line for line in lines if "LoRA adapter merged, streamed" in line], 3)
    self.assert_nothing_left("base", "adapters")


if __name__ == "__main__":
  absltest.main()
