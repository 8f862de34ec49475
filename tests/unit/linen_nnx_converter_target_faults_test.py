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

"""Targets that exist, are in use, are named oddly or taken meanwhile, and signals: one clear line, nothing unfinished."""

import asyncio
import contextlib
import errno
import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_faults_test as faults
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import by_reference
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import durable
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import folders
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer

MODULE = "maxtext.checkpoint_conversion.linen_nnx_converter"


class TargetTest(faults.FaultTestCase):
  """Places that are strange, and others who want the same one."""

  @pytest.mark.integration
  def test_another_conversion_to_the_same_target(self):
    """The second one is refused at once; the first one is not disturbed."""
    refusals = []
    real = by_reference.bring

    async def bring(*args, **kwargs):
      await real(*args, **kwargs)
      for overwrite in (False, True):
        with self.assertRaises(errors.TargetError) as caught:
          converter.convert_checkpoint(self.source, self.tmp / "out", overwrite=overwrite)
        refusals.append(str(caught.exception))

    with absltest.mock.patch.object(by_reference, "bring", bring):
      converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assertNotEmpty(refusals)
    for refusal in refusals:
      self.assertRegex(refusal, "out: expected no other conversion to it, found one under way in .*")
    self.assert_nothing_left("unscanned", "out")

  def test_somebody_else_takes_the_place_meanwhile(self):
    def occupy():
      (self.tmp / "out").mkdir()
      (self.tmp / "out" / "file").write_text("mine")

    real = orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_occupy(folder):
        before_commit(folder)
        occupy()

      real(*args, before_commit=and_occupy, **kwargs)

    with (
        absltest.mock.patch.object(orbax_writer, "save", save),
        self.assertRaisesRegex(errors.TargetError, "out: expected nothing there yet"),
    ):
      converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assertEqual((self.tmp / "out" / "file").read_text(), "mine")
    self.assert_nothing_left("unscanned", "out")

  def test_what_a_killed_run_left_is_removed(self):
    leftover = self.tmp / f"out{atomic_target.SUFFIX}"
    (leftover / "out.orbax-checkpoint-tmp").mkdir(parents=True)
    (leftover / "out.orbax-checkpoint-tmp" / "file").write_text("half")
    foreign = self.tmp / "out.orbax-checkpoint-tmp"
    foreign.mkdir()  # A trainer's, perhaps: not ours to remove.
    converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assert_nothing_left("unscanned", "out", foreign.name)

  def test_an_empty_one_is_removed_even_where_the_target_is_there_already(self):
    converter.convert_checkpoint(self.source, self.tmp / "out")
    (self.tmp / f"out{atomic_target.SUFFIX}").mkdir()
    converter.convert_checkpoint(self.source, self.tmp / "other")
    with self.assertRaisesRegex(errors.TargetError, "expected nothing there yet"):
      converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assert_nothing_left("unscanned", "out", "other")

  def test_a_dry_run_removes_nothing(self):
    (self.tmp / f"out{atomic_target.SUFFIX}").mkdir()
    converter.convert_checkpoint(self.source, self.tmp / "out", dry_run=True)
    self.assert_nothing_left("unscanned", f"out{atomic_target.SUFFIX}")

  @parameterized.parameters(False, True)
  def test_where_folders_cannot_change_places(self, is_killed):
    """On other systems than Linux: the old one is moved away first, and comes back if the run ends there."""
    converter.convert_checkpoint(self.source, self.tmp / "out")
    before = util.snapshot(self.tmp / "out")
    real, killed = os.rename, []

    def rename(old, new):
      if is_killed and os.fspath(new) == str(self.tmp / "out") and not killed:
        killed.append(True)
        raise KeyboardInterrupt
      real(old, new)

    no_exchange = absltest.mock.patch.object(folders, "exchange", lambda *_: False)
    with no_exchange, absltest.mock.patch.object(os, "rename", rename):
      if is_killed:
        with self.assertRaises(KeyboardInterrupt):
          converter.convert_checkpoint(self.source, self.tmp / "out", overwrite=True)
        self.assertEqual(util.snapshot(self.tmp / "out"), before)
      else:
        converter.convert_checkpoint(self.source, self.tmp / "out", overwrite=True)
        self.assertNotEqual(util.snapshot(self.tmp / "out"), before)
    self.assert_nothing_left("unscanned", "out")

  def test_an_old_checkpoint_that_a_killed_run_moved_away_comes_back(self):
    converter.convert_checkpoint(self.source, self.tmp / "out")
    before = util.snapshot(self.tmp / "out")
    leftover = self.tmp / f"out{atomic_target.SUFFIX}"
    leftover.mkdir()
    (self.tmp / "out").rename(leftover / "out.replaced")
    with self.assertRaisesRegex(errors.TargetError, "expected nothing there yet"):
      converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assertEqual(util.snapshot(self.tmp / "out"), before)
    self.assert_nothing_left("unscanned", "out")

  def test_a_symbolic_link(self):
    """The target is where the link leads to, whether there is something or not."""
    (self.tmp / "link").symlink_to(self.tmp / "real")
    for _ in range(2):
      conversion = converter.convert_checkpoint(self.source, self.tmp / "link", overwrite=True)
      self.assertEqual(os.fspath(conversion.target), str(self.tmp / "real"))
    self.assertTrue((self.tmp / "link").is_symlink())
    self.assert_nothing_left("unscanned", "link", "real")

  def test_a_symbolic_link_into_the_source(self):
    (self.tmp / "link").symlink_to(self.source / "inside")
    self.assert_refused(errors.TargetError, "expected a target apart from the source", target="link")

  @parameterized.parameters("x" * 256, "x" * 230, "ü" * 128, "/".join(["x" * 200] * 25))
  def test_a_path_that_is_too_long(self, name):
    self.assert_refused(errors.TargetError, "expected a name that leaves room .*, found File name too long", target=name)

  @parameterized.parameters("with spaces", "ünï cödé 模型", "x" * 200, "new\nline")
  def test_a_strange_name(self, name):
    for _ in range(2):
      converter.convert_checkpoint(self.source, f"{self.tmp}/{name}/", overwrite=True)
    converter.load_checkpoint(self.tmp / name)
    self.assert_nothing_left("unscanned", name)

  def test_a_file_in_the_place(self):
    (self.tmp / "out").write_text("a file")
    self.assert_refused(errors.TargetError, "expected nothing there yet")
    with self.assertRaisesRegex(errors.TargetError, "out: expected one checkpoint to replace, .* found a file"):
      converter.convert_checkpoint(self.source, self.tmp / "out", overwrite=True)
    self.assertEqual((self.tmp / "out").read_text(), "a file")

  def test_failures_of_two_that_share_new_parents(self):
    """Who fails removes the parents that it made, unless somebody uses them."""
    real = by_reference.bring

    async def bring(*args, **kwargs):
      if "first" in os.fspath(args[1]):
        await asyncio.to_thread(converter.convert_checkpoint, self.source, self.tmp / "new" / "second")
        raise OSError(errno.ENOSPC, "No space left on device")
      await real(*args, **kwargs)

    with absltest.mock.patch.object(by_reference, "bring", bring), self.assertRaisesRegex(OSError, "No space left"):
      converter.convert_checkpoint(self.source, self.tmp / "new" / "first")
    converter.load_checkpoint(self.tmp / "new" / "second")
    self.assertCountEqual(os.listdir(self.tmp / "new"), ["second"])


class PowerCutTest(faults.FaultTestCase):
  """What the disk must have before the target gets its name."""

  @parameterized.parameters(*itertools.product(("link", "copy"), (None, False)))
  def test_everything_is_on_the_disk_before_the_target_appears(self, copy_mode, scan_layers):
    synced, at_the_rename = set(), []
    real_sync, real_put = os.fsync, atomic_target._put  # pylint: disable=protected-access

    def fsync(descriptor):
      synced.add(os.readlink(f"/proc/self/fd/{descriptor}"))
      real_sync(descriptor)

    def put(new, final, overwrite):
      at_the_rename.extend(os.path.relpath(path, new) for path in synced if path.startswith(os.fspath(new)))
      real_put(new, final, overwrite)

    self.enter_context(absltest.mock.patch.object(os, "fsync", fsync))
    self.enter_context(absltest.mock.patch.object(atomic_target, "_put", put))
    converter.convert_checkpoint(self.source, self.tmp / "out", copy_mode=copy_mode, scan_layers=scan_layers)
    made = {os.path.relpath(path, self.tmp / "out") for path in (self.tmp / "out").rglob("*")} | {"."}
    self.assertEqual(made - set(at_the_rename), set())
    self.assertIn(str(self.tmp), synced)

  @parameterized.parameters(0, 1, 1000, 5000)
  def test_copies_by_any_system(self, nbytes):
    content = os.urandom(nbytes)
    (self.tmp / "file").write_bytes(content)
    another_file_system = OSError(errno.EXDEV, os.strerror(errno.EXDEV))
    for effect in ({"wraps": os.copy_file_range}, {"side_effect": another_file_system}, {"return_value": 0}):
      with (
          absltest.mock.patch.object(os, "copy_file_range", **effect),
          absltest.mock.patch.object(durable, "_PIECE_BYTES", 1000),
      ):
        durable.copy(self.tmp / "file", self.tmp / "copy")
      self.assertEqual((self.tmp / "copy").read_bytes(), content)
    with (
        absltest.mock.patch.object(os, "copy_file_range", side_effect=OSError(errno.ENOSPC, "full")),
        self.assertRaisesRegex(OSError, "full"),
    ):
      durable.copy(self.tmp / "file", self.tmp / "copy")

  def test_a_disk_that_loses_what_it_was_given(self):
    def fsync(descriptor):
      if os.readlink(f"/proc/self/fd/{descriptor}").endswith("_METADATA"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with absltest.mock.patch.object(os, "fsync", fsync), self.assertRaisesRegex(OSError, "Input/output error"):
      converter.convert_checkpoint(self.source, self.tmp / "out")
    self.assert_nothing_left("unscanned")


@pytest.mark.integration
class SignalTest(faults.FaultTestCase):

  def test_a_clean_stop(self):
    """Of a conversion in a background job that waits for a lock, so that it is sure to be under way."""
    with folders.locked(self.tmp, wait=True):
      command = [sys.executable, "-m", MODULE, f"--source_path={self.source}", f"--target_path={self.tmp}/out"]
      command = ["sh", "-c", 'trap "" INT; exec "$@"', "sh", *command]
      process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
      while process.poll() is None and not any(str(self.tmp) in open_files(pid) for pid in children(process)):
        time.sleep(0.05)
      process.send_signal(signal.SIGTERM)
      out, err = process.communicate(timeout=60)
    self.assertEqual((process.returncode, out), (130, ""))
    self.assertEqual(err, f"linen_nnx_converter: interrupted: nothing was left at {self.tmp}/out.\n")
    self.assert_nothing_left("unscanned")


def children(process):
  """A process's children: in one of them the command works."""
  return pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def open_files(pid):
  """What a process has open, as far as it stays open meanwhile."""
  names = set()
  for descriptor in pathlib.Path(f"/proc/{pid}/fd").iterdir():
    with contextlib.suppress(FileNotFoundError):
      names.add(os.path.realpath(descriptor))
  return names


if __name__ == "__main__":
  absltest.main()
