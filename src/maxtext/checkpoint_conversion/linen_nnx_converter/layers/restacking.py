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

"""Restacking: the move that makes a stack's leaf out of the leaves that hold its layers. No I/O."""

import collections
import dataclasses
import itertools
import math

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

LayerStack = layer_stacks.LayerStack
Variable = leaf_roles.Variable


@dataclasses.dataclass(frozen=True)
class Held:
  """A source variable that holds layers.

  Attributes:
    variable: the variable.
    leaf: its leaf.
    stack: the stack of layers that it belongs to.
    axes: the layer axes of its leaf.
    shape: the shape of one layer.
  """

  variable: Variable
  leaf: abstract_state.Leaf
  stack: LayerStack
  axes: tuple[int, ...]
  shape: tuple[int, ...]

  def __str__(self) -> str:
    return f"{self.shape} {self.leaf.dtype}" if abstract_state.is_array(self.leaf) else repr(self.leaf)

  def is_like(self, other: "Held") -> bool:
    """Whether one layer's part has the shape and dtype of another's."""
    if not abstract_state.is_array(self.leaf) or not abstract_state.is_array(other.leaf):
      return str(self) == str(other)
    return self.shape == other.shape and self.leaf.dtype == other.leaf.dtype


# One layer's leaf: what holds it, and its index along the layer axes.
Piece = tuple[Held, leaf_moves.Index]


def move(pieces: list[Piece], axes: tuple[int, ...], sizes: tuple[int, ...], is_mixed: bool = False) -> leaf_moves.Move:
  """The move that puts pieces, in C order of their places, along the `axes` of a leaf, of the given `sizes`.

  A layer axis of the source that is unchanged in the target is kept whole.

  Args:
    pieces: the pieces.
    axes: the layer axes of the target.
    sizes: their lengths.
    is_mixed: whether the group also has layers along other axes, in source or target; an axis is then kept whole only
      where the target gets all of the source.
  """
  held, index = pieces[0]
  if not sizes:
    return leaf_moves.Move(((held.variable, index),), taken=held.axes)
  if any(other.axes != held.axes for other, _ in pieces) or (is_mixed and not _are_whole(pieces)):
    return _taken_apart(pieces, axes, sizes)
  own, stacked, passing = list(held.axes), list(range(len(sizes))), {}
  by_place = dict(zip(itertools.product(*map(range, sizes)), ((piece.variable, index) for piece, index in pieces)))
  for at, (axis, size) in enumerate(zip(axes, sizes)):
    for source_axis in list(own):
      smaller = _without(by_place, stacked.index(at), own.index(source_axis))
      if smaller is not None and held.leaf.shape[source_axis] == size:
        by_place, passing[axis] = smaller, source_axis
        stacked.remove(at)
        own.remove(source_axis)
        break
  inner = iter(axis for axis in range(len(held.leaf.shape)) if axis not in held.axes) if held.axes else itertools.count()
  rank = len(held.shape) + len(sizes)
  new = {axes[at] for at in stacked}
  order = [passing[axis] if axis in passing else next(inner) for axis in range(rank) if axis not in new]
  kept = sorted(order)
  order = tuple(kept.index(axis) for axis in order)
  return leaf_moves.Move(
      tuple(by_place.values()),
      taken=tuple(own),
      order=() if order == tuple(range(len(order))) else order,
      stacked=tuple(sorted(new)),
      sizes=tuple(sizes[at] for at in stacked),
  )


def _without(by_place, at: int, own: int):
  """The pieces without an axis of their places and one of their sources, if they coincide along these; else None."""
  smaller = {}
  for place, (variable, index) in by_place.items():
    piece = variable, (*index[:own], *index[own + 1 :])
    if place[at] != index[own] or smaller.setdefault((*place[:at], *place[at + 1 :]), piece) != piece:
      return None
  return smaller


def _are_whole(pieces: list[Piece]) -> bool:
  """Whether these are all layers of all their sources."""
  counts = collections.Counter(held.variable for held, _ in pieces)
  return all(counts[held.variable] == math.prod(held.leaf.shape[axis] for axis in held.axes) for held, _ in pieces)


def _taken_apart(pieces: list[Piece], axes: tuple[int, ...], sizes: tuple[int, ...]) -> leaf_moves.Move:
  """The move of single layers, whose sources may have them along different axes."""
  taken = pieces[0][0].axes
  other_axes = {held.variable: held.axes for held, _ in pieces if held.axes != taken}
  named = tuple((held.variable, index) for held, index in pieces)
  return leaf_moves.Move(named, taken=taken, stacked=axes, sizes=sizes, other_axes=tuple(other_axes.items()))
