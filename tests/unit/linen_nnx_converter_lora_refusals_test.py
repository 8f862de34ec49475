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

"""LoRA adapters: what is refused, and that faults of what merges them are found."""

import shutil
import types
from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_lora_trees as lora_trees
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import lora
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer


class LoraRefusalsTest(lora_trees.LoraTestCase):
  product = staticmethod(lora.Adapter._product)

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
    self.source = self.save("trained", util.linen(lora_trees.model(self.base)))
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
      (
          "of_another_leaf",
          lambda t: {"wi": {f"scale_lora_{x}": t["wi"][f"kernel_lora_{x}"] for x in "ab"}},
          "scale_lora_a: expected its scale .* found none",
      ),
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

  def test_a_weight_that_adapters_fit_in_two_ways(self):
    """Its experts are as many as their inputs: either may be what A has."""
    self.base["moe"] = {"wi_0": lora_trees.draw(1, 6, lora_trees.LAYERS, 6, 5)}
    self.adapters["moe"] = {"wi_0_lora_a": lora_trees.draw(2, 6, 3, 2), "wi_0_lora_b": lora_trees.draw(3, 2, 3, 6, 5)}
    self.source = self.save("moe", {"params": {"params": lora_trees.model(self.base)}})
    self.save_adapters(self.adapters, "of_moe")
    with self.assertRaisesRegex(errors.LayoutError, "moe/wi_0_lora_a: expected adapters .* in one way, .*, in 2 ways"):
      self.convert(adapters="of_moe")

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
    self.save_adapters(self.adapters, "of_metadata", lora={"lora_rank": 16, "lora_alpha": lora_trees.ALPHA})
    with self.assertRaisesRegex(errors.LayoutError, "of_metadata/2: expected adapters of one rank, .* found 16, 2"):
      self.convert(adapters="of_metadata")

  def test_a_base_with_adapters_of_its_own(self):
    self.base["wi"] |= self.adapters["wi"]
    self.source = self.save("both", {"params": {"params": lora_trees.model(self.base)}})
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
    self.assertEqual((found.lora_restore_path, found.lora_alpha), (None, None))
    found = run_config.with_config(options_lib.Options(lora_restore_path="/others"), config)
    self.assertEqual((found.lora_restore_path, found.lora_alpha), ("/others", 16.0))
    with self.assertRaisesRegex(errors.ConfigError, "^--lora_alpha=4.0: expected lora_alpha=16.0, as the config says"):
      run_config.with_config(options_lib.Options(lora_restore_path="/others", lora_alpha=4.0), config)


if __name__ == "__main__":
  absltest.main()
