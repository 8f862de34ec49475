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


"""Compares files with what they are copied from, piece by piece, while a core's caches hold both.

Reading both again later would take as long as copying them. Files that were compared are recognised by inode, size and
modification time: a file that someone has written to since is another one.
"""

from collections.abc import Iterable, Iterator
import contextlib
import os
from typing import Any

_PIECE_BYTES = 2**16  # Larger ones are fresh memory from the system each time.

Stamp = tuple[int, ...]


class CopiedFiles:
  """The files that were found equal to what they were copied from."""

  def __init__(self):
    self._equal: set[tuple[Stamp, Stamp]] = set()

  @contextlib.contextmanager
  def watch(self, source: os.PathLike[str] | str, target: os.PathLike[str] | str) -> Iterator[Any]:
    """Compares a file that is being copied with its source, as far as the yielded function is told."""
    with open(source, "rb", buffering=0) as ours, open(target, "rb", buffering=0) as theirs:
      is_equal = True

      def see(end: int):
        nonlocal is_equal
        is_equal = is_equal and have_equal_bytes(ours, theirs, end - ours.tell())

      yield see
      if is_equal and not ours.read(1) and not theirs.read(1):
        self._equal.add((_stamp(os.fstat(ours.fileno())), _stamp(os.fstat(theirs.fileno()))))

  def have(self, source: os.PathLike[str], target: os.PathLike[str]) -> bool:
    """Whether the two were found equal, and neither has changed since."""
    return (_stamp(os.stat(source)), _stamp(os.stat(target))) in self._equal

  def parts(self) -> list[tuple[Stamp, Stamp]]:
    """What was found so far, to be merged with other processes' findings."""
    return sorted(self._equal)

  def merge(self, parts: Iterable[Iterable[Iterable[int]]]):
    """Adds another process's findings."""
    self._equal.update((tuple(ours), tuple(theirs)) for ours, theirs in parts)


def have_equal_bytes(one: Any, other: Any, nbytes: int) -> bool:
  """Whether the next bytes of two unbuffered files exist and are equal."""
  while nbytes > 0:
    pieces = one.read(min(nbytes, _PIECE_BYTES)), other.read(min(nbytes, _PIECE_BYTES))
    if pieces[0] != pieces[1] or not pieces[0]:
      return False
    nbytes -= len(pieces[0])
  return True


def _stamp(status: os.stat_result) -> Stamp:
  return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
