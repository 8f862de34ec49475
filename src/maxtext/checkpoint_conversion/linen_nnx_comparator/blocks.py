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

"""The regions of both checkpoints to read together: each chunk in one of them, as far as the budget allows. No I/O.

A batch is led by one stored array. Its chunks make a grid; a block is a box of that grid, with what stands at the same
place on the other side, be it one array or, where one side has its layers apart, one for each layer.
"""

from collections.abc import Callable, Iterator, Sequence
import dataclasses
import itertools
import math

from maxtext.checkpoint_conversion.linen_nnx_comparator import align
from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves

Path = canonical.Path
Region = tuple[slice, ...]
ChunkShapeOf = Callable[[int, Path], tuple[int, ...]]  # Of a stored array, by side and path.

# Small chunks are read together up to this size. Larger blocks were slower (1 GiB of bfloat16 on 2 cores).
_ENOUGH_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Read:
  """A region of a stored array.

  Attributes:
    side: 0 for A, 1 for B.
    source: the path of the array.
    region: the region.
  """

  side: int
  source: Path
  region: Region


@dataclasses.dataclass(frozen=True)
class Cell:
  """A part of a canonical leaf, and where it is in what a block reads.

  Attributes:
    leaf: the leaf.
    origin: the part's place in the canonical leaf.
    reads: for A and for B, which of the block's reads holds it.
    inside: for A and for B, the index of the part inside that read.
  """

  leaf: align.Aligned
  origin: tuple[int, ...]
  reads: tuple[int, int]
  inside: tuple[tuple[int | slice, ...], tuple[int | slice, ...]]


@dataclasses.dataclass(frozen=True)
class Block:
  """What is read and compared at a time. The first read is of the array that leads the batch."""

  reads: tuple[Read, ...]
  cells: tuple[Cell, ...]


def blocks(batch: align.Batch, chunk_shape_of: ChunkShapeOf, most_bytes: int) -> Iterator[Block]:
  """The blocks of a batch: boxes of whole chunks of the leading array, and of the other side where there is room.

  Args:
    batch: the batch.
    chunk_shape_of: the chunk shape of a stored array.
    most_bytes: what a block may read on one side, unless a single chunk is larger.
  """
  lead = batch.leaves[0].places[batch.side]
  leaf = batch.leaves[0].sides[batch.side]
  assert leaf.shape is not None and leaf.dtype is not None, batch.source
  chunk = chunk_shape_of(batch.side, batch.source)
  numbers = [item.places[batch.side].index for item in batch.leaves]
  sizes = tuple(max(index[axis] for index in numbers) + 1 for axis in range(len(lead.axes)))
  shape = leaf_moves.insert(leaf.shape, lead.axes, sizes)
  if 0 in shape:
    return
  other = batch.leaves[0].places[1 - batch.side]
  wish = _common(chunk, _seen_from(lead, chunk, other, chunk_shape_of(1 - batch.side, other.source)), shape)
  most, enough = (nbytes // leaf.dtype.itemsize for nbytes in (most_bytes, min(most_bytes, _ENOUGH_BYTES)))
  step = wish if math.prod(wish) <= most else _grown(chunk, wish, most)
  step = _grown(step, shape, enough)
  for start in itertools.product(*(range(0, size, width) for size, width in zip(shape, step))):
    region = tuple(slice(a, min(a + width, size)) for a, width, size in zip(start, step, shape))
    if block := _block(batch, lead.axes, region):
      yield block


def _block(batch, axes, region) -> Block | None:
  """What stands in this region of the leading array, and its counterparts."""
  held = [item for item in batch.leaves if _holds(region, item.places[batch.side])]
  if not held:  # Layers that only one side has.
    return None
  inner = leaf_moves.remove(region, axes)  # The part of each canonical leaf.
  reads = [Read(batch.side, batch.source, region)]
  number_of = {}
  for source in dict.fromkeys(item.places[1 - batch.side].source for item in held):
    places = [place for item in held if (place := item.places[1 - batch.side]).source == source]
    number_of[source] = len(reads)
    reads.append(Read(1 - batch.side, source, leaf_moves.insert(inner, places[0].axes, _spans(places))))
  cells = []
  for item in held:
    number = number_of[item.places[1 - batch.side].source]
    numbers = (0, number) if batch.side == 0 else (number, 0)
    inside = [_inside(place, reads[number].region) for place, number in zip(item.places, numbers)]
    cells.append(Cell(item, tuple(part.start for part in inner), numbers, (inside[0], inside[1])))
  return Block(tuple(reads), tuple(cells))


def _holds(region: Region, place: canonical.Place) -> bool:
  return all(region[axis].start <= index < region[axis].stop for axis, index in zip(place.axes, place.index))


def _spans(places: Sequence[canonical.Place]) -> tuple[slice, ...]:
  """Along each layer axis, from the first index of these places to the last."""
  along = zip(*(place.index for place in places))
  return tuple(slice(min(indices), max(indices) + 1) for indices in along)


def _inside(place: canonical.Place, region: Region) -> tuple[int | slice, ...]:
  """The index, inside a region that was read, of what belongs to a place."""
  index: list[int | slice] = [slice(None)] * len(region)
  for axis, number in zip(place.axes, place.index):
    index[axis] = number - region[axis].start
  return tuple(index)


def _seen_from(lead: canonical.Place, chunk, other: canonical.Place, other_chunk) -> tuple[int, ...]:
  """The other side's chunk shape, in the axes of the leading array."""
  layers = [other_chunk[axis] for axis in other.axes]
  if len(layers) != len(lead.axes):  # The layers are apart there, or in other blocks.
    layers = [chunk[axis] for axis in lead.axes]
  return leaf_moves.insert(leaf_moves.remove(other_chunk, other.axes), lead.axes, layers)


def _common(one, other, shape) -> tuple[int, ...]:
  """The smallest box that is made of whole chunks of both."""
  return tuple(min(math.lcm(a, b), max(a, size)) for a, b, size in zip(one, other, shape))


def _grown(step, shape, elements: int) -> tuple[int, ...]:
  """A box, doubled towards `shape`, along the last axes first, while it has at most `elements`."""
  step = list(step)
  for axis in reversed(range(len(step))):
    while step[axis] < shape[axis] and 2 * math.prod(step) <= elements:
      step[axis] *= 2
  return tuple(step)
