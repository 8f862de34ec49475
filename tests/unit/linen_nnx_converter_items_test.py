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

"""Steps whose items are not MaxText's: its training engine's and emergency checkpoints."""

import json
import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

ENGINE = util.FIXTURES / "training_engine"
EMERGENCY = util.FIXTURES / "emergency"
LINEN = {"params": {"params": {"decoder": {"norm": {"scale": util.array(4)}}}}, "step": np.array(5, np.int32)}
OTHER = {"cursor": util.array(2)}


class TrainingEngineTest(util.CheckpointTestCase):
  """What MaxText 0.2.5's training engine saves."""

  def test_a_complete_step(self):
    """Its folder 2 has two updates, which MaxText's trainers have in folder 1."""
    conversion = converter.convert_checkpoint(ENGINE / "complete", self.tmp / "out")
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / "1" / "items"))
    self.assertIn("; with accumulated_metrics", conversion.summary())
    state = converter.load_checkpoint(self.tmp / "out")
    self.assertEqual(
        (int(state["step"]), int(state["opt_state"][0]["count"]), int(state["opt_state"][2]["count"])), (2, 2, 2)
    )
    given = converter.load_checkpoint(ENGINE / "complete" / "2" / "accumulated_metrics")
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "out" / "1" / "accumulated_metrics")), util.flat(given)
    )

  @parameterized.parameters("", "3")
  def test_a_step_that_is_under_way(self, path):
    source = ENGINE / "inside_a_step" / path
    message = "/3: expected a complete step, found micro_step_count 1, accumulated_grads: .*with --params_only"
    for options in ({}, {"dry_run": True}, {"maxtext_release": "0.2.5"}):
      with self.assertRaisesRegex(errors.StepError, message):
        converter.convert_checkpoint(source, self.tmp / "out", **options)
    self.assert_nothing_left()

  def test_its_gradients_are_no_weights(self):
    with self.assertRaisesRegex(
        errors.NotACheckpointError, "/accumulated_grads: expected a train state, found the gradients"
    ):
      converter.convert_checkpoint(ENGINE / "inside_a_step" / "3" / "accumulated_grads", self.tmp / "out")
    self.assert_nothing_left()

  @parameterized.parameters(("", {"params_only": True}), ("3/model_params", {}))
  @pytest.mark.integration
  def test_its_weights_alone(self, path, options):
    """Those after two updates, of which the gradients that wait are no part."""
    conversion = converter.convert_checkpoint(ENGINE / "inside_a_step" / path, self.tmp / "out", **options)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / "1" / "items"))
    self.assertIn(
        "; weights after 2 updates, from inside a step, whose micro_step_count 1, accumulated_grads are left out",
        conversion.summary(),
    )
    self.assertCountEqual(
        os.listdir(self.tmp / "out" / "1"), ["_CHECKPOINT_METADATA", "commit_success.txt", "items", "accumulated_metrics"]
    )
    converter.convert_checkpoint(ENGINE / "complete", self.tmp / "complete", params_only=True)
    self.assertEqual(*(util.flat(converter.load_checkpoint(self.tmp / name)) for name in ("out", "complete")))

  @parameterized.named_parameters(
      ("by_the_gradients", lambda step: edit(step, lambda custom: custom.pop("micro_step_count")), "accumulated_grads"),
      ("by_the_count", lambda step: shutil.rmtree(step / "accumulated_grads"), "micro_step_count 1"),
      (
          "by_a_strange_count",
          lambda step: edit(step, lambda custom: custom.update(micro_step_count="1")),
          "micro_step_count 1",
      ),
  )
  def test_it_is_told(self, change, found):
    shutil.copytree(ENGINE / "inside_a_step", self.tmp / "in")
    change(self.tmp / "in" / "3")
    with self.assertRaisesRegex(errors.StepError, f"/3: expected a complete step, found {found}"):
      converter.convert_checkpoint(self.tmp / "in", self.tmp / "out")

  def test_inside_the_first_step(self):
    shutil.copytree(ENGINE / "inside_a_step" / "3", self.tmp / "in" / "1")
    with self.assertRaisesRegex(errors.StepError, "in/1: expected a step of Tunix, at least 1, found 0"):
      converter.convert_checkpoint(self.tmp / "in", self.tmp / "out", params_only=True)


def edit(step, change):
  path = step / "_CHECKPOINT_METADATA"
  document = json.loads(path.read_text())
  change(document["custom_metadata"])
  path.write_text(json.dumps(document))


class StateTest(util.CheckpointTestCase):
  """Train states in an item that is not `items`."""

  def save_step(self, name, **items):
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
      args = {item: ocp.args.PyTreeSave(tree) for item, tree in items.items()}
      checkpointer.save(self.tmp / name, args=ocp.args.Composite(**args))
    return self.tmp / name

  @parameterized.product(
      source=("maxtext-0.2.4", "maxtext-0.2.5"), release=(None, "0.2.4", "0.2.5"), path=("", "2", "2/state")
  )
  def test_an_emergency_checkpoint(self, source, release, path):
    options = {"maxtext_release": release} if release else {}
    conversion = converter.convert_checkpoint(EMERGENCY / source / path, self.tmp / "out", dry_run=True, **options)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / "2" / ("items" if release else "state")))

  def test_it_becomes_items(self):
    source = EMERGENCY / "maxtext-0.2.5"
    converter.convert_checkpoint(source, self.tmp / "out", maxtext_release="0.2.5")
    self.assertEqual(*(util.flat(converter.load_checkpoint(path)) for path in (self.tmp / "out" / "2" / "items", source)))
    metadata = json.loads((self.tmp / "out" / "2" / "_CHECKPOINT_METADATA").read_text())
    self.assertEqual(list(metadata["item_handlers"]), ["items"])
    self.assertCountEqual(os.listdir(self.tmp / "out" / "2"), ["_CHECKPOINT_METADATA", "commit_success.txt", "items"])

  @parameterized.parameters("state", "pytree", "default", "items")
  @pytest.mark.integration
  def test_beside_other_items(self, name):
    self.save_step("in/4", **{name: LINEN, "dataset": OTHER, "another": OTHER})
    conversion = converter.convert_checkpoint(self.tmp / "in", self.tmp / "out")
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / "4" / name))
    self.assertIn("; with another, dataset", conversion.summary())
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "out" / "4" / "dataset")), util.flat(OTHER))

  @parameterized.parameters(({"state": LINEN, "pytree": LINEN},), ({"actor": LINEN, "dataset": OTHER},))
  def test_which_is_meant_is_not_guessed(self, items):
    self.save_step("in/4", **items)
    with self.assertRaisesRegex(
        errors.NotACheckpointError, f"in/4: expected one pytree, .*found {', '.join(sorted(items))}"
    ):
      converter.convert_checkpoint(self.tmp / "in", self.tmp / "out")
    for name in items:
      if items[name] is LINEN:
        converter.convert_checkpoint(self.tmp / "in" / "4" / name, self.tmp / f"of {name}")
        self.assertIn("model", converter.load_checkpoint(self.tmp / f"of {name}" / "4" / name))

  def test_items_beside_the_state_that_becomes_items(self):
    self.save_step("in/4", state=LINEN, items=LINEN)
    source = self.tmp / "in" / "4" / "state"
    with self.assertRaisesRegex(errors.TargetError, "in/4/items: expected no other item"):
      converter.convert_checkpoint(source, self.tmp / "out", maxtext_release="0.2.5")
    converter.convert_checkpoint(source, self.tmp / "out")
    self.assertCountEqual(
        os.listdir(self.tmp / "out" / "4"), ["_CHECKPOINT_METADATA", "commit_success.txt", "state", "items"]
    )

  def test_a_pytree_that_stands_alone_stays_alone(self):
    conversion = converter.convert_checkpoint(self.save("in", LINEN), self.tmp / "out", maxtext_release="0.2.5")
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out"))


if __name__ == "__main__":
  absltest.main()
