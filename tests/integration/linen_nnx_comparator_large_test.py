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

"""One flipped bit in 1 GiB is found and named, in bounded memory, each chunk decoded once."""

import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

GIB = 2**30
LAYERS, MATRICES, SHAPE = 16, 2, (4096, 4096)  # 16 * 2 * 32 MiB of bfloat16 are 1 GiB.
LAYER, MATRIX, INDEX, BIT = 11, 1, (2049, 4095), 9

# Runs the command, then prints the peak of the process's memory in KiB, imports included, and the bytes that TensorStore
# read from files. (`ru_maxrss` may be the parent's.)
SCRIPT = """
import pathlib, re, sys
import tensorstore as ts
from maxtext.checkpoint_conversion import linen_nnx_comparator
code = linen_nnx_comparator.main(sys.argv)
peak = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
read = ts.experimental_collect_matching_metrics("/tensorstore/kvstore/file/bytes_read")[0]["values"][0]["value"]
print(peak, read)
sys.exit(code)
"""


def matrix(layer, j):
  """Random bits, so that nothing compresses."""
  random = np.random.default_rng([layer, j])
  return np.frombuffer(random.bytes(2 * SHAPE[0] * SHAPE[1]), jax.numpy.bfloat16.dtype).reshape(SHAPE)


def save(folder: pathlib.Path, decoder, chunk_bytes):
  """Writes a Linen checkpoint, in chunks of at most so many bytes."""
  tree = {"params": {"params": {"decoder": decoder}}, "step": np.array(1, np.int32)}
  arguments = ocp.args.PyTreeSave(tree, save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(folder, args=arguments)


@pytest.mark.integration
class LargeTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    stacked = {f"w_{j}": np.stack([matrix(i, j) for i in range(LAYERS)], axis=1) for j in range(MATRICES)}
    save(cls.tmp / "scanned", {"layers": stacked}, 8 * 2**20)
    flipped = stacked[f"w_{MATRIX}"].view(np.uint16)
    flipped[INDEX[0], LAYER, INDEX[1]] ^= 1 << BIT
    save(cls.tmp / "flipped", {"layers": stacked}, 4 * 2**20)
    flipped[INDEX[0], LAYER, INDEX[1]] ^= 1 << BIT
    del stacked, flipped
    layers = {f"layers_{i}": {f"w_{j}": matrix(i, j) for j in range(MATRICES)} for i in range(LAYERS)}
    save(cls.tmp / "unscanned", layers, 4 * 2**20)

  @parameterized.parameters(("scanned", 2.0), ("unscanned", 2.0), ("unscanned", 0.25))
  def test_a_flipped_bit_is_found(self, other, budget_gib):
    arguments = [f"--json={self.tmp / 'report.json'}", f"--memory_budget_gib={budget_gib}"]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, self.tmp / other, self.tmp / "flipped", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 1, done.stderr)
    report = json.loads((self.tmp / "report.json").read_text())
    self.assertEqual((report["differing"], report["elements"]), (1, LAYERS * MATRICES * SHAPE[0] * SHAPE[1] + 1))
    (leaf,) = report["worst_first"]
    self.assertEqual(leaf["path"], f"model/decoder/layers_{LAYER}/w_{MATRIX}")
    first = leaf["difference"]["first"]
    self.assertEqual(first["index"], list(INDEX))
    self.assertEqual(int(first["a_bits"], 16) ^ int(first["b_bits"], 16), 1 << BIT)
    peak, read = map(int, done.stdout.splitlines()[-1].split())
    said = f"{report['seconds']} s, peak {peak / 2**20:.2f} GiB, read {read / GIB:.3f} GiB"
    print(f"{other}, budget {budget_gib} GiB: {said}")
    self.assertLess(peak * 1024, min(budget_gib * GIB + GIB / 2, 1.5 * GIB))  # Small against the 2 GiB of both.
    self.assertGreater(read, 2 * GIB)  # Random bits: every chunk was read,
    if budget_gib == 2.0:  # and none twice. A small budget does not hold the chunks of 16 layers at a time.
      self.assertLess(read, 2.05 * GIB)


if __name__ == "__main__":
  absltest.main()
