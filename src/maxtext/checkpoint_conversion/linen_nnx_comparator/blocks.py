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

"""The regions of both checkpoints to read together, so that each chunk is read once if the budget allows. No I/O.

A batch of leaves is led by one stored array, whose chunks form a grid. A block is a box of that grid, with its
counterpart on the other side: one array, or one per layer if that side has its layers apart.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded

Path, Pair = alignment.Path, alignment.Pair
Region = leaf_moves.Region
ChunkShapeOf = Callable[[int, Path], tuple[int, ...]]  # Of a stored array, by side and path.

# Small chunks are read together up to this size. Larger blocks were slower (1 GiB of bfloat16 on 2 cores).
ENOUGH_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Read:
  """A region of a stored array, of A (side 0) or B (side 1)."""

  side: int
  source: Path
  region: Region


@dataclasses.dataclass(frozen=True)
class Cell:
  """A region of a canonical leaf, and the reads, of A and of B, that hold it."""

  pair: Pair
  region: Region
  reads: tuple[Read, Read]

  @property
  def origin(self) -> tuple[int, ...]:
    return tuple(part.start for part in self.region)

  def values(self, data: Mapping[Read, Any]) -> tuple[Any, Any]:
    """The values there in A and in B, given the `data` of the reads: views, not copies."""
    a, b = (leaf.move.values(0, read.region, data[read]) for leaf, read in zip(self.pair.sides, self.reads))
    return a, b


@dataclasses.dataclass(frozen=True)
class Block:
  """What is read and compared at a time. The first read is of the leading array, and `nbytes` is its size."""

  reads: tuple[Read, ...]
  cells: tuple[Cell, ...]
  nbytes: int


def blocks(pairs: Iterable[Pair], chunk_shape_of: ChunkShapeOf, most_bytes: int) -> Iterator[Block]:
  """The blocks of all pairs: boxes of whole chunks of the leading arrays, and of the other side if there is room.

  Args:
    pairs: leaves that are arrays on both sides.
    chunk_shape_of: the chunk shape of a stored array.
    most_bytes: what a block may read on one side, unless a single chunk is larger.
  """
  for side, batch in batches(pairs):
    lead, other = batch[0].sides[side], batch[0].sides[1 - side]
    shape, itemsize, chunk = lead.stored.shape, lead.stored.dtype.itemsize, chunk_shape_of(side, lead.source)
    seen = _seen_from(lead.move, chunk, other.move, chunk_shape_of(1 - side, other.source))
    # The smallest box of whole chunks of both sides, or as much of it as there is room for.
    step = [min(math.lcm(one, two), max(one, size)) for one, two, size in zip(chunk, seen, shape)]
    if math.prod(step) * itemsize > most_bytes:
      step = [stop for _, stop in next(decoded.boxes(step, chunk, most_bytes // itemsize))]
    for box in decoded.boxes(shape, step, min(most_bytes, ENOUGH_BYTES) // itemsize):
      nbytes = itemsize * math.prod(stop - start for start, stop in box)
      if block := _block(Read(side, lead.source, decoded.as_slices(box)), batch, nbytes):
        yield block


def batches(pairs: Iterable[Pair]) -> Iterator[tuple[int, list[Pair]]]:
  """The pairs in batches, each led by the stored array, of side 0 or 1, that holds most of them and is read once."""
  holders = {}
  for pair in pairs:
    for side, leaf in enumerate(pair.sides):
      holders.setdefault((side, leaf.source), []).append(pair)
  done = set()
  for (side, _), held in sorted(holders.items(), key=lambda holder: -len(holder[1])):
    left = [pair for pair in held if pair.keys not in done]
    done.update(pair.keys for pair in left)
    if left:
      yield side, left


def _block(lead: Read, batch: Sequence[Pair], nbytes: int) -> Block | None:
  """A region of the leading array with its counterparts; None if only one side has these layers."""
  by_source = {}
  for pair in batch:
    inside = pair.sides[lead.side].move.region(0, lead.region)
    if inside is not None:
      by_source.setdefault(pair.sides[1 - lead.side].source, []).append((pair, inside))
  reads, cells = [lead], []
  for source, held in by_source.items():
    moves = [pair.sides[1 - lead.side].move for pair, _ in held]
    other = Read(1 - lead.side, source, leaf_moves.insert(held[0][1], moves[0].taken, _spans(moves)))
    reads.append(other)
    cells += [Cell(pair, inside, (other, lead) if lead.side else (lead, other)) for pair, inside in held]
  return Block(tuple(reads), tuple(cells), nbytes) if cells else None


def _spans(moves: Sequence[leaf_moves.Move]) -> tuple[slice, ...]:
  """Along each layer axis, the range of these slices' indices."""
  along = zip(*(move.pieces[0][1] for move in moves))
  return tuple(slice(min(indices), max(indices) + 1) for indices in along)


def _seen_from(lead: leaf_moves.Move, chunk, other: leaf_moves.Move, other_chunk) -> tuple[int, ...]:
  """The other side's chunk shape, in the axes of the leading array."""
  layers = [other_chunk[axis] for axis in other.taken]
  if len(layers) != len(lead.taken):  # The layers are apart there, or in other blocks.
    layers = [chunk[axis] for axis in lead.taken]
  return leaf_moves.insert(leaf_moves.remove(other_chunk, other.taken), lead.taken, layers)
