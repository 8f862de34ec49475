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

"""What `orbax.checkpoint.v1` saves is converted, and it loads what is written: its public API on both sides."""

import os

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
from orbax.checkpoint.experimental import v1
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors


def current(of, name):
  """V1's function of this name; before Orbax 0.12 it was `<name>_pytree`."""
  return getattr(of, name, None) or getattr(of, f"{name}_pytree")


SAVE, LOAD = current(v1, "save"), current(v1, "load")


class OrbaxV1Test(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.linen = jax.tree.map(jax.numpy.asarray, util.linen(util.unscanned_params(2)))
    self.nnx = converter.convert_linen_to_nnx(self.linen)
    self.source, self.target = self.tmp / "in", self.tmp / "out"

  def assert_nnx(self, tree):
    self.assertEqual(util.flat(tree), util.flat(self.nnx))

  @parameterized.parameters("state", "pytree", "anything")
  def test_a_pytree(self, name):
    """V1's default name is `state`, before Orbax 0.12 `pytree`."""
    SAVE(self.source, self.linen, checkpointable_name=name)
    converter.convert_checkpoint(self.source, self.target)
    self.assertIn(
        "orbax.checkpoint", os.listdir(self.source)
    )  # The file by which v1 tells its own checkpoints from V0's.
    self.assertCountEqual(os.listdir(self.target), os.listdir(self.source))
    for abstract in (None, jax.eval_shape(lambda: self.nnx)):
      self.assert_nnx(LOAD(self.target, abstract, checkpointable_name=name))

  def test_checkpointables(self):
    beside = {"x": jax.numpy.arange(3)}
    v1.save_checkpointables(self.source, {"state": self.linen, "beside": beside}, custom_metadata={"note": [1]})
    self.assertIn("; with beside", converter.convert_checkpoint(self.source, self.target).summary())
    found, metadata = v1.load_checkpointables(self.target), v1.checkpointables_metadata(self.target)
    self.assert_nnx(found["state"])
    self.assertEqual(util.flat(found["beside"]), util.flat(beside))
    self.assertEqual(metadata.custom_metadata["note"], [1])
    described = lambda tree: util.flat(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree))
    self.assertEqual(
        {name: described(tree) for name, tree in metadata.metadata.items()},
        {"state": described(self.nnx), "beside": described(beside)},
    )

  def test_the_steps_of_a_run(self):
    with v1.training.Checkpointer(self.source) as checkpointer:
      save = current(checkpointer, "save")
      save(0, jax.tree.map(jax.numpy.zeros_like, self.linen))
      save(3, self.linen, metrics={"loss": 0.5}, custom_metadata={"note": 1})
    converter.convert_checkpoint(self.source, self.target)
    with v1.training.Checkpointer(self.target) as checkpointer:
      load, save = current(checkpointer, "load"), current(checkpointer, "save")
      self.assert_nnx(load())
      self.assert_nnx(load(3, jax.eval_shape(lambda: self.nnx)))
      metadata = checkpointer.checkpointables_metadata()
      self.assertEqual((metadata.step, metadata.metrics, metadata.custom_metadata["note"]), (3, {"loss": 0.5}, 1))
      save(4, self.nnx)  # The run goes on.
      self.assertEqual([each.step for each in checkpointer.checkpoints], [3, 4])

  def test_the_state_becomes_items_for_a_release(self):
    with v1.training.Checkpointer(self.source) as checkpointer:
      checkpointer.save_checkpointables(4, {"state": self.linen, "dataset": {"cursor": jax.numpy.arange(2)}})
    conversion = converter.convert_checkpoint(self.source, self.target, maxtext_release="0.2.5")
    self.assertEqual(os.fspath(conversion.target), str(self.target / "4" / "items"))
    self.assertIn("; with dataset", conversion.summary())
    found = v1.load_checkpointables(self.target / "4")
    self.assertEqual(list(found["dataset"]["cursor"]), [0, 1])
    self.assertEqual(util.flat(found["items"]), util.flat(converter.load_checkpoint(self.target)))

  def test_what_v0_framed_is_loaded(self):
    """A step of MaxText's, and a pytree that stands alone: neither has v1's file."""
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    converter.convert_checkpoint(source, self.target)
    expected = util.flat(converter.convert_linen_to_nnx(converter.load_checkpoint(source)))
    with v1.training.Checkpointer(self.target) as checkpointer:
      self.assertEqual(util.flat(checkpointer.load_checkpointables()["items"]), expected)
    converter.convert_checkpoint(self.save("alone", self.linen), self.tmp / "alone_out")
    self.assert_nnx(LOAD(self.tmp / "alone_out", checkpointable_name=None))

  @parameterized.parameters((False, True), (False, False), (True, False))
  @pytest.mark.integration
  def test_storage_formats(self, use_ocdbt, use_zarr3):
    saving = v1.options.ArrayOptions.Saving(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with v1.Context(array_options=v1.options.ArrayOptions(saving=saving)):
      SAVE(self.source, self.linen, checkpointable_name="state")
    converter.convert_checkpoint(self.source, self.target)
    self.assertEqual((self.target / "state" / "manifest.ocdbt").exists(), use_ocdbt)
    self.assert_nnx(LOAD(self.target, checkpointable_name="state"))

  def test_a_partial_save(self):
    """Each part has the metadata of a checkpoint of its own; converting one would lose the others."""
    save = current(v1.partial, "save")
    save(self.source, {"params": self.linen["params"]})
    save(self.source, {name: tree for name, tree in self.linen.items() if name != "params"})
    parts = self.tmp / "in.partial_save"
    for path in (parts, *parts.iterdir(), *parts.glob("*/*/")):
      with self.assertRaisesRegex(errors.UnfinishedCheckpointError, "expected a finished checkpoint"):
        converter.convert_checkpoint(path, self.target)
    v1.partial.finalize(self.source)
    converter.convert_checkpoint(self.source, self.target)
    self.assert_nnx(v1.load_checkpointables(self.target).popitem()[1])


if __name__ == "__main__":
  absltest.main()
