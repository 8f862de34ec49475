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

"""MaxText's own abstract states of one release, turned into those of another."""

import itertools
import types

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_golden_trees import config
from linen_nnx_converter_golden_trees import decoder_of
from linen_nnx_converter_golden_trees import golden
from linen_nnx_converter_golden_trees import GoldenTestCase
from linen_nnx_converter_golden_trees import read
import linen_nnx_converter_util as util

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


class ReleaseTest(GoldenTestCase):
  """What changes from one release to the next, and what a config must tell."""

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

  @parameterized.parameters(*itertools.product(("deepseek3", "kimi"), (True, False), (True, False)))
  def test_a_param_that_0_2_5_made_another_variable(self, case, was_scanned, scan_layers):
    """DeepSeek-V3's routing bias: (experts, layers) and trained, then (layers, experts) in nnx_aux, without moments."""
    name = lambda is_scanned: f"{case}.ondisk.{'scanned' if is_scanned else 'unscanned'}.txt"
    source = read(golden("0.2.4") / name(was_scanned), only_params=True)
    wanted = read(golden("0.2.5") / name(scan_layers))
    decoder = decoder_of(config("0.2.5", case))
    plan = util.plan_conversion(source, release=(0, 2, 5), decoder=decoder, scan_layers=scan_layers)
    leaves = {path: leaf for path, leaf in wanted.leaves.items() if "rngs" not in path}
    self.assert_state(plan, abstract_state.AbstractState(leaves, wanted.lists))
    self.assertTrue(all(path[-2:] == ("gate", "bias") and path[0] == "opt_state" for path in plan.dropped))
    self.assertNotEmpty(plan.dropped)
    if was_scanned and scan_layers:
      self.assertGreater(plan.counts()["transpose"], 0)

  @parameterized.parameters(
      (
          "0.2.4",
          (0, 2, 5),
          "mtp_block/.*: expected .* MaxText 0.2.5, with a norm of its own, found that of a release before",
      ),
      (
          "0.2.5",
          (0, 2, 4),
          "mtp_1_final_norm/scale: expected .* MaxText 0.2.4, without a norm of its own, found that of 0.2.5",
      ),
  )
  def test_multi_token_prediction_of_another_release_is_refused(self, release, version, message):
    """0.2.5 does not resume without the norm that it has; 0.2.4 ignores the norm that it has not."""
    source = read(golden(release) / "deepseek3-mtp2.ondisk.scanned.txt")
    decoder = decoder_of(config("0.2.5", "deepseek3-mtp2"))
    with self.assertRaisesRegex(errors.DirectionError, message):
      util.plan_conversion(source, release=version, trainer="nnx", decoder=decoder)
    same = tuple(map(int, release.split(".")))
    util.plan_conversion(source, release=same, trainer="nnx", decoder=decoder)

  def test_without_the_models_name_it_is_refused(self):
    source = read(golden("0.2.4") / "deepseek3.ondisk.scanned.txt")
    with self.assertRaisesRegex(errors.ConfigError, "gate/bias: expected the model's name, .* found no config"):
      util.plan_conversion(source, release=(0, 2, 5))
    util.plan_conversion(source, release=(0, 2, 4), trainer="nnx")

  def test_engrams_layers_are_stacked_by_a_config_alone(self):
    """Nothing in the unscanned NNX tree, which lacks engram's modules, tells that MaxText scans its layers in chunks."""
    source = read(golden("0.2.4") / "engram.ondisk.unscanned.txt", only_params=True)
    with self.assertRaisesRegex(errors.ConfigError, "expected the model's config, .* deepseek with engram"):
      util.plan_conversion(source, scan_layers=True, direction="linen_to_linen")
    decoder = decoder_of(config("0.2.4", "engram"))
    plan = util.plan_conversion(source, scan_layers=True, decoder=decoder, release=(0, 2, 4), trainer="nnx")
    wanted = read(golden("0.2.4") / "engram.ondisk.scanned.txt", only_params=True)
    lacking = {path for path in wanted.leaves if "engram" in path or "engram_layer_norm" in path}
    leaves = {path: leaf for path, leaf in wanted.leaves.items() if path not in lacking}
    self.assertNotEmpty(lacking)
    self.assert_state(plan, abstract_state.AbstractState(leaves, wanted.lists))

  @parameterized.parameters("0.2.4", "0.2.5")
  def test_engram_is_not_taken_where_the_release_would_lose_it(self, release):
    """The Linen trainer has it in unscanned layers too, the NNX trainers in scanned ones alone."""
    source = read(golden("0.2.4") / "engram.linen.scanned.txt")
    version = tuple(map(int, release.split(".")))
    by_config = decoder_of(config("0.2.4", "engram"))
    for decoder in (by_config,) if release == "0.2.5" else (by_config, None):  # 0.2.5 wants one for the routing bias.
      run = {"release": version, "trainer": "nnx", "decoder": decoder}
      with self.assertRaisesRegex(errors.ConfigError, "layers_1/engram.*: expected scanned layers, .* no engram"):
        util.plan_conversion(source, scan_layers=False, **run)
      util.plan_conversion(source, scan_layers=True, **run)

  def test_each_of_engrams_unscanned_layers_stands_for_itself(self):
    """They have the names that any DeepSeek's have in the release."""
    source, wanted = (read(golden("0.2.3") / f"engram.{form}.unscanned.txt") for form in ("nnx", "ondisk"))
    decoder = run_config.decoder(types.SimpleNamespace(**config("0.2.3", "engram")))
    self.assertEqual(decoder, decoder_of(config("0.2.3", "engram")))
    run = {"decoder": decoder, "release": (0, 2, 3), "trainer": "nnx"}
    self.assert_state(util.plan_conversion(source, scan_layers=False, nnx_aux="drop", **run), wanted)

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
