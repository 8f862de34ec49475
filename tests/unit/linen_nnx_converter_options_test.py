# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Options are checked before anything is read, whoever gives them, and the message names the values that there are."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options

WRONG = (
    ({"nnx_aux": "Keep"}, "--nnx_aux: expected keep or drop, found 'Keep'. "),
    ({"nnx_aux": None}, "--nnx_aux: expected keep or drop, found None. "),
    ({"verify": "Ful"}, "--verify: expected full or True or False, found 'Ful'. "),
    ({"verify": 1}, "--verify: expected full or True or False, found 1. "),
    ({"copy_mode": "lnik"}, "--copy_mode: expected auto or link or copy, found 'lnik'. "),
    ({"direction": "linen"}, "--direction: expected auto or linen_to_nnx or nnx_to_linen or "),
    ({"memory_budget_gib": -1}, "--memory_budget_gib: expected at least 0.0625, found -1. "),
    ({"memory_budget_gib": float("nan")}, "--memory_budget_gib: expected at least 0.0625, found nan. "),
    ({"memory_budget_gib": float("inf")}, "--memory_budget_gib: expected at most 1125899906842624, found inf. "),
    ({"memory_budget_gib": 1e300}, "--memory_budget_gib: expected at most 1125899906842624, found 1e[+]300. "),
    ({"target_data_file_size": 10**24}, "--target_data_file_size: expected at most 1125899906842624, found 1000"),
    ({"chunk_byte_size": 10**24}, "--chunk_byte_size: expected at most 1125899906842624, found 1000"),
    ({"memory_budget_gib": "2"}, "--memory_budget_gib: expected a number, found '2'. "),
    ({"memory_budget_gib": True}, "--memory_budget_gib: expected a number, found True. "),
    ({"scan_layers": "False"}, "--scan_layers: expected True or False or None, found 'False'. "),
    ({"scan_layers": 0}, "--scan_layers: expected True or False or None, found 0. "),
    ({"param_scan_axis": -1}, "--param_scan_axis: expected at least 0, found -1. "),
    ({"param_scan_axis": 1.0}, "--param_scan_axis: expected an integer or None, found 1.0. "),
    ({"maxtext_release": (0, 2, 5)}, "--maxtext_release: expected a string or None, found (0, 2, 5). "),
    ({"maxtext_release": ""}, "--maxtext_release: expected a string or None, found ''. "),
    (
        {"lora_alpha": 16.0},
        "--lora_alpha: expected adapters that it scales, found none. Give --lora_restore_path",
    ),
    ({"overwrite": "yes"}, "--overwrite: expected True or False, found 'yes'. "),
    ({"scan_layer": True}, "--scan_layer: expected one of direction, target_layout, "),
)


class OptionsTest(util.CheckpointTestCase):

  @parameterized.parameters(*WRONG)
  def test_a_wrong_option_is_refused_before_anything_is_read(self, values, message):
    # There is no such source, and it is not what is complained of.
    with self.assertRaisesRegex(errors.OptionError, f"^{message.replace('(', '.').replace(')', '.')}"):
      converter.convert_checkpoint(self.tmp / "nowhere", self.tmp / "target", **values)
    self.assert_nothing_left()

  def test_the_functions_beside_it_check_theirs_too(self):
    with self.assertRaisesRegex(errors.OptionError, "--nnx_aux: expected keep or drop"):
      converter.convert_linen_to_nnx(util.linen(util.unscanned_params()), nnx_aux="Keep")
    with self.assertRaisesRegex(errors.OptionError, "--overwrite: expected one of direction, .*found no such option"):
      converter.convert_linen_to_nnx(util.linen(util.unscanned_params()), overwrite=True)
    with self.assertRaisesRegex(errors.OptionError, "--memory_budget_gib: expected at least 0.0625, found 0"):
      converter.verify_checkpoint(self.tmp / "nowhere", memory_budget_gib=0)
    with self.assertRaisesRegex(errors.OptionError, "--nnx_aux: expected keep or drop"):
      comparator.compare_checkpoints(self.tmp / "nowhere", self.tmp / "nowhere", nnx_aux="Drop")

  def test_a_whole_model_is_not_shown(self):
    """As where state and path are exchanged."""
    model = util.linen(util.unscanned_params(8))
    for function in (
        lambda: converter.save_checkpoint(self.tmp / "out", model),
        lambda: converter.load_checkpoint(model),
        lambda: converter.convert_checkpoint(self.tmp, self.tmp / "out", compression=model),
        lambda: converter.convert_checkpoint(self.tmp, self.tmp / "out", config=model),
        lambda: comparator.compare_checkpoints(self.tmp, self.tmp, param_scan_axes=model),
    ):
      with self.assertRaises(errors.ConversionError) as caught:
        function()
      self.assertLess(len(str(caught.exception)), 400)

  def test_what_is_told_of_progress_must_be_able_to_listen(self):
    nowhere = self.tmp / "nowhere"
    for function, *paths in (
        (converter.convert_checkpoint, nowhere, self.tmp / "target"),
        (converter.verify_checkpoint, nowhere),
        (comparator.compare_checkpoints, nowhere, nowhere),
    ):
      with self.assertRaisesRegex(errors.OptionError, "^progress: expected a progress.Progress, or None, found function"):
        function(*paths, progress=lambda done: None)

  @parameterized.parameters("base.yml", (["base.yml", "model_name=llama2-7b"],), 5)
  def test_what_is_no_config(self, config):
    source = self.save("source", util.linen(util.unscanned_params()))
    with self.assertRaisesRegex(errors.ConfigError, "config: expected what MaxText's pyconfig.initialize returns, found"):
      converter.convert_checkpoint(source, self.tmp / "target", config=config)
    with self.assertRaisesRegex(errors.ConfigError, "config: expected what MaxText's pyconfig.initialize returns, found"):
      comparator.compare_checkpoints(source, source, config=config)
    self.assertIn("pyconfig.initialize returns", inspector.inspect_checkpoint(source, config).problems[0])
    self.assert_nothing_left("source")

  def test_every_value_that_is_typed_is_taken(self):
    for name, (_, words, _) in options.hints(options.Options).items():
      for value in words:
        self.assertEqual(getattr(options.Options.of(**{name: value}), name), value)
    self.assertEqual(options.Options.of(memory_budget_gib=2).memory_budget.nbytes, 2**31)

  def test_options_cannot_be_changed(self):
    with self.assertRaises(dataclasses.FrozenInstanceError):
      options.Options().overwrite = True


if __name__ == "__main__":
  absltest.main()
