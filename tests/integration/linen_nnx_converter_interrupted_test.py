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

"""A streamed conversion is killed, really, and the next run goes on from what it had finished."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

MODULE = "maxtext.checkpoint_conversion.linen_nnx_converter"
MATRICES, LAYERS = 16, 8  # Of 1 MiB a layer, incompressible: 128 MiB.
LEAVES = MATRICES * LAYERS + 1  # With the step.
OPTIONS = ("--scan_layers=False", "--memory_budget_gib=0.0625")


def save(folder, *, seed=0, use_ocdbt=True, step=True):
  """Saves scanned layers, each chunk of which holds all layers, so that they must be streamed to be unstacked."""
  random = np.random.default_rng(seed)
  weights = lambda: np.frombuffer(random.bytes(LAYERS * 2**20), np.uint16).reshape(512, LAYERS, 1024)
  tree = {"params": {"params": {"decoder": {"layers": {f"w{i}": weights() for i in range(MATRICES)}}}}}
  tree["step"] = np.array(1, np.int32)
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
  if not step:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(folder, args=ocp.args.PyTreeSave(tree))
    return
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(items=handler)) as checkpointer:
    checkpointer.save(folder / "3", args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))


def nbytes(folders):
  """The bytes of the files below; a file may vanish meanwhile."""
  total = 0
  for file in (file for folder in folders for file in folder.rglob("*")):
    with contextlib.suppress(OSError):
      total += file.stat().st_size if file.is_file() else 0
  return total


def kill_midway(watched: pathlib.Path, *args, processes=1, mib=50):
  """Starts a conversion, and kills it when this much has come into the folder."""
  before = nbytes([watched])
  command = [sys.executable, "-m", MODULE, *OPTIONS, *map(str, args)]
  if processes > 1:
    with socket.socket() as free:
      free.bind(("localhost", 0))
      command += [f"--coordinator_address=localhost:{free.getsockname()[1]}", f"--num_processes={processes}"]
  each = [[*command, f"--process_id={i}"] if processes > 1 else command for i in range(processes)]
  children = [subprocess.Popen(c, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for c in each]
  while nbytes([watched]) - before < mib * 2**20 and all(child.poll() is None for child in children):
    time.sleep(0.01)
  for child in children:
    child.send_signal(signal.SIGKILL)
  return [child.wait() for child in children]


def pytree(target):
  return target / "3" / "items" if (target / "3").exists() else target


def contents(target):
  """Every leaf, how it is stored, and Orbax's metadata."""
  stored = reader.Checkpoint(epath.Path(pytree(target)))
  leaves = {path: (leaf, stored.read(path).tobytes()) for path, leaf in stored.stored.items()}
  names = ("_METADATA", "_sharding")
  metadata = {name: (pytree(target) / name).read_text() for name in names if (pytree(target) / name).exists()}
  return leaves, metadata


def flip_a_bit(path):
  """Flips a bit in the middle of a file."""
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.integration
class InterruptedTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp()).resolve()
    self.addCleanup(shutil.rmtree, self.tmp)
    self.source, self.targets = self.tmp / "source", self.tmp / "targets"
    self.target = self.targets / "target"
    self.targets.mkdir()
    self.paths = (f"--source_path={self.source}", f"--target_path={self.target}")

  def run_again(self, *args):
    """Runs the conversion here: its summary, and which target leaves were streamed."""
    streamed, real = set(), streaming._write_batch  # pylint: disable=protected-access

    async def write_batch(batch, *rest):
      streamed.update(".".join(part.target) for block in batch for part in block.parts)
      return await real(batch, *rest)

    out, err = io.StringIO(), io.StringIO()
    watched = absltest.mock.patch.object(streaming, "_write_batch", write_batch)
    with watched, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = converter.main([*OPTIONS, *self.paths, *args])
    self.assertEqual(code, 0, err.getvalue())
    return out.getvalue(), streamed

  def assert_resumed(self, summary, streamed, at_least=1):
    """No leaf was streamed that was taken, and all are there."""
    taken = int(re.search(r"; (\d+) leaves taken from the interrupted run", summary)[1])
    self.assertGreaterEqual(taken, at_least)
    self.assertEqual(taken + len(streamed), LEAVES)
    self.assertIn(f", {taken}.0 MiB resumed; ", summary)
    return taken

  def assert_equals_an_uninterrupted_conversion(self):
    converter.main([*OPTIONS, self.paths[0], f"--target_path={self.tmp / 'uninterrupted'}"])
    self.assertEqual(contents(self.target), contents(self.tmp / "uninterrupted"))
    self.assertEqual(converter.main(["--verify_only", self.paths[1]]), 0)

  def assert_nothing_left(self):
    left = [str(path) for path in self.targets.rglob("*") if "tmp" in path.name or "resumed" in path.name]
    self.assertEmpty(left)
    self.assertCountEqual(os.listdir(self.targets), ["target"])

  @parameterized.product(use_ocdbt=(True, False), step=(True, False))
  def test_finished_leaves_are_not_streamed_again(self, use_ocdbt, step):
    save(self.source, use_ocdbt=use_ocdbt, step=step)
    self.assertEqual(kill_midway(self.targets, *self.paths), [-signal.SIGKILL])
    self.assertFalse((self.target / "3").exists())
    summary, streamed = self.run_again("--resume")
    self.assert_resumed(summary, streamed, at_least=10)
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  def test_a_run_that_was_resumed_is_killed_too(self):
    save(self.source)
    kill_midway(self.targets, *self.paths, mib=40)
    self.assertEqual(kill_midway(self.targets, *self.paths, "--resume", mib=100), [-signal.SIGKILL])
    self.assertLen(os.listdir(self.target), 2)  # What was resumed from, and what was made.
    summary, streamed = self.run_again("--resume")
    self.assert_resumed(summary, streamed, at_least=45)
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  def test_a_leaf_that_was_damaged_meanwhile_is_done_anew(self):
    save(self.source, use_ocdbt=False)
    kill_midway(self.targets, *self.paths)
    (items,) = self.target.rglob("items.orbax*")
    finished = [chunk.parent.name for chunk in items.glob("*/0.0") if chunk.stat().st_size > 2**20 - 1]
    flip_a_bit(items / finished[0] / "0.0")
    summary, streamed = self.run_again("--resume")
    self.assertIn(finished[0], streamed)
    self.assertNotIn(finished[1], streamed)
    self.assertIn(", 1 that were damaged or of another source done anew", summary)
    self.assert_resumed(summary, streamed)
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  @parameterized.parameters("manifest.ocdbt", "d")
  def test_a_store_that_was_damaged_meanwhile(self, name):
    save(self.source)
    kill_midway(self.targets, *self.paths)
    (store,) = self.target.rglob("items.orbax*/ocdbt.process_0")
    file = store / name if name.startswith("manifest") else max((store / name).iterdir(), key=lambda p: p.stat().st_size)
    flip_a_bit(file)
    summary, _ = self.run_again("--resume")
    self.assertRegex(
        summary,
        "nothing to resume, for what was left cannot be read" if name.startswith("manifest") else "1 that were damaged",
    )
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  def test_what_is_left_of_another_source_is_harmless(self):
    save(self.source, seed=1)
    kill_midway(self.targets, *self.paths)
    shutil.rmtree(self.source)
    save(self.source, seed=2)
    summary, streamed = self.run_again("--resume")
    self.assertLen(streamed, LEAVES)
    self.assertRegex(summary, r"; 0 leaves taken from the interrupted run, \d+ that were damaged or of another source")
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  def test_without_the_flag_what_was_left_is_removed(self):
    save(self.source)
    kill_midway(self.targets, *self.paths)
    kill_midway(self.targets, *self.paths, "--resume", mib=90)
    summary, streamed = self.run_again()
    self.assertLen(streamed, LEAVES)
    self.assertNotIn("resume", summary)
    self.assert_nothing_left()

  def test_nothing_to_resume(self):
    save(self.source)
    self.assertIn("; nothing to resume; digests", self.run_again("--resume")[0])
    self.assert_nothing_left()

  def test_a_replacement_of_what_stands_there(self):
    save(self.source)
    self.run_again()
    kill_midway(self.targets, *self.paths, "--overwrite")
    summary, streamed = self.run_again("--resume", "--overwrite")
    self.assert_resumed(summary, streamed, at_least=10)
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()

  @parameterized.parameters((2, 1), (1, 2), (2, 2))
  def test_other_numbers_of_processes(self, killed, resuming):
    save(self.source)
    kill_midway(self.targets, *self.paths, processes=killed)
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    command = [sys.executable, "-m", MODULE, *OPTIONS, *self.paths, "--resume"]
    cluster = [f"--coordinator_address=localhost:{port}", f"--num_processes={resuming}"]
    each = [[*command, *cluster, f"--process_id={i}"] if resuming > 1 else command for i in range(resuming)]
    children = [subprocess.Popen(c, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for c in each]
    outputs = [child.communicate(timeout=300) for child in children]
    self.assertEqual([child.returncode for child in children], [0] * resuming, outputs)
    self.assertRegex(outputs[0][0], r"; [1-9]\d* leaves taken from the interrupted run")
    self.assert_nothing_left()
    self.assert_equals_an_uninterrupted_conversion()


if __name__ == "__main__":
  absltest.main()
