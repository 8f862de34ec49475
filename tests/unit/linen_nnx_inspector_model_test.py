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

"""Where a checkpoint and the model of a config differ."""

import dataclasses
import json
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
from linen_nnx_inspector_runs import call
from linen_nnx_inspector_runs import LINEN_SCAN
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening

CONFIG = types.SimpleNamespace(scan_layers=True, param_scan_axis=1)
NORM, WI = "params/params/decoder/decoder_norm/scale", "params/params/decoder/layers/mlp/wi_0/kernel"
STATE = opening.open_source(locations.find_source(LINEN_SCAN)).state


def saved(change=None):
  """What MaxText saves of the model: the fixture's leaves, with a change."""
  leaves = {"/".join(path): leaf for path, leaf in STATE.leaves.items()} | (change or {})
  return dataclasses.replace(STATE, leaves={tuple(name.split("/")): leaf for name, leaf in leaves.items() if leaf != 0})


class ModelTest(parameterized.TestCase):

  def call(self, *args, model=None, layers=4):
    """Calls the command with a config whose model is this one."""
    run = planner.Run((0, 2, 5), "nnx", decoder_families.Decoder("llama2", layers))
    with (
        mock.patch.object(run_config, "load", return_value=CONFIG),
        mock.patch.object(run_config, "run", return_value=run),
        mock.patch.object(run_config, "saved_state", return_value=model or saved()),
    ):
      code, out, err = call(*args, "base.yml", "model_name=tiny")
    self.assertEqual(err, "")
    return code, out[max(0, out.find("  model ")) :]

  @parameterized.parameters(
      ({}, 0, "all 39 leaves fit\n"),
      ({NORM: 0}, 1, f"1 leaf differs\n  has more    {NORM}  (32,) float32\n"),
      ({f"{NORM}/x": (4, np.int32)}, 1, f"1 leaf differs\n  lacks       {NORM}/x  (4,) int32\n"),
      ({WI: (8, np.float32)}, 1, f"1 leaf differs\n  unlike      {WI}  (32, 4, 64) float32, not (8,) float32\n"),
      ({NORM: (32, np.float16)}, 0, f"all 39 leaves fit\n  is cast     {NORM}  (32,) float32, not (32,) float16\n"),
  )
  def test_what_differs(self, change, code, said):
    change = {name: leaf and jax.ShapeDtypeStruct(leaf[:1], leaf[1]) for name, leaf in change.items()}
    found = self.call(LINEN_SCAN, model=saved(change))
    self.assertEqual(found, (code, f"  model       of the config, MaxText 0.2.5 (nnx): {said}"))

  def test_as_the_converter_would_write_it(self):
    code, out = self.call(util.FIXTURES / "maxtext-main-2026-05-14" / "linen_unscan")
    self.assertEqual(code, 0)
    self.assertIn("MaxText 0.2.5 (nnx), in the form that it reads: all 39 leaves fit", out)

  def test_variables_that_do_not_count_do_not_stand_in_the_way(self):
    code, out = self.call(util.FIXTURES / "maxtext-main-2026-05-14" / "nnx_unscan")
    self.assertEqual(code, 0)
    self.assertIn("all 39 leaves fit\n  model       the converter refuses it: model/decoder/layers/1/", out)

  def test_another_number_of_layers(self):
    code, out = self.call(LINEN_SCAN, layers=3)
    self.assertEqual(code, 0)  # The model of this test has as many as the checkpoint.
    self.assertIn("the converter refuses it: decoder/layers: expected 3 layers, as the config says, found 4", out)

  def test_json(self):
    self.assertIsNone(json.loads(call("--json", LINEN_SCAN)[1])["found"][0]["model"])
    code, out = self.call("--json", LINEN_SCAN, model=saved({NORM: 0}))
    self.assertEqual((code, json.loads(out)["found"][0]["model"]["beyond"]), (1, {NORM: "(32,) float32"}))

  def test_a_config_that_cannot_be_read_or_traced(self):
    failure = errors.ConfigError("base.yml", "a config", "none", "Check it.")
    with mock.patch.object(run_config, "load", side_effect=failure):
      self.assertEqual(call(LINEN_SCAN, "base.yml")[::2], (2, f"linen_nnx_inspector: {failure}\n"))
    with (
        mock.patch.object(run_config, "load", return_value=CONFIG),
        mock.patch.object(run_config, "run", side_effect=failure),
    ):
      code, out, _ = call(LINEN_SCAN, "base.yml")
    self.assertEqual(code, 2)
    self.assertIn(f"  problem     {failure}\n", out)


if __name__ == "__main__":
  absltest.main()
