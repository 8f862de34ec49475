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

"""What `--dry_run` says a conversion would cost, and that it leaves nothing."""

import os
import subprocess
import sys
import threading

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

MIB = 2**20
OF_WHAT_IS_STREAMED = r"8\.0 MiB written at .*/s, 8\.0 MiB decoded, encoded and read back at [\d.,]+ [MG]iB/s"
WITH_SMALL_FILES = """
import resource, sys
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
print(converter.convert_checkpoint(sys.argv[1], sys.argv[2], dry_run=True, scan_layers=False).cost)
"""


class CostTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    numbers = np.random.default_rng(0).integers(0, 256, (512, 4, 4096), np.uint8)
    tree = util.linen({"decoder": {"layers": {"w": numbers.view(np.uint32)}}}) | {"opt_state": None}
    self.source = self.save("source", tree)

  def cost(self, *, source=None, **options) -> str:
    return converter.convert_checkpoint(source or self.source, self.tmp / "out", dry_run=True, **options).cost

  @parameterized.parameters(
      ({"scan_layers": False}, OF_WHAT_IS_STREAMED),
      ({"scan_layers": False, "use_zarr3": True, "compression": "none"}, OF_WHAT_IS_STREAMED),
      ({"scan_layers": False, "verify": False}, ".* MiB written at .*/s, 8.0 MiB decoded and encoded at "),
      ({"copy_mode": "copy"}, "8.0 MiB written at .*/s, 8.0 MiB read at "),
      ({"copy_mode": "copy", "verify": False}, "8.0 MiB written at .*/s, 8.0 MiB read at "),
  )
  def test_time_is_measured_and_nothing_is_left(self, options, expected):
    before, seen, done = util.snapshot(self.tmp), set(), threading.Event()

    def look():
      while not done.is_set():
        seen.update(os.listdir(self.tmp))

    looking = threading.Thread(target=look)
    looking.start()
    cost = self.cost(**options)
    done.set()
    looking.join()
    self.assertRegex(cost, rf"; about [\d,]+ s beyond what the plan took \({expected}")
    self.assertEqual((util.snapshot(self.tmp), seen), (before, {"source"}))

  def test_of_what_is_linked_nothing_is_measured(self):
    self.assertRegex(self.cost(), "; [0-9]+ bytes to read and write$")

  @parameterized.parameters(
      (1.0, "640.0 MiB for data under way;"),
      (0.5, "512.0 MiB for data under way (--memory_budget_gib=1 would keep all cores busy);"),
      (1 / 16, "160.0 MiB for data under way (--memory_budget_gib=1 would keep all cores busy);"),
  )
  def test_memory_is_what_there_is_or_the_budget_or_what_one_chunk_takes(self, budget, held):
    """Five times what is under way: all of 128 MiB, or what there is room for, and at least one chunk of 32 MiB."""
    leaves = {f"w_{i}": np.ones((64, 4, 2**15), np.uint32) for i in range(4)}
    source = self.save("large", util.linen({"decoder": {"layers": leaves}}) | {"opt_state": None})
    cost = self.cost(source=source, scan_layers=False, memory_budget_gib=budget)
    self.assertIn(f"at most {held} ", cost)

  def test_where_nothing_can_be_written_no_time_is_told(self):
    command = [sys.executable, "-c", WITH_SMALL_FILES, self.source, self.tmp / "out"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    self.assertRegex(said, f"; no time: nothing could be written to {self.tmp}: .*File too large")
    self.assertEqual(os.listdir(self.tmp), ["source"])


if __name__ == "__main__":
  absltest.main()
