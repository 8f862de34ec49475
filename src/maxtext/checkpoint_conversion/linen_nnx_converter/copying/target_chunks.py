# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The chunks of the target's arrays: the source's, pieces of them, or several joined."""

from collections.abc import Sequence
import itertools
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import write_specs

Shape = tuple[int, ...]

# Small chunks are joined up to this size by default: larger ones gain nothing, and a device that needs a piece of a chunk
# reads all of it.
_JOINED_BYTES = 16 * 2**20


def kept(move: leaf_moves.Move, origin: Any) -> Shape:
  """A source leaf's chunks in a target leaf: in a stack, with one layer per chunk.

  So each source chunk is decoded once, no target chunk is written twice, and a stack can be sliced by reference.
  """
  return move.across(origin.chunk_shape, itertools.repeat(1))


def wanted(move: leaf_moves.Move, origin: Any, leaf: Any, form: storage_form.StorageForm, room: int) -> Shape:
  """The requested chunks, or the kept ones if none are requested.

  Args:
    move: what makes the target leaf.
    origin: how its first source leaf is stored, a `reader.StoredLeaf`.
    leaf: the target leaf.
    form: how the target is stored.
    room: bytes of the source that may be held at once to fill joined chunks.
  """
  return _fitted(move, origin, leaf, form.most_chunk_bytes, form.chunk_byte_size or 0, room)


def streamed(move: leaf_moves.Move, origin: Any, leaf: Any, form: storage_form.StorageForm, room: int) -> Shape:
  """The chunks of a leaf that is decoded anyway: small ones are joined to the source's size, to save keys."""
  goal = form.chunk_byte_size or min(_JOINED_BYTES, math.prod(origin.chunk_shape) * origin.dtype.itemsize)
  return _fitted(move, origin, leaf, form.most_chunk_bytes, goal, room)


def _fitted(move, origin, leaf, most, goal, room) -> Shape:
  """The kept chunks, split to at most `most` bytes, or joined to at most `goal`.

  They are split into equal pieces, as by Orbax. They are never joined along layer axes, because each layer is a leaf of
  its own on the other side.
  """
  chunk, itemsize = kept(move, origin), leaf.dtype.itemsize
  if math.prod(chunk) * itemsize > most:
    return write_specs.split(tuple(leaf.shape), chunk, leaf.dtype, most)
  layers = math.prod(origin.chunk_shape[axis] for axis in move.taken)
  elements = min(min(goal, most) // itemsize, room // (layers * origin.dtype.itemsize))
  bounds = [1 if axis in move.stacked else size for axis, size in enumerate(leaf.shape)]
  joined = grown(bounds, chunk, elements)
  return chunk if joined == chunk else tuple(map(min, joined, map(max, bounds, chunk)))


def grown(bounds: Sequence[int], chunk_shape: Shape, elements: int) -> Shape:
  """A multiple of the chunk shape, of at most so many elements or one chunk; the last axes grow first, to the bounds."""
  shape = list(chunk_shape)
  for axis in reversed(range(len(shape))):
    room = elements // max(1, math.prod(shape))
    shape[axis] *= max(1, min(room, -(-bounds[axis] // max(1, chunk_shape[axis]))))
    if shape[axis] < bounds[axis]:
      break
  return tuple(shape)
