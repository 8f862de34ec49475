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

from collections.abc import Callable
import sys
import time
from typing import TextIO

import tqdm

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """Is told how far the work has come. This one tells nobody."""

  def make_at(self, place: atomic_target.Place) -> None:
    """The target is about to be made there."""

  def start(self, task: str, nbytes: int) -> None:
    """A task begins that goes through this many bytes."""

  def advance(self, nbytes: int) -> None:
    """So many bytes of the task are done."""

  def finish(self) -> None:
    """The task is done."""


def checked(progress: Progress | None) -> Progress:
  """What a caller hands over to be told, or what tells nobody.

  Raises:
    OptionError: it is something else.
  """
  if progress is not None and not isinstance(progress, Progress):
    raise errors.OptionError("progress", "a progress.Progress, or None", type(progress).__name__, "Leave it out.")
  return progress or Progress()


class Shown(Progress):
  """Shows how far the work has come: bytes, rate and time left.

  Attributes:
    place: where the target is being made; None if nothing was made yet.
  """

  def __init__(self, stream: TextIO | None = None, announce: Callable[[atomic_target.Place], None] = lambda _: None):
    """Shows it on a stream, by default standard error; `announce` gets a target's place before anything is made there."""
    self._stream = _Patient(sys.stderr if stream is None else stream)
    self._announce = announce
    self._bar: tqdm.tqdm | None = None
    self.place: atomic_target.Place | None = None

  def make_at(self, place: atomic_target.Place) -> None:
    self.place = place
    self._announce(place)

  def start(self, task: str, nbytes: int) -> None:
    is_terminal = self._stream.isatty()
    self._bar = tqdm.tqdm(
        desc=task, total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, file=self._stream, disable=not is_terminal
    )
    self._task, self._total, self._done = task, nbytes, 0
    self._is_terminal, self._begin = is_terminal, time.monotonic()
    self._next_line = self._begin + _SECONDS_BETWEEN_LINES

  def advance(self, nbytes: int) -> None:
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
    if self._bar is not None:
      self._bar.close()


class _Patient:
  """A stream that may be closed, full or gone without ending the conversion."""

  def __init__(self, stream: TextIO | None):
    self._stream = stream
    self.encoding = getattr(stream, "encoding", None) or "utf-8"

  def isatty(self) -> bool:
    return self._stream is not None and self._stream.isatty()

  def write(self, text: str) -> int:
    if self._stream is not None:
      try:
        self._stream.write(text)
        self._stream.flush()
      except (OSError, ValueError):
        self._stream = None
    return len(text)

  def flush(self) -> None:
    """Does nothing: every text is flushed when it is written."""
