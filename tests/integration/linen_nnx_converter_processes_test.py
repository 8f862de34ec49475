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

"""Several processes convert together, over loopback: the target of one process, or none."""

import os
import pathlib
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
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests

TUNIX = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "tunix" / "sft"
MODULE = "maxtext.checkpoint_conversion.linen_nnx_converter"


def start(count, *args, each=None):
  """Starts the command in so many processes, with arguments for each of them."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    port = free.getsockname()[1]
  command = [sys.executable, "-m", MODULE, f"--coordinator_address=localhost:{port}", f"--num_processes={count}", *args]
  return [
      subprocess.Popen(
          [*command, f"--process_id={i}", *(each[i] if each else ())],
          stdout=subprocess.PIPE,
          stderr=subprocess.PIPE,
          text=True,
      )
      for i in range(count)
  ]


def values(checkpoint):
  """Every leaf's shape, dtype and bytes."""
  stored = reader.Checkpoint(epath.Path(checkpoint))
  arrays = {path: stored.read(path) for path in stored.stored}
  return {path: (array.shape, str(array.dtype), array.tobytes()) for path, array in arrays.items()}


@pytest.mark.integration
class ProcessesTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp()).resolve()
    self.addCleanup(shutil.rmtree, self.tmp)
    random = np.random.default_rng(0)
    weights = lambda: np.frombuffer(random.bytes(2**23), np.uint32).reshape(512, 16, -1)
    params = {"decoder": {"layers": {f"w{i}": weights() for i in range(12)}}, "token_embedder": {"embedding": weights()}}
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(self.tmp / "source", {"params": {"params": params}})

  @parameterized.parameters(
      (2, ("--scan_layers=False",)),
      (4, ("--scan_layers=False",)),
      (2, ("--copy_mode=copy",)),
  )
  def test_the_target_of_one_process(self, count, options):
    arguments = [f"--source_path={self.tmp}/source", *options]
    converter.main([*arguments, f"--target_path={self.tmp}/alone"])
    processes = start(count, *arguments, f"--target_path={self.tmp}/together")
    outputs = [process.communicate(timeout=300) for process in processes]
    self.assertEqual([process.returncode for process in processes], [0] * count, outputs)
    self.assertIn(" verified: ", outputs[0][0])
    self.assertNotIn("converted", "".join(out for out, _ in outputs[1:]))
    self.assertEqual(values(self.tmp / "together"), values(self.tmp / "alone"))
    self.assertEqual(*(digests.read(epath.Path(self.tmp / name)) for name in ("together", "alone")))
    self.assertEmpty(list(self.tmp.rglob("*compared*")))
    if "--scan_layers=False" in options:
      written = [
          sum(file.stat().st_size for file in (self.tmp / "together" / f"ocdbt.process_{i}").rglob("*") if file.is_file())
          for i in range(count)
      ]
      self.assertLess(max(written) / min(written), 1.5, written)

  def test_two_stores_by_reference(self):
    arguments = [f"--source_path={TUNIX}"]
    converter.main([*arguments, f"--target_path={self.tmp}/alone"])
    processes = start(2, *arguments, f"--target_path={self.tmp}/together")
    outputs = [process.communicate(timeout=300) for process in processes]
    self.assertEqual([process.returncode for process in processes], [0, 0], outputs)
    self.assertIn("iB by reference, 4 bytes streamed", outputs[0][0])
    self.assertEqual(*(values(self.tmp / name / "3" / "items") for name in ("together", "alone")))

  def test_other_options_in_one_process_are_refused_by_all(self):
    given = [f"--source_path={self.tmp}/source", f"--target_path={self.tmp}/together", "--scan_layers=False"]
    processes = start(2, *given, each=(["--compression=none"], []))
    outputs = [process.communicate(timeout=300) for process in processes]
    self.assertIn("--compression: expected the same value in all processes, found None and none.", outputs[0][1])
    self.assertNotIn(0, [process.returncode for process in processes])
    self.assertEqual(os.listdir(self.tmp), ["source"])

  @parameterized.parameters(0, 1)
  def test_what_one_process_refuses_all_refuse(self, index):
    given = [f"--target_path={self.tmp}/together", "--scan_layers=False"]
    sources = [[f"--source_path={self.tmp}/source"], [f"--source_path={self.tmp}/source"]]
    sources[index] = ["--source_path=/nowhere"]
    begin = time.monotonic()
    processes = start(2, *given, each=sources)
    outputs = [process.communicate(timeout=300)[1] for process in processes]
    self.assertEqual([process.returncode for process in processes], [1, 1], outputs)
    self.assertIn("linen_nnx_converter: /nowhere: expected a checkpoint, found nothing. Check", outputs[index])
    self.assertIn("found nothing. Check --source_path. Mend it, and start all again.", outputs[1 - index])
    self.assertLess(time.monotonic() - begin, 20)  # After which JAX would have aborted the other one.
    self.assertEqual(os.listdir(self.tmp), ["source"])

  def test_the_first_process_is_stopped(self):
    """It clears up when the other one, which JAX aborts, writes no more."""
    target = self.tmp / "together"
    processes = start(2, f"--source_path={self.tmp}/source", "--scan_layers=False", f"--target_path={target}")
    while not list(self.tmp.glob("together*")):
      time.sleep(0.01)
    processes[0].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=300)[1].splitlines()[-1] for process in processes]
    self.assertEqual(processes[0].returncode, 130)
    self.assertEqual(said[0], f"linen_nnx_converter: interrupted: nothing was left at {target}.")
    # JAX aborts the other one, unless that has found its connection closed before.
    self.assertIn(processes[1].returncode, (1, 128 + signal.SIGABRT))
    self.assertRegex(said[1], "[Nn]othing was made|[Tt]he first process (clears up|says what stands at)")
    self.assertEqual(os.listdir(self.tmp), ["source"])

  @parameterized.parameters(0, 1)
  def test_a_killed_process_leaves_no_target(self, killed):
    arguments = (f"--source_path={self.tmp}/source", "--scan_layers=False")
    processes = start(2, *arguments, f"--target_path={self.tmp}/together")
    while not list(self.tmp.glob("together*")):
      time.sleep(0.01)
    processes[killed].send_signal(signal.SIGKILL)
    for process in processes:
      process.communicate(timeout=300)
    self.assertNotIn(0, [process.returncode for process in processes])
    self.assertNotIn("together", os.listdir(self.tmp))
    self.assertEqual(converter.main([*arguments, f"--target_path={self.tmp}/together"]), 0)


if __name__ == "__main__":
  absltest.main()
