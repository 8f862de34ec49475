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

"""Lines that say the same of each layer become one."""

import re

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st

from maxtext.checkpoint_conversion.linen_nnx_converter import folding


def unfolded(line):
  """What a folded line says."""
  ranges = re.findall(r"(\d+)…(\d+)", line)
  if not ranges:
    return [line]
  length = int(ranges[0][1]) - int(ranges[0][0]) + 1
  raised = lambda by: re.sub(r"(\d+)…\d+", lambda match: str(int(match[1]) + by), line)
  return [raised(by) for by in range(length)]


class FoldingTest(parameterized.TestCase):

  @parameterized.parameters(
      (["a/layers_0/w", "a/layers_1/w", "a/layers_2/w"], ["a/layers_0…2/w"]),
      (
          ["a/0/w  (4, 8) slice index 0 of a/w", "a/1/w  (4, 8) slice index 1 of a/w"],
          ["a/0…1/w  (4, 8) slice index 0…1 of a/w"],
      ),
      # wi_0 and wi_1 are no layers, and do not rise alone.
      (["l_0/wi_0", "l_0/wi_1", "l_1/wi_0", "l_1/wi_1"], ["l_0…1/wi_0", "l_0…1/wi_1"]),
      (["l_0/w", "l_2/w"], ["l_0/w", "l_2/w"]),
      ([f"l_{number}/w" for number in sorted(range(12), key=str)], ["l_0…11/w"]),
      (["l_0/w (4,)", "l_1/w (8,)"], ["l_0/w (4,)", "l_1/w (8,)"]),
      (["l_0/w bfloat16", "l_1/w float32"], ["l_0/w bfloat16", "l_1/w float32"]),
      (["run_007/w", "run_008/w", "v1.0", "v1.1"], ["run_007/w", "run_008/w", "v1.0", "v1.1"]),
      (["step", "step"], ["step", "step"]),
      ([], []),
  )
  def test_literally(self, lines, folded):
    self.assertEqual(list(folding.fold(lines)), folded)

  @hypothesis.given(st.lists(st.from_regex(r"[ab]_[0-3]/[0-2] \([0-2],\)", fullmatch=True), max_size=12))
  def test_nothing_is_lost_or_made_up(self, lines):
    said = [line for folded in folding.fold(lines) for line in unfolded(folded)]
    self.assertCountEqual(said, lines)


if __name__ == "__main__":
  absltest.main()
