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

from collections.abc import Iterable
import dataclasses
import os

# What a byte in flight costs: it is held encoded and decoded on both sides, and the allocator keeps some freed memory.
# Measured as the growth of the peak RSS, verified (4 GiB in OCDBT, chunks of 128 MiB): 4.5 with one in flight, 2.6 with
# three.
_COST = 5
# Two boxes are compared at a time, each with its counterpart, and with what decoding the two takes.
_BOXES = 16
# While one batch is read, another is encoded, and a third compared. With two, 2 cores took 36 s for what takes 31 s with
# three; nine took as long as three. A chunk is decoded and compared by one core, so more cores want more batches.
_LEAST_BATCHES = 3
MOST_BATCHES = max(_LEAST_BATCHES, (os.cpu_count() or 1) + 1)  # In flight.
BATCH_BYTES = 64 * 2**20  # Of pieces that are read, or written, at once.
_LEAST_PAIRS, _MOST_PAIRS = 2, 256  # Of encoded chunks that are compared at a time, each in the source and in the target.


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
    return self.nbytes // _BOXES

  def boxes(self, largest: int) -> int:
    """How many arrays to compare at a time, if at most `largest` bytes of each must be read at once."""
    return 1 if largest > self.box else 2

  def pairs(self, largest: int) -> int:
    """How many pairs of encoded chunks, of at most `largest` bytes each, to hold at a time."""
    return min(max(_LEAST_PAIRS, self.box // max(1, largest)), _MOST_PAIRS)

  def held(self, sizes: Iterable[int]) -> int:
    """About how many bytes all copies of pieces of these sizes take at most at one time."""
    sizes = list(sizes)
    return _COST * max(min(sum(sizes), self.in_flight), *sizes, 0)
