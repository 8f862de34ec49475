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

"""Paths, and what goes wrong with them: spellings, refusals, failures half way, overwriting."""

import itertools
import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan


class PathsTest(util.CheckpointTestCase):
  """The spellings of a path, and what they turn into."""

  def setUp(self):
    super().setUp()
    self.checkpoints = self.tmp / "run" / "checkpoints"
    shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.checkpoints)
    shutil.copytree(self.checkpoints / "2", self.checkpoints / "10")

  @parameterized.parameters(
      ("run/checkpoints", "out", "out/10/items"),
      ("run/checkpoints/", "out/", "out/10/items"),
      ("run/checkpoints/2", "out", "out/2/items"),
      ("run/checkpoints/2/items", "out", "out/2/items"),
      ("run/checkpoints/2", "out/7", "out/7/2/items"),
      ("run/checkpoints/2/items", "out/2/items", "out/2/items"),
      ("run/checkpoints/2", "a folder/ünï cödé", "a folder/ünï cödé/2/items"),
  )
  @pytest.mark.integration
  def test_spellings(self, source, target, items):
    # Joined as text, to keep a trailing slash.
    conversion = converter.convert_checkpoint(f"{self.tmp}/{source}", f"{self.tmp}/{target}")
    self.assertEqual(os.fspath(conversion.target), os.path.realpath(self.tmp / items))
    self.assertTrue((self.tmp / items / "_METADATA").exists())
    self.assertTrue((self.tmp / items).parent.joinpath("_CHECKPOINT_METADATA").exists())

  def test_a_flat_pytree_stays_flat(self):
    source = self.save("flat", {"params": {"params": {"w": util.array(2)}}})
    converter.convert_checkpoint(source, self.tmp / "out")
    self.assertTrue((self.tmp / "out" / "_METADATA").exists())
    self.assertIn("linen_nnx_converter", (self.tmp / "out" / "_CHECKPOINT_METADATA").read_text())

  def test_relative_paths_and_symbolic_links(self):
    (self.tmp / "link").symlink_to(self.checkpoints)
    self.addCleanup(os.chdir, os.getcwd())
    os.chdir(self.tmp)
    converter.convert_checkpoint("link", "out")
    self.assertTrue((self.tmp / "out" / "10" / "items" / "_METADATA").exists())

  @parameterized.parameters("run/checkpoints", "run/checkpoints/12", "run/checkpoints/12/items")
  def test_a_link_to_a_step_gives_it_its_number(self, source):
    """As to Orbax, whatever the folder is called to which it leads."""
    (self.checkpoints / "10").rename(self.tmp / "2000")
    (self.checkpoints / "12").symlink_to(self.tmp / "2000")
    for target in ("out", "out/12"):
      with self.subTest(target):
        converter.convert_checkpoint(self.tmp / source, self.tmp / target)
        self.assertEqual(os.listdir(self.tmp / "out"), ["12"])
        self.assertTrue((self.tmp / "out" / "12" / "items" / "_METADATA").exists())
        shutil.rmtree(self.tmp / "out")

  def test_a_link_of_another_name_leaves_a_step_its_number(self):
    (self.tmp / "best").symlink_to(self.checkpoints / "2")
    (self.tmp / "7").symlink_to(self.checkpoints)
    for source, step in (("best", "2"), ("best/items", "2"), ("7", "10")):
      conversion = converter.convert_checkpoint(self.tmp / source, self.tmp / "out", overwrite=True)
      self.assertEqual(os.fspath(conversion.target), os.fspath(self.tmp / "out" / step / "items"))

  def test_an_existing_target_is_refused(self):
    converter.convert_checkpoint(self.checkpoints, self.tmp / "out")
    before = util.snapshot(self.tmp / "out")
    with self.assertRaisesRegex(errors.TargetError, "out/10: expected nothing there yet, found an existing path"):
      converter.convert_checkpoint(self.checkpoints, self.tmp / "out")
    self.assertEqual(util.snapshot(self.tmp / "out"), before)
    converter.convert_checkpoint(self.checkpoints / "2", self.tmp / "out")  # Another step beside it is no overwriting.
    self.assertCountEqual(os.listdir(self.tmp / "out"), ["2", "10"])

  def test_an_empty_folder_is_no_existing_target(self):
    (self.tmp / "out").mkdir()
    converter.convert_checkpoint(self.save("flat", {"params": {"params": {"w": util.array(2)}}}), self.tmp / "out")
    self.assertTrue((self.tmp / "out" / "_METADATA").exists())

  @pytest.mark.integration
  def test_overwrite(self):
    converter.convert_checkpoint(self.checkpoints, self.tmp / "out", scan_layers=False)
    converter.convert_checkpoint(self.checkpoints, self.tmp / "out", overwrite=True)
    self.assertIn("layers", converter.load_checkpoint(self.tmp / "out")["model"]["decoder"])
    self.assertCountEqual(os.listdir(self.tmp / "out"), ["10"])

  def test_a_failed_overwrite_leaves_the_old_target(self):
    converter.convert_checkpoint(self.checkpoints, self.tmp / "out")
    before = util.snapshot(self.tmp / "out")
    with self.break_writing(), self.assertRaisesRegex(OSError, "No space left"):
      converter.convert_checkpoint(self.checkpoints, self.tmp / "out", overwrite=True, scan_layers=False)
    self.assertEqual(util.snapshot(self.tmp / "out"), before)
    self.assertCountEqual(os.listdir(self.tmp / "out"), ["10"])

  @parameterized.parameters("out", "new/folders/out", "run/other")
  def test_a_failure_leaves_nothing(self, target):
    before = util.files(self.tmp)
    with self.break_writing(), self.assertRaisesRegex(OSError, "No space left"):
      converter.convert_checkpoint(self.checkpoints, self.tmp / target, scan_layers=False)
    self.assertEqual(util.files(self.tmp), before)

  def test_a_target_that_fails_verification_is_not_committed(self):
    """A write that does not write what it should, which only re-reading can notice."""
    cast = plan.Part.piece

    def flipped(part, region, data):
      region, values = cast(part, region, data)
      if "wo" in part.target and "mu" in part.target:
        values = np.array(values)
        values.reshape(-1).view(np.uint8)[-1] ^= 1
      return region, values

    before = util.files(self.tmp)
    with absltest.mock.patch.object(plan.Part, "piece", flipped):
      with self.assertRaisesRegex(
          errors.VerificationError, r"opt_state/0/mu/decoder/layers/./mlp/wo/kernel: .* at index \(63, 31\)"
      ):
        converter.convert_checkpoint(self.checkpoints, self.tmp / "out", scan_layers=False)
      self.assertEqual(util.files(self.tmp), before)
      converter.convert_checkpoint(self.checkpoints, self.tmp / "out", scan_layers=False, verify=False)

  @parameterized.parameters(
      ("run/checkpoints", "run/checkpoints"),
      ("run/checkpoints/2", "run/checkpoints/2"),
      ("run/checkpoints/2", "run/checkpoints"),
      ("run/checkpoints", "run/checkpoints/converted"),
      ("run/checkpoints/2/items", "run/checkpoints/2/items/nnx"),
      ("run/checkpoints", "run"),
  )
  def test_a_target_that_overlaps_the_source_is_refused(self, source, target):
    before = util.snapshot(self.tmp)
    with self.assertRaisesRegex(errors.TargetError, "expected a target apart from the source"):
      converter.convert_checkpoint(self.tmp / source, self.tmp / target, overwrite=True)
    self.assertEqual(util.snapshot(self.tmp), before)

  def test_a_target_that_cannot_be_written_is_refused(self):
    (self.tmp / "file").write_text("")
    with self.assertRaisesRegex(errors.TargetError, "expected a place that can be written, found .*/file"):
      converter.convert_checkpoint(self.checkpoints, self.tmp / "file" / "out")

  @parameterized.parameters("", "~", "~/target")
  def test_a_path_that_a_shell_was_to_make(self, path):
    """An unset variable would be the working directory, and `--target_path=~/x` a folder named `~` in it."""
    for look in (inspector.inspect_checkpoint, lambda path: converter.convert_checkpoint(self.checkpoints, path)):
      with self.assertRaisesRegex(errors.ConversionError, "expected a path"):
        look(path)

  def test_the_root_is_a_path(self):
    with self.assertRaisesRegex(errors.NotACheckpointError, "^/: expected an Orbax checkpoint"):
      inspector.inspect_checkpoint("/")

  def test_no_source(self):
    with self.assertRaisesRegex(errors.SourceNotFoundError, "nowhere: expected a checkpoint, found nothing"):
      converter.convert_checkpoint(self.tmp / "nowhere", self.tmp / "out")

  @parameterized.parameters("run", "run/checkpoints/2/_CHECKPOINT_METADATA")
  def test_no_checkpoint(self, source):
    with self.assertRaisesRegex(errors.NotACheckpointError, "expected an Orbax checkpoint of a pytree"):
      converter.convert_checkpoint(self.tmp / source, self.tmp / "out")

  def test_several_pytrees_are_refused(self):
    for name in ("actor", "critic"):
      self.save(f"step/{name}", {"params": {"params": {"w": util.array(2)}}})
    with self.assertRaisesRegex(errors.NotACheckpointError, "expected one pytree, .* found actor, critic"):
      converter.convert_checkpoint(self.tmp / "step", self.tmp / "out")

  def test_two_folders_of_the_latest_step_are_refused(self):
    (self.checkpoints / "2").rename(self.checkpoints / "010")
    with self.assertRaisesRegex(errors.NotACheckpointError, "one folder of the latest step, 10, found 0?10 and 0?10"):
      converter.convert_checkpoint(self.checkpoints, self.tmp / "out")
    converter.convert_checkpoint(self.checkpoints / "010", self.tmp / "out", dry_run=True)

  def test_a_summary_is_one_line(self):
    conversion = converter.convert_checkpoint(self.checkpoints, self.tmp / "a\nb", verify="full")
    audit = converter.verify_checkpoint(self.tmp / "a\nb")
    for summary in (conversion.summary(), audit.summary()):
      self.assertLen(summary.splitlines(), 1)

  @parameterized.named_parameters(
      ("temporary", lambda c: (c / "2").rename(c.parent / "2.orbax-checkpoint-tmp"), "run/2.orbax-checkpoint-tmp"),
      ("no_metadata", lambda c: (c / "2" / "items" / "_METADATA").unlink(), "run/checkpoints/2/items"),
      ("no_manifest", lambda c: (c / "2" / "items" / "manifest.ocdbt").unlink(), "run/checkpoints/2"),
      ("no_data", lambda c: shutil.rmtree(c / "2" / "items" / "d"), "run/checkpoints/2"),
      ("bad_json", lambda c: (c / "2" / "items" / "_METADATA").write_text("{"), "run/checkpoints/2"),
  )
  def test_an_unfinished_checkpoint(self, damage, source):
    damage(self.checkpoints)
    with self.assertRaises(errors.UnfinishedCheckpointError):
      converter.convert_checkpoint(self.tmp / source, self.tmp / "out")
    self.assertFalse((self.tmp / "out").exists())

  def test_a_truncated_data_file(self):
    largest = max((self.checkpoints / "2" / "items" / "ocdbt.process_0" / "d").iterdir(), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    before = util.files(self.tmp)
    with self.assertRaisesRegex(errors.DamagedSourceError, "should have at least [0-9]+ bytes, found [0-9]+ bytes"):
      converter.convert_checkpoint(self.checkpoints / "2", self.tmp / "out")
    self.assertEqual(util.files(self.tmp), before)

  def break_writing(self):
    """Lets the disk fill up half way: the tenth block cannot be written."""
    blocks = itertools.count()
    piece = plan.Part.piece

    def failing(part, region, data):
      if next(blocks) == 10:
        raise OSError(28, "No space left on device")
      return piece(part, region, data)

    return absltest.mock.patch.object(plan.Part, "piece", failing)


if __name__ == "__main__":
  absltest.main()
