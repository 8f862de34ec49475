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

"""How a memory budget is divided among the data in flight."""

import asyncio
import collections
from collections.abc import AsyncIterator, Sequence
import contextlib
import dataclasses
import math
import os
from typing import Any

# What a byte in flight costs: it is held encoded and decoded on both sides, and the allocator keeps some freed memory.
# Measured as the growth of the peak RSS, verified (4 GiB in OCDBT, chunks of 128 MiB): 4.5 with one in flight, 2.6 with
# three.
_COST = 5
# What a byte that is compared costs: it, its counterpart, and what decoding the two takes.
_COMPARED_COST = 8
_LARGEST_BOXES, _MOST_COMPARED = 2, 256  # At a time.
# While one batch is read, another is encoded, and a third compared. With two, 2 cores took 36 s for what takes 31 s with
# three; nine took as long as three. A chunk is decoded and compared by one core, so more cores want more batches.
_LEAST_BATCHES = 3
MOST_BATCHES = max(_LEAST_BATCHES, (os.cpu_count() or 1) + 1)  # In flight.
BATCH_BYTES = 64 * 2**20  # Of pieces that are read, or written, at once.


class Gate:
  """Admits work, in its order, while the number and the bytes of what is inside stay below limits."""

  def __init__(self, nbytes: int, number: int):
    self._limit = self._free = nbytes
    self._places = number
    self._waiting: collections.deque[tuple[int, asyncio.Future[None]]] = collections.deque()

  async def enter(self, nbytes: int) -> int:
    """Waits for room; more bytes than the limit go alone. Returns the bytes to give back to `leave`."""
    nbytes, entered = min(nbytes, self._limit), asyncio.get_running_loop().create_future()
    self._waiting.append((nbytes, entered))
    self._admit()
    await entered
    return nbytes

  def leave(self, nbytes: int):
    self._free += nbytes
    self._places += 1
    self._admit()

  @contextlib.asynccontextmanager
  async def inside(self, nbytes: int) -> AsyncIterator[None]:
    """Enters, and leaves at the end."""
    nbytes = await self.enter(nbytes)
    try:
      yield
    finally:
      self.leave(nbytes)

  def _admit(self):
    while self._waiting and self._places and self._waiting[0][0] <= self._free:
      nbytes, entered = self._waiting.popleft()
      if not entered.done():  # It may have been cancelled.
        self._free -= nbytes
        self._places -= 1
        entered.set_result(None)


@dataclasses.dataclass(frozen=True)
class Budget:
  """A memory budget.

  Attributes:
    nbytes: bytes, for all copies of the data in flight. A single piece of data may take more.
  """

  nbytes: int

  @property
  def in_flight(self) -> int:
    """The bytes of data that may be in flight."""
    return self.nbytes // _COST

  @property
  def room(self) -> int:
    """The bytes that a piece of data may have for the least number of batches to be in flight."""
    return self.in_flight // _LEAST_BATCHES

  @property
  def batch(self) -> int:
    """The bytes of the pieces that are batched. A larger piece is a batch of its own."""
    return min(BATCH_BYTES, self.room)

  @property
  def box(self) -> int:
    """The bytes of an array that may be read at once to be compared."""
    return self.nbytes // (_COMPARED_COST * _LARGEST_BOXES)

  def read_at_once(self, leaf: Any, block_shape: Sequence[int]) -> int:
    """The bytes of a leaf, with a `shape` and a `dtype`, that are read at once to be compared: a box, or one block."""
    nbytes = lambda shape: math.prod(shape) * leaf.dtype.itemsize
    return min(nbytes(leaf.shape), max(nbytes(block_shape), self.box))

  def batches(self) -> Gate:
    """Admits batches of pieces that are read and written."""
    return Gate(self.in_flight, MOST_BATCHES)

  def comparisons(self) -> Gate:
    """Admits what is compared, by the bytes of one side."""
    return Gate(self.nbytes // _COMPARED_COST, _MOST_COMPARED)

  def held(self, sizes: Sequence[int]) -> int:
    """About how many bytes all copies of pieces of these sizes take at most at one time."""
    return _COST * max(min(sum(sizes), self.in_flight), *sizes, 0)

  def wanted(self, sizes: Sequence[int]) -> int:
    """How many bytes keep all cores busy with pieces of these sizes."""
    return _COST * min(sum(sizes), MOST_BATCHES * max([BATCH_BYTES, *sizes]))
