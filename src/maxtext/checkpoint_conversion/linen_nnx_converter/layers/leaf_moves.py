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

"""Moves: what a target leaf is made of, with the algebra of its shapes, regions and values. No I/O."""

from collections.abc import Iterable, Sequence
import dataclasses
from typing import Any

import numpy as np

Index = tuple[int, ...]
Region = tuple[slice, ...]  # A box of an array: a slice with a start and a stop for each axis.


@dataclasses.dataclass(frozen=True)
class Move:
  """What a target leaf is made of: one whole source leaf or a slice of it, or several of these stacked.

  A layer's leaf is copied, stacked with others, or sliced out of a stack; between two kinds of stacks it is both.

  Attributes:
    pieces: in C order of their places along `stacked`, each a source leaf and its index along `taken`. A source is a
      path, or a variable while layers are being arranged.
    taken: the axes of the sources along which a piece is one index, ascending; `other_axes` has the exceptions.
    order: the order of the other axes in the target, as `np.transpose` takes it; () keeps it.
    stacked: the axes of the target along which the pieces lie, ascending.
    sizes: the lengths of these.
    other_axes: sources whose layers are along other axes than `taken`, for layers inside and outside a pipeline.
  """

  pieces: tuple[tuple[Any, Index], ...]
  taken: tuple[int, ...] = ()
  order: tuple[int, ...] = ()
  stacked: tuple[int, ...] = ()
  sizes: tuple[int, ...] = ()
  other_axes: tuple[tuple[Any, tuple[int, ...]], ...] = ()

  @property
  def kind(self) -> str:
    """`copy`, `stack`, `slice`, `restack` (slices, stacked) or `transpose`."""
    if self.stacked:
      return "restack" if self.taken or self.other_axes else "stack"
    return "slice" if self.taken else "transpose" if self.order else "copy"

  @property
  def sources(self) -> list[Any]:
    """The source leaves, each once."""
    return list(dict.fromkeys(source for source, _ in self.pieces))

  def axes(self, source: Any) -> tuple[int, ...]:
    """The axes of a source along which a piece of it is one index."""
    return dict(self.other_axes).get(source, self.taken) if self.other_axes else self.taken

  def across[T](self, values: Sequence[T], new: Iterable[T], source: Any = None) -> tuple[T, ...]:
    """Per-axis values of a source, by default the first, rearranged for the target, with `new` for stacked axes."""
    left = remove(values, self.taken if source is None else self.axes(source))
    return insert([left[axis] for axis in self.order] if self.order else left, self.stacked, new)

  def back[T](self, values: Sequence[T], taken: Iterable[T], source: Any) -> tuple[T, ...]:
    """Per-axis values of the target rearranged for a source, with `taken` for the taken axes. Undoes `across`."""
    left = remove(values, self.stacked)
    return insert([left[axis] for axis in np.argsort(self.order)] if self.order else left, self.axes(source), taken)

  def shape(self, source_shape: Sequence[int], source: Any = None) -> tuple[int, ...]:
    """The target's shape, given that of a source: the first, if none is given."""
    return self.across(source_shape, self.sizes, source)

  def place(self, number: int) -> Index:
    """Where a piece lies along the `stacked` axes."""
    return tuple(map(int, np.unravel_index(number, self.sizes))) if self.sizes else ()

  def region(self, number: int, region: Region) -> Region | None:
    """The region of the target that a region of a piece's source fills; None if it does not hold the piece."""
    source, index = self.pieces[number]
    if not all(region[axis].start <= at < region[axis].stop for axis, at in zip(self.axes(source), index)):
      return None
    return self.across(region, (slice(at, at + 1) for at in self.place(number)), source)

  def values(self, number: int, region: Region, data: Any) -> Any:
    """The values of that region of the target, given the source region's `data`: a view, not a copy."""
    inside: list[Any] = [slice(None)] * len(region)
    source, index = self.pieces[number]
    for axis, at in zip(self.axes(source), index):
      inside[axis] = at - region[axis].start
    left = data[tuple(inside)]
    return np.expand_dims(left.transpose(self.order) if self.order else left, self.stacked)


def insert[T](values: Sequence[T], axes: Iterable[int], new: Iterable[T]) -> tuple[T, ...]:
  """Per-axis `values` with `new` ones inserted at the ascending `axes`."""
  result = list(values)
  for axis, value in zip(axes, new):
    result.insert(axis, value)
  return tuple(result)


def remove[T](values: Sequence[T], axes: Sequence[int]) -> tuple[T, ...]:
  """Per-axis `values` without those at `axes`."""
  return tuple(value for axis, value in enumerate(values) if axis not in axes) if axes else tuple(values)


def copy(source: Any) -> Move:
  """The move of a leaf that is a copy of its source."""
  return Move(((source, ()),))
