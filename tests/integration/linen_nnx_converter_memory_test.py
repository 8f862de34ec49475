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

"""Memory stays within the budget, whatever the size of the checkpoint: 4 GiB converted in processes of their own."""

import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

GIB = 2**30
LAYERS, MATRICES, SHAPE = 16, 8, (4096, 4096)  # 16 * 8 * 32 MiB of bfloat16 are 4 GiB.
CHUNK_BYTES = 4 * 2**20

# Prints the peak of the process's memory in KiB, imports included. (`ru_maxrss` may be the parent's.)
SCRIPT = """
import pathlib, re, sys
from maxtext.checkpoint_conversion import linen_nnx_converter
code = linen_nnx_converter.main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1])
sys.exit(code)
"""


def save(folder: pathlib.Path):
  """Writes a checkpoint of 4 GiB in small chunks; random bits, so that nothing compresses."""
  random = np.random.default_rng(0)
  bits = lambda: np.frombuffer(random.bytes(2 * SHAPE[0] * SHAPE[1]), jax.numpy.bfloat16.dtype).reshape(SHAPE)
  layers = {f"layers_{i}": {f"w_{j}": bits() for j in range(MATRICES)} for i in range(LAYERS)}
  tree = {"params": {"params": {"decoder": layers}}, "step": np.array(1, np.int32)}
  save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(tree, save_args))


@pytest.mark.integration
class MemoryTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    save(cls.tmp / "source")

  def peak(self, source, *arguments):
    """The peak of the memory of a conversion, in bytes."""
    command = [sys.executable, "-c", SCRIPT, f"--source_path={source}", f"--target_path={self.tmp / 'target'}"]
    done = subprocess.run([*command, "--overwrite", *arguments], capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr)
    return int(done.stdout.splitlines()[-1]) * 1024

  @parameterized.parameters((2.0, True), (0.25, True), (0.25, False))
  def test_peak(self, budget_gib, scan_layers):
    """No more than the budget and 1 GiB, to write and to verify."""
    peak = self.peak(
        self.tmp / "source", f"--memory_budget_gib={budget_gib}", f"--scan_layers={scan_layers}", "--verify=full"
    )
    self.assertLess(peak, budget_gib * GIB + GIB, f"peak {peak / GIB:.2f} GiB")
    # And that it is small against the 4 GiB, so that a larger budget is no licence to hold all.
    self.assertLess(peak, 2.5 * GIB)

  def test_peak_of_a_chunk_that_holds_all_layers(self):
    """It must be decoded whole, and is held twice for that, encoded and decoded; its slices are written by and by."""
    shape = (SHAPE[0], LAYERS, SHAPE[1])
    bits = np.frombuffer(np.random.default_rng(0).bytes(2 * np.prod(shape)), jax.numpy.bfloat16.dtype).reshape(shape)
    tree = {"params": {"params": {"decoder": {"layers": {"w": bits}}}}, "step": np.array(1, np.int32)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      checkpointer.save(self.tmp / "scanned", args=ocp.args.PyTreeSave(tree))
    self.assertLess(self.peak(self.tmp / "scanned", "--scan_layers=False"), 3.5 * bits.nbytes)

  @parameterized.parameters(signal.SIGINT, signal.SIGTERM)
  def test_a_signal_half_way_leaves_nothing(self, number):
    command = [sys.executable, "-m", "maxtext.checkpoint_conversion.linen_nnx_converter"]
    command += [f"--source_path={self.tmp / 'source'}", f"--target_path={self.tmp / 'stopped'}"]
    command += ["--copy_mode=copy", "--verify=full"]  # By reference alone it would be done before the signal comes.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # Ignored where the tests run in the background.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, handler)
    while not any((self.tmp).glob("stopped*/**/d/*")):  # Until it writes.
      time.sleep(0.1)
    time.sleep(1)
    process.send_signal(number)
    out, err = process.communicate()
    self.assertEqual((process.returncode, out), (130, ""), err)
    self.assertEqual(err, f"linen_nnx_converter: interrupted: nothing was left at {self.tmp / 'stopped'}.\n")
    self.assertEmpty(list(self.tmp.glob("stopped*")))


if __name__ == "__main__":
  absltest.main()
