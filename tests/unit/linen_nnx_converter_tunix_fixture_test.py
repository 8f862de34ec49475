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


"""What becomes of checkpoints that Tunix wrote of MaxText's models."""

import json
import os

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

RNG_STATE = [
    f"{module}/rngs/{stream}/{leaf}"
    for module in ("decoder", "decoder/layers/self_attention")
    for stream in ("aqt", "dropout", "params")
    for leaf in ("count", "key")
]


class FixtureTest(util.CheckpointTestCase):

  @parameterized.parameters(
      ("sft", 4, "", "opt_state/1/0", "opt_state/1/2/count"),
      ("rl", 4, "base/", "opt_state/inner_state/1/0", "opt_state/count"),
      ("distillation", 2, "", "opt_state/inner_state/1/0", "opt_state/count"),
  )
  def test_the_target_is_what_maxtext_resumes(self, name, step, base, adam, schedule):
    source = util.FIXTURES / "tunix" / name
    before = util.snapshot(source)
    conversion = converter.convert_checkpoint(source, self.tmp / "out")
    given = {item: util.flat(tree) for item, tree in converter.load_checkpoint(source).items()}
    optimizer = given["optimizer_state"]
    weights = {
        path.removeprefix(base).removesuffix("/value"): leaf
        for path, leaf in given["model_params"].items()
        if "/rngs/" not in path
    }
    self.assertLen(weights, 12)
    expected = {"step": util.bits(np.int32(step)), "opt_state/1": None}
    expected["opt_state/0/count"] = optimizer[f"{adam}/count/value"]
    expected["opt_state/2/count"] = optimizer[f"{schedule}/value"]
    for path, leaf in weights.items():
      expected[f"params/params/{path}"] = leaf
      for moment in ("mu", "nu"):
        expected[f"opt_state/0/{moment}/params/{path}"] = optimizer[f"{adam}/{moment}/{base}{path}/value"]
    if name == "distillation":  # It draws from RNG keys of MaxText's size.
      rngs = {path.removesuffix("/value"): leaf for path, leaf in given["model_params"].items() if "/rngs/" in path}
      expected |= {f"nnx_aux/model/{path}": leaf for path, leaf in rngs.items()}
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "out")), expected)
    self.assertEqual(util.snapshot(source), before)
    self.assertCountEqual(os.listdir(self.tmp / "out"), [str(step - 1)])
    self.assertCountEqual(os.listdir(conversion.target.parent), ["_CHECKPOINT_METADATA", "commit_success.txt", "items"])
    self.assertTrue(conversion.verified)

  @parameterized.parameters(
      ("sft", []),
      (
          "rl",
          ["opt_state/hyperparams/learning_rate/value", "opt_state/hyperparams_states/learning_rate/count/value"],
      ),
  )
  def test_what_is_left_out_is_on_record(self, name, wrappers):
    source, base = util.FIXTURES / "tunix" / name, "base/" if name == "rl" else ""
    converter.convert_checkpoint(source, self.tmp / "out")
    metadata = json.loads((self.tmp / "out" / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    given = json.loads((source / "4" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    record = metadata.pop("linen_nnx_converter")
    self.assertEqual(metadata, given | {"scan_layers": True})
    optimizer_leaves = [f"optimizer_state/{path}" for path in ("step/value", *wrappers)]
    rng_leaves = [f"model_params/{base}{path}/value" for path in RNG_STATE]
    self.assertCountEqual(record["dropped"], optimizer_leaves + rng_leaves)
    self.assertEqual(record["leaves"]["from the folder's name"], 1)
    self.assertIn("two words", record["dropped"][rng_leaves[0]])

  @parameterized.parameters(
      ("sft", "out", "out/3/items"),
      ("sft/4", "out", "out/3/items"),
      ("sft/4", "out/7", "out/7/3/items"),
      ("sft/4", "checkpoints/7", "checkpoints/7/items"),
      ("sft/4", "out/7/items", "out/7/items"),
  )
  @pytest.mark.integration
  def test_spellings(self, source, target, items):
    conversion = converter.convert_checkpoint(util.FIXTURES / "tunix" / source, self.tmp / target)
    self.assertEqual(os.fspath(conversion.target), os.fspath(self.tmp / items))
    self.assertEqual(converter.load_checkpoint(self.tmp / items)["step"], 4)

  def test_a_plan_as_lines(self):
    conversion = converter.convert_checkpoint(util.FIXTURES / "tunix" / "rl", self.tmp / "out", dry_run=True)
    lines = list(conversion.plan.lines())
    self.assertIn("step  () int32  from the folder's name", lines)
    self.assertIn("opt_state/2/count  () int32  copy of optimizer_state/opt_state/count/value", lines)
    self.assertIn("optimizer_state/opt_state/hyperparams/learning_rate/value  left out: the last learning rate", lines)
    self.assertIn("1 from the folder's name", conversion.summary())
    self.assert_nothing_left()

  @parameterized.product(name=("sft", "rl"), release=("0.2.3", "0.2.4", "0.2.5"))
  @pytest.mark.integration
  def test_unscanned_and_back(self, name, release):
    source = util.FIXTURES / "tunix" / name
    converter.convert_checkpoint(source, self.tmp / "scanned")
    converter.convert_checkpoint(source, self.tmp / "unscanned", scan_layers=False, maxtext_release=release)
    converter.convert_checkpoint(self.tmp / "unscanned", self.tmp / "back", direction="linen_to_linen", scan_layers=True)
    metadata = json.loads((self.tmp / "unscanned" / "3" / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    self.assertIs(metadata["scan_layers"], False)
    load = lambda name: util.flat(converter.load_checkpoint(self.tmp / name))
    self.assertEqual(load("back"), load("scanned"))

  def test_params_only_is_what_load_parameters_path_reads(self):
    for source in ("sft", "sft/4/model_params"):
      folder = self.tmp / source.replace("/", "_")
      options = {} if source.endswith("model_params") else {"params_only": True}
      converter.convert_checkpoint(util.FIXTURES / "tunix" / source, folder, **options)
    whole = converter.load_checkpoint(self.make("sft", "whole"))["params"]
    for name in ("sft", "sft_4_model_params"):
      self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / name / "3")), util.flat({"params": whole}))

  def make(self, source, name, **options):
    converter.convert_checkpoint(util.FIXTURES / "tunix" / source, self.tmp / name, **options)
    return self.tmp / name

  @parameterized.parameters("sft", "rl")
  @pytest.mark.integration
  def test_to_an_nnx_layout(self, name):
    """The same as by way of the Linen layout."""
    direct = self.make(name, "direct", direction="nnx_to_nnx", nnx_values="plain")
    converter.convert_checkpoint(self.make(name, "linen"), self.tmp / "nnx", nnx_values="plain")
    self.assertEqual(util.flat(converter.load_checkpoint(direct)), util.flat(converter.load_checkpoint(self.tmp / "nnx")))


if __name__ == "__main__":
  absltest.main()
