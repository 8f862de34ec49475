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
import functools
import itertools
import json
import re
import zipfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

RELEASES = ("0.2.3", "0.2.4", "0.2.5")
_LINE = re.compile(r"(\S+) (?:(None|\{\})|\((.*)\) (\S+) (\S+))")

# What MaxText itself loses or leaves out, so that its own trees cannot be turned into each other.
EXCEPTIONS = {
    "qwen3-next-remainder": "up to 0.2.4 the scanned model lacks the layers that are left over after its blocks",
    "engram": "the unscanned NNX model lacks the engram modules",
    "pipeline": "a pipeline is written alike whatever scan_layers is; 0.2.3's NNX trainer has none",
}


@functools.cache
def golden(release: str) -> zipfile.Path:
  """The folder of a release's trees."""
  return zipfile.Path(util.FIXTURES / "golden" / f"{release}.zip", f"{release}/")


def read(path: zipfile.Path, only_params: bool = False) -> abstract_state.AbstractState:
  """A golden tree; with `only_params` without the NNX variables that are no Params."""
  leaves = {}
  for line in path.read_text().splitlines():
    name, empty, shape, dtype, kind = _LINE.fullmatch(line).groups()
    where = tuple(name.split("/"))
    if empty:
      leaves[where] = None if empty == "None" else {}
    elif not only_params or not (where[0] == "nnx_aux" or (where[0] == "model" and kind != "Param")):
      leaves[where] = jax.ShapeDtypeStruct(tuple(map(int, re.findall(r"\d+", shape))), np.dtype(dtype))
  return abstract_state.AbstractState(leaves, _lists(leaves))


def _lists(leaves):
  """The chains of an optimizer in the Linen layout."""
  children = {}
  for path in leaves:
    end = path.index("params") if "params" in path else len(path)  # Below it are weights, whose layers may be numbered.
    for i in range(1, end) if path[0] == "opt_state" else ():
      children.setdefault(path[:i], set()).add(path[i])
  return frozenset(path for path, names in children.items() if all(name.isdigit() for name in names))


def cases(*forms):
  """Release, case, form and the paths of its scanned and unscanned trees, where both exist."""
  for release in RELEASES:
    for scanned in sorted(golden(release).glob("*.scanned.txt"), key=str):
      case, form, _, _ = scanned.name.rsplit(".", 3)
      unscanned = scanned.parent / scanned.name.replace(".scanned.", ".unscanned.")
      if form in forms and unscanned.exists():
        yield release, case, form, scanned, unscanned


def config(release, case):
  return json.loads((golden(release) / f"{case}.config.json").read_text())


def version_of(release):
  return tuple(map(int, release.split(".")))


def without(state, *keys):
  """The state without the leaves that have one of these keys in their path."""
  leaves = {path: leaf for path, leaf in state.leaves.items() if not set(keys) & set(path)}
  return abstract_state.AbstractState(leaves, state.lists)


def decoder_of(settings, **changed):
  return decoder_families.Decoder(
      settings["decoder_block"],
      settings["num_decoder_layers"],
      settings["first_num_dense_layers"],
      settings["first_num_hash_layers"],
      settings["inhomogeneous_layer_cycle_interval"],
      settings["model_name"],
      **changed,
  )


class GoldenTest(parameterized.TestCase):
  maxDiff = 2000

  def assert_state(self, plan, wanted):
    found, expected = plan.target.leaves, wanted.leaves
    if any(found.get(path, path) != leaf for path, leaf in expected.items()) or len(found) != len(expected):
      self.assertEqual(*({"/".join(p): str(leaf) for p, leaf in leaves.items()} for leaves in (found, expected)))
      self.fail("they differ, but not in what is printed of them")
    self.assertEqual(plan.target.lists, wanted.lists)

  def is_exception(self, release, case):
    if case == "qwen3-next-remainder":
      return release != "0.2.5"
    return case in EXCEPTIONS

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
      if self.is_exception(release, case):
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
      if self.is_exception("0.2.3", case):
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

  @parameterized.parameters("0.2.3", "0.2.4")
  def test_layers_that_maxtext_would_lose_are_not_given_up(self, release):
    settings = config(release, "qwen3-next-remainder")
    with self.assertRaisesRegex(errors.LayerStackError, "blocks of 4 can hold, as qwen3_next is scanned, found 22"):
      decoder_families.schedule(decoder_of(settings), True, "nnx", tuple(map(int, release.split("."))))

  def test_a_checkpoint_of_another_depth_is_refused(self):
    decoder = decoder_families.Decoder("gemma3", 12)
    tree = read(golden("0.2.4") / "gemma3-remainder.linen.unscanned.txt")
    with self.assertRaisesRegex(
        errors.LayerStackError, "decoder/layers: expected 12 layers, as the config says, found 26"
    ):
      util.plan_conversion(tree, scan_layers=True, release=(0, 2, 4), decoder=decoder)

  @parameterized.parameters(
      ("gemma4", (0, 2, 3), (0, 2, 4), "gemma4-even"), ("qwen3_next", (0, 2, 4), (0, 2, 5), "qwen3-next")
  )
  def test_blocks_of_one_release_become_those_of_the_next(self, block, older, newer, case):
    """One axis is put in, or taken out, without unstacking."""
    name = lambda version: ".".join(map(str, version))
    trees = [read(golden(name(v)) / f"{case}.nnx.scanned.txt", only_params=True) for v in (older, newer)]
    decoder = decoder_of(config(name(older), case))
    self.assertEqual(decoder.block, block)
    for source, target, version in ((*trees, newer), (*reversed(trees), older)):
      by_config = {"release": version, "trainer": "nnx", "decoder": decoder}
      plan = util.plan_conversion(source, direction="nnx_to_nnx", scan_layers=True, **by_config)
      self.assert_state(plan, target)

  @parameterized.parameters(*itertools.product(("deepseek3", "kimi", "deepseek3-mtp2"), (True, False), (True, False)))
  def test_a_param_that_0_2_5_made_another_variable(self, case, was_scanned, scan_layers):
    """DeepSeek-V3's routing bias: (experts, layers) and trained, then (layers, experts) in nnx_aux, without moments."""
    name = lambda is_scanned: f"{case}.ondisk.{'scanned' if is_scanned else 'unscanned'}.txt"
    source = read(golden("0.2.4") / name(was_scanned), only_params=True)
    wanted = read(golden("0.2.5") / name(scan_layers))
    decoder = decoder_of(config("0.2.5", case))
    plan = util.plan_conversion(source, release=(0, 2, 5), decoder=decoder, scan_layers=scan_layers)
    is_new = lambda path: any(key == "rngs" or key.endswith("_final_norm") for key in path)  # RNGs, and a norm of 0.2.5.
    leaves = {path: leaf for path, leaf in wanted.leaves.items() if not is_new(path)}
    self.assert_state(plan, abstract_state.AbstractState(leaves, wanted.lists))
    self.assertTrue(all(path[-2:] == ("gate", "bias") and path[0] == "opt_state" for path in plan.dropped))
    self.assertNotEmpty(plan.dropped)
    if was_scanned and scan_layers:
      self.assertGreater(plan.counts()["transpose"], 0)

  def test_without_the_models_name_it_is_refused(self):
    source = read(golden("0.2.4") / "deepseek3.ondisk.scanned.txt")
    with self.assertRaisesRegex(errors.ConfigError, "gate/bias: expected the model's name, .* found no config"):
      util.plan_conversion(source, release=(0, 2, 5))
    util.plan_conversion(source, release=(0, 2, 4), trainer="nnx")

  def test_what_a_config_leaves_open_is_refused(self):
    """Nothing in engram's unscanned tree tells that MaxText scans its layers in chunks; its config does."""
    source = read(golden("0.2.4") / "engram.ondisk.unscanned.txt", only_params=True)
    options = {
        "decoder": decoder_of(config("0.2.4", "engram"), known_order=False),
        "release": (0, 2, 4),
        "trainer": "nnx",
    }
    with self.assertRaisesRegex(errors.ConfigError, "expected the arrangement kept, .* found layers to stack"):
      util.plan_conversion(source, scan_layers=True, **options)
    self.assert_state(util.plan_conversion(source, scan_layers=False, **options), source)

  def test_a_routing_bias_in_layers_of_unknown_order_is_refused(self):
    source = read(golden("0.2.4") / "deepseek3.ondisk.scanned.txt", only_params=True)
    decoder = decoder_of(config("0.2.4", "deepseek3"), known_order=False)
    with self.assertRaisesRegex(errors.ConfigError, "gate/bias: .* found a variable whose layer axis moves"):
      util.plan_conversion(source, release=(0, 2, 5), decoder=decoder, scan_layers=True)

  def test_the_way_back_lacks_its_moments(self):
    source = read(golden("0.2.5") / "deepseek3.ondisk.scanned.txt")
    with self.assertRaisesRegex(
        errors.ConfigError, "gate/bias: expected a Param with moments, as MaxText 0.2.4 keeps it"
    ):
      util.plan_conversion(source, release=(0, 2, 4))
    deepseek4 = read(golden("0.2.4") / "deepseek4.ondisk.scanned.txt")  # Whose bias was never a Param.
    util.plan_conversion(deepseek4, release=(0, 2, 4), trainer="nnx")


if __name__ == "__main__":
  absltest.main()
