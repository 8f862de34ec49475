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

"""Checkpoints of Tunix on disk."""

import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax.numpy as jnp
from linen_nnx_converter_tunix_trees import MAXTEXTS
from linen_nnx_converter_tunix_trees import tunix_tree
from linen_nnx_converter_tunix_trees import WRAPPERS
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


class CheckpointTest(util.CheckpointTestCase):
  """Steps that Tunix's checkpoint manager would have written."""

  def save_step(self, step, optimizer, update=None):
    """Saves a step, its optimizer's leaves changed by `update`, and returns the folder of all steps."""
    tree = tunix_tree(optimizer)
    if update is not None:
      update(tree["optimizer_state"]["opt_state"])
    handlers = {name: ocp.PyTreeCheckpointHandler() for name in tree}
    with ocp.CheckpointManager(self.tmp / "run", item_handlers=handlers) as manager:
      manager.save(step, args=ocp.args.Composite(**{name: ocp.args.PyTreeSave(item) for name, item in tree.items()}))
    return self.tmp / "run"

  def test_gradients_that_wait_are_refused(self):
    set_mini_step = lambda opt_state: opt_state["mini_step"].set_value(jnp.int32(3))
    source = self.save_step(6, WRAPPERS["multi_steps_of_clip"](MAXTEXTS["adamw"]), set_mini_step)
    message = "opt_state/mini_step/value: expected 0, .* found 3, whose gradients would be lost. Save at such a step"
    for options in ({}, {"dry_run": True}):
      with self.assertRaisesRegex(errors.StepError, message):
        converter.convert_checkpoint(source, self.tmp / "out", **options)
    self.assert_nothing_left("run")
    converter.convert_checkpoint(source, self.tmp / "out", params_only=True)

  def test_no_gradients_wait(self):
    source = self.save_step(6, WRAPPERS["multi_steps_of_clip"](MAXTEXTS["adamw"]))
    converter.convert_checkpoint(source, self.tmp / "out")
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "out" / "5"))["step"], util.bits(np.int32(6)))

  @parameterized.parameters(
      ("0", "run/0: expected a step of Tunix, at least 1, found 0"),
      ("final", "step: expected the step as the name of the source's folder"),
      ("2147483648", "step: expected a step from -2147483648 to 2147483647"),
      ("9" * 30, "step: expected a step from .*, found 9{30}"),
  )
  def test_steps_that_maxtext_cannot_have(self, name, message):
    source = self.save_step(6, MAXTEXTS["adamw"])
    (source / "6").rename(source / name)
    with self.assertRaisesRegex(errors.StepError, message):
      converter.convert_checkpoint(source / name, self.tmp / "out")
    self.assert_nothing_left("run")

  @parameterized.named_parameters(
      ("no_optimizer", lambda step: shutil.rmtree(step / "optimizer_state"), "6/optimizer_state"),
      ("no_weights", lambda step: shutil.rmtree(step / "model_params"), "6/model_params"),
      ("no_metadata", lambda step: (step / "optimizer_state" / "_METADATA").unlink(), "6/optimizer_state"),
  )
  def test_an_unfinished_step(self, damage, path):
    source = self.save_step(6, MAXTEXTS["adamw"])
    damage(source / "6")
    with self.assertRaisesRegex(errors.UnfinishedCheckpointError, f"{path}: expected metadata that Orbax can read"):
      converter.convert_checkpoint(source, self.tmp / "out")
    self.assert_nothing_left("run")

  def test_weights_alone_as_tunix_saved_them_before_0_1_6(self):
    with ocp.CheckpointManager(self.tmp / "run", item_names=("model_params",)) as manager:
      args = ocp.args.PyTreeSave(tunix_tree(MAXTEXTS["adamw"])["model_params"])
      manager.save(6, args=ocp.args.Composite(model_params=args))
    for direction, top in (("auto", ["params"]), ("nnx_to_nnx", ["decoder"])):
      converter.convert_checkpoint(self.tmp / "run", self.tmp / direction, direction=direction)
      self.assertCountEqual(converter.load_checkpoint(self.tmp / direction / "5"), top)

  def test_the_other_items_of_a_step_go_along(self):
    source = self.save_step(6, MAXTEXTS["adamw"])
    (source / "6" / "iter").mkdir()
    (source / "6" / "iter" / "process_0.json").write_text("{}")
    converter.convert_checkpoint(source, self.tmp / "out")
    self.assertEqual((self.tmp / "out" / "5" / "iter" / "process_0.json").read_text(), "{}")

  def test_a_step_that_fails_verification_is_not_committed(self):
    cast = abstract_state.checked_cast
    wrong = lambda path, value, dtype: cast(path, value + (dtype == np.int32), dtype)
    source = self.save_step(6, MAXTEXTS["adamw"])
    with (
        absltest.mock.patch.object(abstract_state, "checked_cast", wrong),
        self.assertRaisesRegex(errors.VerificationError, "step: expected 6 .*, found 7"),
    ):
      converter.convert_checkpoint(source, self.tmp / "out")
    self.assert_nothing_left("run")


if __name__ == "__main__":
  absltest.main()
