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

"""MaxText's own abstract states, turned into each other: every decoder family of three releases, without MaxText.

`tests/golden/generate.py` wrote the trees; no two axes of a tree have the same length where the model allows it.
"""

import dataclasses
import itertools

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_golden_trees import config
from linen_nnx_converter_golden_trees import decoder_of
from linen_nnx_converter_golden_trees import golden
from linen_nnx_converter_golden_trees import GoldenTestCase
from linen_nnx_converter_golden_trees import read
from linen_nnx_converter_golden_trees import version_of
from linen_nnx_converter_golden_trees import without
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

RELEASES = ("0.2.3", "0.2.4", "0.2.5")
# What MaxText itself loses or leaves out, so that its own trees cannot be turned into each other.
EXCEPTIONS = {
    "qwen3-next-remainder": "up to 0.2.4 the scanned model lacks the layers that are left over after its blocks",
    "engram": "the unscanned NNX model lacks the engram modules",
    "pipeline": "a pipeline is written alike whatever scan_layers is; 0.2.3's NNX trainer has none",
}


def cases(*forms):
  """Release, case, form and the paths of its scanned and unscanned trees, where both exist."""
  for release in RELEASES:
    for scanned in sorted(golden(release).glob("*.scanned.txt"), key=str):
      case, form, _, _ = scanned.name.rsplit(".", 3)
      unscanned = scanned.parent / scanned.name.replace(".scanned.", ".unscanned.")
      if form in forms and unscanned.exists():
        yield release, case, form, scanned, unscanned


class GoldenTest(GoldenTestCase):

  def is_exception(self, release, case, form):
    if case == "qwen3-next-remainder":
      return release != "0.2.5"
    return case in EXCEPTIONS and not (case == "engram" and form == "linen")

  def test_scanned_and_unscanned(self):
    self._scanned_and_unscanned("0.2.5")

  @parameterized.parameters("0.2.3", "0.2.4")
  @pytest.mark.integration
  def test_scanned_and_unscanned_formerly(self, release):
    self._scanned_and_unscanned(release)

  def _scanned_and_unscanned(self, release):
    """Each turned into the other, by the config's schedule, and unstacked by the tree alone."""
    count = 0
    for _, case, form, scanned, unscanned in (each for each in cases("linen", "nnx", "ondisk") if each[0] == release):
      if self.is_exception(release, case, form):
        continue
      settings, version = config(release, case), tuple(map(int, release.split(".")))
      trainer = "linen" if form == "linen" else "nnx"
      options = {
          "direction": "nnx_to_nnx" if form == "nnx" else "linen_to_linen",
          "param_scan_axis": settings["param_scan_axis"],
      }
      trees = {True: read(scanned, only_params=True), False: read(unscanned, only_params=True)}
      for scan_layers in (True, False):
        with self.subTest(f"{release} {case} {form} scan_layers={scan_layers}"):
          by_config = {"release": version, "trainer": trainer, "decoder": decoder_of(settings)}
          plan = util.plan_conversion(trees[not scan_layers], scan_layers=scan_layers, **by_config, **options)
          self.assert_state(plan, trees[scan_layers])
          self.assertEqual(plan.scan_layers, scan_layers)
          count += 1
      if not (trainer == "nnx" and version < (0, 2, 4)):  # Whose names for DeepSeek only the config asks for.
        with self.subTest(f"{release} {case} {form} by the tree alone"):
          plan = util.plan_conversion(trees[True], scan_layers=False, layer_naming="flat", **options)
          self.assert_state(plan, trees[False])
    self.assertGreater(count, 50)

  def test_stacking_without_a_config_is_right_or_refused(self):
    self._stacking_without_a_config_is_right_or_refused("0.2.5")

  @parameterized.parameters("0.2.3", "0.2.4")
  @pytest.mark.integration
  def test_stacking_without_a_config_is_right_or_refused_formerly(self, release):
    self._stacking_without_a_config_is_right_or_refused(release)

  def _stacking_without_a_config_is_right_or_refused(self, release):
    """Never another tree than MaxText's own: what repeats in blocks is told by its submodules."""
    stacked, refused = set(), set()
    for _, case, form, scanned, unscanned in (each for each in cases("linen", "nnx", "ondisk") if each[0] == release):
      if case == "pipeline":  # Its layers are stacked already, and are taken out of the pipeline.
        continue
      settings = config(release, case)
      with self.subTest(f"{case} {form}"):
        options = {
            "direction": "nnx_to_nnx" if form == "nnx" else "linen_to_linen",
            "param_scan_axis": settings["param_scan_axis"],
        }
        try:
          plan = util.plan_conversion(read(unscanned, only_params=True), scan_layers=True, **options)
        except errors.ConversionError:
          refused.add(case)
          continue
        stacked.add(case)
        self.assert_state(plan, read(scanned, only_params=True))
    self.assertContainsSubset({"llama2", "gemma2", "mixtral", "gpt3-adam_pax", "qwen3-moe", "deepseek2"}, stacked)
    self.assertContainsSubset({"gemma3-short", "gemma3-remainder", "gpt-oss", "olmo3"}, refused)
    self.assertEmpty(stacked & refused)

  @pytest.mark.integration
  def test_nnx_and_what_its_trainer_saves(self):
    self._nnx_and_what_its_trainer_saves("0.2.5")

  @parameterized.parameters(("0.2.4",))
  @pytest.mark.integration
  def test_nnx_and_what_its_trainer_saves_formerly(self, release):
    self._nnx_and_what_its_trainer_saves(release)

  def _nnx_and_what_its_trainer_saves(self, release):
    """All leaves: RNG state and other variables too, which the converter tells apart without their types."""
    for path in sorted(golden(release).glob("*.nnx.*.txt"), key=str):
      with self.subTest(path.name):
        nnx, saved = read(path), read(path.parent / path.name.replace(".nnx.", ".ondisk."))
        settings = config(release, path.name.split(".nnx.")[0])
        keep = {
            "scan_layers": None,
            "layer_naming": "flat",
            "param_scan_axis": settings["param_scan_axis"],
        }
        by_release = {"release": version_of(release), "trainer": "nnx", "decoder": decoder_of(settings)}
        self.assert_state(util.plan_conversion(nnx, **by_release, **keep), saved)
        scan_layers = None if path.name.startswith("pipeline.") else ".nnx.scanned." in path.name  # None keeps it.
        back = util.plan_conversion(saved, nnx_values="plain", **keep | {"scan_layers": scan_layers})
        self.assert_state(back, nnx)

  @pytest.mark.integration
  def test_nnx_and_what_0_2_3_saves(self):
    """That release saves all but `rngs` and `dropout` as if it were a Param, and has no `nnx_aux`."""
    for path in sorted(golden("0.2.3").glob("*.nnx.*.txt"), key=str):
      case, scan_layers = path.name.split(".nnx.")[0], ".nnx.scanned." in path.name
      if self.is_exception("0.2.3", case, "nnx"):
        continue
      with self.subTest(path.name):
        nnx, saved = read(path), read(path.parent / path.name.replace(".nnx.", ".ondisk."))
        settings = config("0.2.3", case)
        options = {"scan_layers": scan_layers, "param_scan_axis": settings["param_scan_axis"]}
        by_release = {"release": (0, 2, 3), "trainer": "nnx", "decoder": decoder_of(settings)}
        plan = util.plan_conversion(nnx, **by_release, **options)
        self.assert_state(dataclasses.replace(plan, target=without(plan.target, "nnx_aux")), saved)
        back = util.plan_conversion(saved, direction="linen_to_nnx", nnx_values="plain", **by_release, **options)
        self.assert_state(back, without(nnx, "rngs", "dropout"))

  def test_fp8_state_finds_its_place_in_each_trainers_form(self):
    """Among the params in 0.2.3, in `nnx_aux` from 0.2.4, in a collection of its own in Linen; always on axis 0."""
    for arrangement in ("scanned", "unscanned"):
      trees = {
          ("linen", (0, 2, 4)): read(golden("0.2.4") / f"fp8.linen.{arrangement}.txt"),
          ("nnx", (0, 2, 3)): read(golden("0.2.3") / f"fp8.ondisk.{arrangement}.txt"),
          ("nnx", (0, 2, 5)): read(golden("0.2.5") / f"fp8.ondisk.{arrangement}.txt"),
      }
      for source, (trainer, release) in itertools.product(trees.values(), trees):
        with self.subTest(f"{arrangement} {trainer} {release}"):
          plan = util.plan_conversion(source, release=release, trainer=trainer, nnx_aux="keep")
          found, wanted = (without(s, "rngs", "to_nnx__rngs", "dropout") for s in (plan.target, trees[trainer, release]))
          self.assert_state(dataclasses.replace(plan, target=found), wanted)

  @pytest.mark.integration
  def test_linen_and_nnx(self):
    """The Linen trainer's state is what the NNX trainer of the same release saves, but for NNX-only state."""
    for path in sorted(golden("0.2.4").glob("*.linen.*.txt"), key=str):
      case = path.name.split(".linen.")[0]
      saved = path.parent / path.name.replace(".linen.", ".ondisk.")
      differ = (
          "gemma4-remainder",
          "gemma4-scan_axis_0",
          "engram",
          "pipeline",
      )  # Do in MaxText.
      if not saved.exists() or case in differ:
        continue
      with self.subTest(path.name):
        scan_layers = ".scanned." in path.name
        axis = config("0.2.4", case)["param_scan_axis"]
        options = {"layer_naming": "flat", "param_scan_axis": axis}
        there = util.plan_conversion(read(path), scan_layers=scan_layers, **options)
        self.assert_state(util.plan_conversion(there.target, **options), read(path))
        by_release = {"release": (0, 2, 4), "trainer": "nnx", **options}
        self.assert_state(util.plan_conversion(there.target, **by_release), without(read(saved), "rngs", "to_nnx__rngs"))


if __name__ == "__main__":
  absltest.main()
