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

"""What the inspector says of checkpoints: of each layout, of damaged ones, and of what is none."""

import json
import shutil
import subprocess
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
from linen_nnx_inspector_runs import call
from linen_nnx_inspector_runs import LINEN_SCAN
import numpy as np
import optax

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner

LINEN = """\
…/maxtext-0.2.4/linen_scan/2/items
  layout      Linen TrainState
  step        3
  params      12 leaves: 57,632 float32; 225.1 KiB
  opt_state   26 leaves: 2 int32, 115,264 float32; 450.3 KiB
  optimizer   adam: 0/{count, mu, nu}, 2/{count}
  layers      decoder/layers: 4 scanned along axis 1
  storage     OCDBT, zarr 3: 39 chunks in 5 files; 572.8 KiB
  read by     0.2.3 (linen), 0.2.3 (nnx), 0.2.4 (linen), 0.2.4 (nnx), 0.2.5 (nnx), as far as the tree tells
"""
NNX = """\
…/maxtext-main-2026-05-14/nnx_unscan/2/items
  layout      NNX TrainStateNNX, plain
  step        3
  params      39 leaves: 57,632 float32; 225.1 KiB
  nnx_aux     60 leaves: 150 uint32; 600 bytes
  opt_state   80 leaves: 2 int32, 115,264 float32; 450.3 KiB
  optimizer   adam: 0/{count, mu, nu}, 2/{count}
  rngs        60 leaves: aqt, dropout, params
  layers      decoder/layers: 4 unscanned
  storage     OCDBT, zarr 3: 180 chunks in 4 files; 578.9 KiB
  0.2.3 linen CONVERT --maxtext_release=0.2.3
  0.2.3 nnx   CONVERT --maxtext_release=0.2.3 CONFIG
  0.2.4 linen CONVERT --maxtext_release=0.2.4
  0.2.4 nnx   CONVERT --maxtext_release=0.2.4 CONFIG
  0.2.5 nnx   CONVERT --maxtext_release=0.2.5
"""
TUNIX = """\
…/tunix/rl/4
  layout      Tunix, boxed everywhere
  step        4
  params      12 leaves: 47,328 bfloat16; 92.4 KiB
  nnx_aux     12 leaves: 36 uint32; 144 bytes
  opt_state   29 leaves: 3 int32, 94,657 bfloat16, 1 uint32; 184.9 KiB
  optimizer   adam: opt_state/{count}, opt_state/hyperparams/{learning_rate}, \
opt_state/hyperparams_states/learning_rate/{count}, opt_state/inner_state/1/0/{count, mu, nu}, {step}
  rngs        12 leaves: aqt, dropout, params
  layers      decoder/layers: 3 scanned along axis 1
  storage     OCDBT, zarr 2: 53 chunks in 6 files; 191.3 KiB
  0.2.3 linen CONVERT --maxtext_release=0.2.3
  0.2.3 nnx   CONVERT --maxtext_release=0.2.3 CONFIG
  0.2.4 linen CONVERT --maxtext_release=0.2.4
  0.2.4 nnx   CONVERT --maxtext_release=0.2.4 CONFIG
  0.2.5 nnx   CONVERT --maxtext_release=0.2.5
"""
CONFIG = "base.yml model_name=… enable_nnx=True pure_nnx=True pure_nnx_decoder=True"


class InspectorTest(util.CheckpointTestCase):

  @parameterized.parameters(
      ("maxtext-0.2.4/linen_scan", LINEN), ("maxtext-main-2026-05-14/nnx_unscan", NNX), ("tunix/rl", TUNIX)
  )
  def test_literally(self, name, expected):
    code, out, err = call(util.FIXTURES / name)
    self.assertEqual((code, err), (0, ""))
    convert = f"linen-nnx-converter --source_path={out.splitlines()[0].replace('…', str(util.FIXTURES))} --target_path=…"
    expected = expected.replace("CONVERT", convert).replace("CONFIG", CONFIG)
    self.assertMultiLineEqual(out, expected.replace(str(util.FIXTURES), "…"))

  @parameterized.parameters(*util.ALL)
  def test_it_says_of_each_release_what_the_converter_does(self, name):
    """As it is, or by a command; and what a command makes is read as it is."""
    for reader in inspector.inspect_checkpoint(util.FIXTURES / name).readers:
      self.assertEqual(reader.as_it_is, reader.command is None)
      self.assertIsNone(reader.refusal)
    converter.convert_checkpoint(util.FIXTURES / name, self.tmp / "out", maxtext_release="0.2.5")
    found = inspector.inspect_checkpoint(self.tmp / "out")
    self.assertTrue(next(reader for reader in found.readers if reader.release == "0.2.5").as_it_is)
    self.assertEqual(found.record["source"], str(util.FIXTURES / name / "2" / "items"))

  def test_what_is_the_same_for_some_releases_is_planned_once(self):
    with mock.patch.object(planner, "plan", wraps=planner.plan) as plan:
      readers = inspector.inspect_checkpoint(LINEN_SCAN).readers
    layouts = [call.args[1].layout.name for call in plan.call_args_list]
    self.assertLen(readers, 5)
    self.assertLen(set(layouts), 3)
    self.assertLen(layouts, 3)

  def test_another_item_is_not_what_maxtext_looks_for(self):
    found = inspector.inspect_checkpoint(util.FIXTURES / "emergency" / "maxtext-0.2.4")
    self.assertEqual((found.item, [reader for reader in found.readers if reader.as_it_is]), ("state", []))

  def test_the_training_engine(self):
    found = inspector.inspect_checkpoint(util.FIXTURES / "training_engine" / "complete")
    self.assertEqual(found.layout, "Tunix, boxed everywhere, of MaxText's training engine")
    self.assertEqual((found.step, found.items, found.storage.chunks), (2, ("accumulated_metrics",), 51))

  def test_layers_along_another_axis(self):
    """The tree tells of it, and the converter has to be told."""
    weights = {"mlp": {"wi": {"kernel": (3, 5)}, "wo": {"kernel": (5, 3)}}, "norm": {"scale": (3,)}}
    params = jax.tree.map(lambda shape: util.array(4, *shape), weights, is_leaf=lambda it: isinstance(it, tuple))
    path = self.save("axis_0", util.linen({"decoder": {"layers": params}}))
    found = inspector.inspect_checkpoint(path)
    self.assertEqual((found.layers, found.scan_axis), (("decoder/layers: 4 scanned along axis 0",), 0))
    self.assertTrue(all(reader.as_it_is for reader in found.readers))
    found = inspector.inspect_checkpoint(self.save("nnx", {"model": {"decoder": {"layers": params}}}))
    self.assertEndsWith(found.readers[-1].command, "--maxtext_release=0.2.5 --param_scan_axis=0")

  def test_families_that_have_such_layers(self):
    layer = {"mlp": {"wi": {"kernel": util.array(3, 5)}}, "post_ffw_norm": {"scale": util.array(3)}}
    found = inspector.inspect_checkpoint(self.save("gemma", util.linen({"decoder": {"layers_0": layer}})))
    self.assertEqual(found.families, ("envy", "gemma3", "gemma4"))

  def test_a_pipeline_is_not_for_the_nnx_trainer_that_had_none(self):
    stages = {"mlp": {"wi": {"kernel": util.array(2, 2, 3, 5)}}, "norm": {"scale": util.array(2, 2, 3)}}
    path = self.save("piped", util.linen({"decoder": {"pipeline_module": {"layers": stages}}}))
    found = inspector.inspect_checkpoint(path)
    self.assertEqual((found.layers, found.scan_axis), (("decoder/layers: 4 in a pipeline, 2 x 2",), None))
    others = [reader for reader in found.readers if not reader.as_it_is]
    self.assertEqual([(reader.release, reader.trainer) for reader in others], [("0.2.3", "nnx")])
    self.assertIn(" --scan_layers=True base.yml ", others[0].command)

  @parameterized.named_parameters(
      ("sgd", lambda: optax.sgd(1e-3, momentum=0.9), ("sgd with momentum",), {"0": ("trace",)}),
      (
          "accumulated",
          lambda: optax.MultiSteps(optax.adamw(1e-3), 2).gradient_transformation(),
          ("adam",),
          {"": ("acc_grads", "gradient_step", "mini_step"), "inner_opt_state/0": ("count", "mu", "nu")},
      ),
      (
          "adafactor",
          lambda: optax.adafactor(1e-3, min_dim_size_to_factor=2),
          ("adafactor",),
          {"0": ("count", "v", "v_col", "v_row")},
      ),
      ("novograd", lambda: optax.novograd(1e-3), ("novograd",), {"0": ("count", "mu", "nu")}),
  )
  def test_optimizers(self, make, names, states):
    params = {"params": {"decoder": {"w": {"kernel": np.ones((3, 5), np.float32)}}}}
    state = {"params": params, "opt_state": make().init(params), "step": np.int32(1)}
    found = inspector.inspect_checkpoint(self.save("state", state))
    self.assertEqual(found.optimizer, names)
    self.assertEqual({path: found.optimizer_states[path] for path in states}, states)

  def test_a_flag_that_is_not_true_of_the_layers(self):
    """MaxText would not load it; the converter writes the flag anew."""
    source = shutil.copytree(LINEN_SCAN, self.tmp / "run")
    metadata = source / "2" / "_CHECKPOINT_METADATA"
    document = json.loads(metadata.read_text())
    metadata.write_text(json.dumps(document | {"custom_metadata": {"scan_layers": False}}))
    self.assertTrue(all(reader.command for reader in inspector.inspect_checkpoint(source).readers))

  def test_the_command_of_an_odd_name_is_one_line_that_a_shell_reads(self):
    source = shutil.copytree(util.FIXTURES / "maxtext-main-2026-05-14" / "nnx_scan", self.tmp / "a 'b'\n%20#ü")
    _, out, _ = call(source)
    command = next(line for line in out.splitlines() if line.startswith("  0.2.5 nnx   "))[14:]
    shell = f"printf '%s' {command.split(' ', 1)[1].split(' --target_path')[0]}"
    said = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, check=True).stdout
    self.assertEqual(said, f"--source_path={source}/2/items")

  def test_a_step_inside_a_step(self):
    code, out, _ = call(util.FIXTURES / "training_engine" / "inside_a_step")
    self.assertEqual(code, 2)
    self.assertIn("problem     saved inside a step: micro_step_count 1", out)

  def test_the_tree_folds_layers(self):
    _, out, _ = call(util.FIXTURES / "maxtext-main-2026-05-14" / "nnx_unscan", "--tree")
    self.assertIn("\n  model/decoder/layers/0…3/mlp/wi_1/kernel  (32, 64) float32\n", out)

  def test_json(self):
    code, out, _ = call(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", util.FIXTURES / "tunix" / "sft", "--json")
    document = json.loads(out)
    self.assertEqual((code, document["schema"]), (0, 1))
    linen, tunix = document["found"]
    self.assertEqual(
        (linen["step"], linen["layout"], tunix["layout"]), (3, "Linen TrainState", "Tunix, boxed everywhere")
    )
    params = {"part": "params", "dtype": "float32", "leaves": 12, "elements": 57632, "nbytes": 230528}
    self.assertIn(params, linen["amounts"])
    self.assertEqual(linen["leaves"]["step"], "() int32")


if __name__ == "__main__":
  absltest.main()
