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

"""Progress on standard error: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from typing import TextIO

import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Silent:
  """Tells nothing."""

  def start(self, task: str, nbytes: int) -> None:
    """Begins a task."""

  def advance(self, nbytes: int) -> None:
    """Counts bytes that are done."""

  def finish(self) -> None:
    """Ends the task."""


class Progress:
  """Tells how far the work has come: bytes, rate and time left."""

  def __init__(self, stream: TextIO = sys.stderr):
    self._stream = stream
    self._bar: tqdm.tqdm | None = None

  def start(self, task: str, nbytes: int) -> None:
    """Begins a task that goes through this many bytes."""
    is_terminal = self._stream.isatty()
    self._bar = tqdm.tqdm(
        desc=task, total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, file=self._stream, disable=not is_terminal
    )
    self._task, self._total, self._done = task, nbytes, 0
    self._is_terminal, self._begin = is_terminal, time.monotonic()
    self._next_line = self._begin + _SECONDS_BETWEEN_LINES

  def advance(self, nbytes: int) -> None:
    """Counts bytes that are done."""
    self._done += nbytes
    if self._bar is not None:
      self._bar.update(nbytes)
    now = time.monotonic()
    if not self._is_terminal and now >= self._next_line:
      self._next_line = now + _SECONDS_BETWEEN_LINES
      line = tqdm.tqdm.format_meter(
          self._done,
          self._total,
          now - self._begin,
          prefix=self._task,
          unit="B",
          unit_scale=True,
          unit_divisor=1024,
          ncols=0,
      )
      print(line, file=self._stream, flush=True)

  def finish(self) -> None:
    """Ends the task."""
    if self._bar is not None:
      self._bar.close()
