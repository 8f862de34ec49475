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

"""What the command says while it works, on a terminal and elsewhere."""

import errno
import io
import itertools
import os
import time

from absl.testing import absltest
from absl.testing import parameterized

from maxtext.checkpoint_conversion.linen_nnx_converter import progress


class Terminal(io.StringIO):

  def isatty(self):
    return True


class Full(io.StringIO):
  """A stream of which every write fails, as of one to `/dev/full`; that would fail again when it is closed."""

  def __init__(self, is_terminal):
    super().__init__()
    self.isatty = lambda: is_terminal

  def write(self, text):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class ProgressTest(parameterized.TestCase):

  @parameterized.parameters(True, False)
  def test_a_stream_that_takes_nothing(self, is_terminal):
    """A terminal that has gone, a full disk: the work goes on."""
    told = progress.Shown(Full(is_terminal))
    with absltest.mock.patch.object(time, "monotonic", side_effect=itertools.count(step=11)):
      told.start("writing", 2**20)
      for _ in range(2):
        told.advance(2**19)
      told.finish()

  def test_a_bar_on_a_terminal(self):
    stream = Terminal()
    bar = progress.Shown(stream)
    bar.start("writing", 2**20)
    bar.advance(2**20)
    bar.finish()
    self.assertIn("writing: 100%", stream.getvalue())

  def test_lines_elsewhere(self):
    stream = io.StringIO()
    lines = progress.Shown(stream)
    with absltest.mock.patch.object(time, "monotonic", side_effect=[0.0, 5.0, 11.0, 12.0]):
      lines.start("writing", 4 * 2**20)
      for _ in range(3):
        lines.advance(2**20)
      lines.finish()
    self.assertLen(stream.getvalue().splitlines(), 1)  # One in ten seconds.
    self.assertIn("2.00M/4.00M", stream.getvalue())


if __name__ == "__main__":
  absltest.main()
