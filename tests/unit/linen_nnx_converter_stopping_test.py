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

"""Stops: by signals, at any moment and many at once, of the command and of its processes; what is said is true."""

import contextlib
import errno
import io
import os
import pathlib
import signal
import subprocess
import sys
import time

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target

# What supervises and what makes room for a target, without what a conversion imports: a file, and then a long wait.
SCRIPT = """
import sys, time
from etils import epath
from maxtext.checkpoint_conversion.linen_nnx_converter.command import stopping, streams
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target

def work(announce):
  with atomic_target.staged(epath.Path(sys.argv[1]), check_free=lambda: None, announce=announce) as path:
    path.mkdir()
    (path / "file").write_text("new")
    streams.show("making")
    time.sleep(float(sys.argv[2]))
  streams.show("made")
  time.sleep(float(sys.argv[3]))
  return 0

sys.exit(stopping.supervise(work))
"""
IN_A_BACKGROUND_JOB = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")  # As a shell without job control starts them.


def start(*command):
  """Starts a command as from a terminal, even if the tests run in the background, where SIGINT and SIGHUP are ignored."""
  handlers = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
  try:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)


def child_of(process) -> int:
  """The process in which the command works."""
  children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
  while not children.read_text().split():
    time.sleep(0.01)
  return int(children.read_text().split()[0])


def has_ended(pid) -> bool:
  """Whether a process does nothing any more; nobody may have asked for its exit code yet."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
  except (FileNotFoundError, ProcessLookupError):
    return True


@pytest.mark.integration
class SuperviseTest(util.CheckpointTestCase):

  def make(self, *, shell=(), making=60, then=0, target="parent/out"):
    """Begins to make a target, and returns when it is half made, or with `making=0` when it is there."""
    process = start(*shell, sys.executable, "-c", SCRIPT, str(self.tmp / target), str(making), str(then))
    for line in ("making\n",) if making else ("making\n", "made\n"):
      self.assertEqual(process.stdout.readline(), line)
    return process

  def end(self, process):
    """The exit code, and what it said in the end."""
    out, err = process.communicate(timeout=60)
    self.assertEqual(out, "")
    self.assertStartsWith(err, "linen_nnx_converter: ")
    self.assertLen(err.splitlines(), 1)
    return process.returncode, err.removeprefix("linen_nnx_converter: ").strip()

  @parameterized.parameters(
      (signal.SIGINT, ()), (signal.SIGTERM, ()), (signal.SIGHUP, ()), (signal.SIGTERM, IN_A_BACKGROUND_JOB)
  )
  def test_a_stop(self, number, shell):
    process = self.make(shell=shell)
    process.send_signal(number)
    self.assertEqual(self.end(process), (130, f"interrupted: nothing was left at {self.tmp}/parent/out."))
    self.assertEqual(os.listdir(self.tmp), [])

  def test_ctrl_c_does_not_stop_a_background_job(self):
    process = self.make(shell=IN_A_BACKGROUND_JOB)
    process.send_signal(signal.SIGINT)
    with self.assertRaises(subprocess.TimeoutExpired):
      process.wait(timeout=0.3)
    process.terminate()
    self.assertEqual(self.end(process)[0], 130)

  def test_many_signals(self):
    process = self.make()
    for i in range(10):
      with contextlib.suppress(ProcessLookupError):
        process.send_signal((signal.SIGINT, signal.SIGTERM)[i % 2])
      time.sleep(0.01)
    self.assertEqual(self.end(process), (130, f"interrupted: nothing was left at {self.tmp}/parent/out."))
    self.assertEqual(os.listdir(self.tmp), [])

  def test_what_stood_there_stays(self):
    (self.tmp / "out").mkdir()
    (self.tmp / "out" / "file").write_text("old")
    process = self.make(target="out")
    process.send_signal(signal.SIGTERM)
    self.assertEqual(self.end(process), (130, f"interrupted: {self.tmp}/out is what it was."))
    self.assertEqual((self.tmp / "out" / "file").read_text(), "old")
    self.assertEqual(os.listdir(self.tmp), ["out"])

  @parameterized.parameters(False, True)
  def test_after_the_commit(self, overwrite):
    if overwrite:
      (self.tmp / "parent" / "out").mkdir(parents=True)
      (self.tmp / "parent" / "out" / "file").write_text("old")
    process = self.make(making=0, then=60)
    process.send_signal(signal.SIGTERM)
    self.assertEqual(self.end(process), (0, f"interrupted: {self.tmp}/parent/out is there, complete."))
    self.assertEqual((self.tmp / "parent" / "out" / "file").read_text(), "new")
    self.assertEqual(os.listdir(self.tmp / "parent"), ["out"])

  def test_the_system_kills_the_child(self):
    """What it had finished stays, for `--resume`."""
    process = self.make()
    os.kill(child_of(process), signal.SIGKILL)
    code, said = self.end(process)
    making = self.tmp / "parent" / f"out{atomic_target.SUFFIX}"
    self.assertEqual(code, 128 + signal.SIGKILL)
    self.assertEqual(
        said,
        "ended by SIGKILL, as the system does when memory runs out: "
        f"nothing was left at {self.tmp}/parent/out. What it was making lies in {making}; --resume goes on from there.",
    )
    self.assertEqual((making / "out" / "file").read_text(), "new")

  def test_somebody_terminates_the_child(self):
    process = self.make()
    os.kill(child_of(process), signal.SIGTERM)
    self.assertEqual(self.end(process), (130, f"interrupted: nothing was left at {self.tmp}/parent/out."))

  def test_the_child_ends_with_its_parent(self):
    process = self.make()
    child = child_of(process)
    process.kill()
    process.communicate(timeout=60)
    end = time.monotonic() + 10
    while not has_ended(child) and time.monotonic() < end:
      time.sleep(0.01)
    self.assertTrue(has_ended(child))
    self.assertFalse((self.tmp / "parent" / "out").exists())

  def test_what_cannot_be_removed_is_said(self):
    process = self.make()
    making = self.tmp / "parent" / f"out{atomic_target.SUFFIX}"
    os.kill(child_of(process), signal.SIGSTOP)
    making.rename(self.tmp / "elsewhere")
    making.write_text("a file in its place")
    process.terminate()
    code, said = self.end(process)
    self.assertEqual(code, 130)
    self.assertRegex(said, f"nothing was left at .*/out. What lies in {making} could not be removed: FileExistsError: ")
    self.assertTrue(making.exists())


class InProcessTest(util.CheckpointTestCase):
  """`main`, called by another program, whose Ctrl-C is an exception."""

  def setUp(self):
    super().setUp()
    self.source, self.target = util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "new" / "out"

  def call(self, *args):
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
      code = converter.main([f"--source_path={self.source}", f"--target_path={self.target}", *args])
    return code, err.getvalue()

  def at_the_sync_of(self, folder, error):
    """Raises an error when a folder is given to the disk."""
    real = os.fsync

    def fsync(descriptor):
      if os.readlink(f"/proc/self/fd/{descriptor}") == str(folder):
        raise error
      real(descriptor)

    return absltest.mock.patch.object(os, "fsync", fsync)

  def test_before_the_commit(self):
    with self.at_the_sync_of(self.tmp / "new" / f"2{atomic_target.SUFFIX}" / "2", KeyboardInterrupt()):
      self.target = self.tmp / "new"
      done = self.call()
    self.assertEqual(done, (130, f"linen_nnx_converter: interrupted: nothing was left at {self.tmp}/new/2.\n"))
    self.assert_nothing_left()

  @parameterized.parameters(
      (KeyboardInterrupt(), "interrupted: "),
      (OSError(errno.EIO, "Input/output error"), "{target}/2: OSError: [Errno 5] Input/output error. "),
  )
  def test_after_the_commit(self, error, said):
    """The target has its name, and then its parent folder cannot be given to the disk."""
    with self.at_the_sync_of(self.target, error):
      done = self.call()
    said = said.format(target=self.target)
    self.assertEqual(done, (0, f"linen_nnx_converter: {said}{self.target}/2 is there, complete.\n"))
    self.assertEqual(os.listdir(self.target), ["2"])
    self.assertEqual(converter.detect_format(converter.load_checkpoint(self.target)), "nnx")

  def test_before_anything_is_made(self):
    with absltest.mock.patch(
        "maxtext.checkpoint_conversion.linen_nnx_converter.storage.locations.find_source"
    ) as find_source:
      find_source.side_effect = KeyboardInterrupt
      self.assertEqual(self.call(), (130, "linen_nnx_converter: interrupted: nothing was made.\n"))

  def test_the_callers_signal_handlers_stay(self):
    signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in signals]
    self.call()
    with self.at_the_sync_of(self.target, KeyboardInterrupt()):
      self.call("--overwrite")
    self.assertEqual([signal.getsignal(number) for number in signals], before)


if __name__ == "__main__":
  absltest.main()
