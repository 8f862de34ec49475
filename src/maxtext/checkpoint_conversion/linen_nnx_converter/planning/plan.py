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

"""The plan of a conversion: where every target leaf comes from. No I/O and no arrays.

A plan is made of two abstract states, and can be printed, checked, inverted and costed before a byte moves.
"""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts

Path = abstract_state.Path
# The first key of a source leaf that is held in memory and in no checkpoint: where it is from.
MADE, FROM_FOLDER = "made by MaxText's model", layouts.FOLDER_STEP[0]
# The step may change between these dtypes without being asked to.
STEP_DTYPES = frozenset({"int32", "uint32", "int64", "uint64"})


@dataclasses.dataclass(frozen=True)
class Part:
  """What one source leaf contributes to one target leaf: a piece of its move, by number."""

  target: Path
  move: leaf_moves.Move
  number: int

  @property
  def index(self) -> leaf_moves.Index:
    """Its index along the taken axes of the source."""
    return self.move.pieces[self.number][1]

  @property
  def axes(self) -> tuple[int, ...]:
    """The axes of the source along which it is one index."""
    return self.move.axes(self.move.pieces[self.number][0])

  def piece(self, region: leaf_moves.Region, data: Any) -> tuple[leaf_moves.Region | None, Any]:
    """The region of the target that a region of the source fills, and its values, given the source region's `data`."""
    return self.move.region(self.number, region), self.move.values(self.number, region, data)


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion, leaf by leaf. `validate()` checks every invariant.

  Attributes:
    source: the abstract state of the source.
    target: the abstract state of the target.
    moves: for every target leaf that is not an empty node, where it comes from.
    dropped: the source leaves that the target does not get, each with the reason; not empty nodes, which hold nothing.
    source_layout: the layout of the source.
    target_layout: the layout of the target.
    empty_nodes: those that an NNX target does not write, by Linen path below `opt_state`, to be recorded.
    scan_layers: MaxText's `scan_layers` for the target; None if it has no layer stack.
    source_scan_layers: the same for the source.
    cast_to: the dtypes that leaves are cast to on request.
    merges: the `lora.Adapter` of each source leaf that one is merged into.
  """

  source: abstract_state.AbstractState
  target: abstract_state.AbstractState
  moves: Mapping[Path, leaf_moves.Move]
  dropped: Mapping[Path, str]
  source_layout: layouts.StateLayout
  target_layout: layouts.StateLayout
  empty_nodes: Mapping[Path, Any] = dataclasses.field(default_factory=dict)
  scan_layers: bool | None = None
  source_scan_layers: bool | None = None
  cast_to: frozenset[str] = frozenset()
  merges: Mapping[Path, Any] = dataclasses.field(default_factory=dict)

  def parts(self) -> dict[Path, list[Part]]:
    """The parts of every source leaf that the target gets."""
    by_source = {}
    for target, move in self.moves.items():
      for number, (source, _) in enumerate(move.pieces):
        by_source.setdefault(source, []).append(Part(target, move, number))
    return by_source

  def is_merged(self, target: Path) -> bool:
    """Whether a target leaf is made of weights that adapters are merged into."""
    return bool(self.merges) and not self.merges.keys().isdisjoint(self.moves[target].sources)

  def below(self, key: str) -> "Plan":
    """The plan of the part of the target below a key, as a tree of its own, from the whole source."""
    inner = lambda paths: [path for path in paths if path[0] == key]
    leaves = {path[1:]: self.target.leaves[path] for path in inner(self.target.leaves)}
    lists = frozenset(path[1:] for path in inner(self.target.lists))
    moves = {path[1:]: self.moves[path] for path in inner(self.moves)}
    return dataclasses.replace(self, target=abstract_state.AbstractState(leaves, lists), moves=moves)

  def casts(self) -> dict[str, int]:
    """How many target leaves are cast on request, by source and target dtype."""
    if not self.cast_to:
      return {}
    found = collections.Counter()
    for path, move in self.moves.items():
      leaf, origins = self.target.leaves[path], [self.source.leaves[source] for source in move.sources]
      if abstract_state.is_array(leaf):
        found.update({f"{origin.dtype} to {leaf.dtype}" for origin in origins if is_float_cast(origin, leaf)})
    return dict(found)

  def inverse(self) -> "Plan":
    """The plan that leads back, which exists if nothing is dropped or cast.

    Raises:
      UnaccountedLeafError: a source leaf is dropped, or a target leaf is cast.
    """
    if self.dropped:
      path, reason = next(iter(self.dropped.items()))
      raise errors.UnaccountedLeafError(
          path, "a plan that drops nothing", f"a leaf dropped: {reason}", "Keep it to invert the plan."
      )
    for path, move in self.moves.items():
      leaf, origin = self.target.leaves[path], self.source.leaves[move.sources[0]]
      if abstract_state.is_array(leaf) and is_float_cast(origin, leaf):
        cast = f"{origin.dtype} cast to {leaf.dtype}"
        raise errors.UnaccountedLeafError(path, "a plan that casts nothing", cast, "Keep its dtype to invert the plan.")
    moves = {source: _inverted(parts) for source, parts in self.parts().items() if not is_held(source)}
    made = {part.target: source[0] for source, parts in self.parts().items() if is_held(source) for part in parts}
    stored = {path: leaf for path, leaf in self.source.leaves.items() if not is_held(path)}
    source = dataclasses.replace(self.source, leaves=stored)
    return Plan(self.target, source, moves, made, self.target_layout, self.source_layout)

  def counts(self) -> dict[str, int]:
    """The number of target leaves by kind of move or by origin, and of dropped source leaves."""
    kinds = [_kind(move) for move in self.moves.values()]
    names = dict.fromkeys(["copy", "stack", "slice", "transpose", *sorted(kinds)])
    return {kind: kinds.count(kind) for kind in names} | {"dropped": len(self.dropped)}

  def lines(self) -> Iterator[str]:
    """The plan for a person: a line for each target leaf, then one for each dropped source leaf."""
    for path, move in self.moves.items():
      merged = ", LoRA adapter merged" if self.is_merged(path) else ""
      yield f"{'/'.join(path)}  {described(self.target.leaves[path])}  {_how(move)}{merged}"
    for path, reason in self.dropped.items():
      yield f"{'/'.join(path)}  left out: {reason}"

  def validate(self):
    """Checks that no byte is lost, invented or written twice.

    Raises:
      UnaccountedLeafError: a source leaf, or an index along its taken axes, is not consumed exactly once or dropped.
      PathCollisionError: a target leaf's path is also an inner node's.
      LayerStackError: a move does not yield the target leaf's shape and dtype.
    """
    _check_paths(self.target.leaves, self.moves)
    consumers = self.parts()
    for path, leaf in self.source.leaves.items():
      if not abstract_state.is_empty(leaf):
        _check_consumed(path, leaf, consumers.get(path, []), path in self.dropped)
    for path, leaf in self.target.leaves.items():
      if not abstract_state.is_empty(leaf):
        _check_result(path, leaf, self.moves.get(path), self.source.leaves, self.cast_to)


def whole_chunks(
    source: Path,
    chunk_shape: tuple[int, ...],
    parts: Iterable[Part],
    target_chunk_shape_of: Callable[[Path], tuple[int, ...]],
) -> tuple[int, ...]:
  """The smallest region of a source leaf that cuts neither its own chunks nor those of its `parts`' targets."""
  shape = chunk_shape
  for part in parts:
    theirs = part.move.back(target_chunk_shape_of(part.target), itertools.repeat(1), source)
    shape = tuple(map(math.lcm, shape, theirs))
  return shape


def is_step_cast(origin: abstract_state.Leaf, leaf: abstract_state.Leaf) -> bool:
  """Whether both are scalars of dtypes that a step may have."""
  return origin.shape == leaf.shape == () and {str(origin.dtype), str(leaf.dtype)} <= STEP_DTYPES


def is_float_cast(origin: abstract_state.Leaf, leaf: abstract_state.Leaf) -> bool:
  """Whether they have two different dtypes that can be cast into each other on request."""
  return origin.dtype != leaf.dtype and {str(origin.dtype), str(leaf.dtype)} <= abstract_state.FLOATS


def is_held(source: Path) -> bool:
  """Whether a source leaf is held in memory rather than read from a checkpoint."""
  return source[0] in (MADE, FROM_FOLDER)


def described(leaf: abstract_state.Leaf) -> str:
  """A leaf's shape and dtype, or the leaf itself."""
  return f"{tuple(leaf.shape)} {leaf.dtype}" if abstract_state.is_array(leaf) else repr(leaf)


def _kind(move: leaf_moves.Move) -> str:
  """The kind of the move, or the origin of a leaf held in memory."""
  return move.sources[0][0] if is_held(move.sources[0]) else move.kind


def _how(move: leaf_moves.Move) -> str:
  """A move for a person."""
  names = ["/".join(source) for source in move.sources]
  if is_held(move.sources[0]):
    return _kind(move)
  axes = move.taken if move.kind == "slice" else move.stacked or move.order
  where = f" axis {_numbers(axes)}" if axes else ""
  index = f" index {_numbers(move.pieces[0][1])}" if move.kind == "slice" else ""
  origin = names[0] if len(names) == 1 else f"{names[0]} … {names[-1]} ({len(names)})"
  return f"{move.kind}{where}{index} of {origin}"


def _numbers(values: tuple[int, ...]) -> str:
  return ", ".join(map(str, values))


def _inverted(parts: list[Part]) -> leaf_moves.Move:
  """The move that rebuilds a source leaf from its parts."""
  first, ordered = parts[0].move, sorted(parts, key=lambda part: part.index)
  stacked = {part.target: part.move.stacked for part in parts}
  return leaf_moves.Move(
      tuple((part.target, part.move.place(part.number)) for part in ordered),
      taken=first.stacked,
      order=tuple(map(int, np.argsort(first.order))),
      stacked=parts[0].axes,
      sizes=tuple(last + 1 for last in ordered[-1].index),
      other_axes=tuple((target, axes) for target, axes in stacked.items() if axes != first.stacked),
  )


def _check_paths(paths, moves):
  inner = abstract_state.inner_nodes(paths)
  for path in paths:
    if path in inner:
      origin = moves[path].sources[0] if path in moves else path
      raise errors.PathCollisionError(
          origin,
          "a path of its own in the target",
          f"{'/'.join(path)}, below which there are leaves too",
          "Rename one of them in the source.",
      )


def _check_consumed(path, leaf, parts, is_dropped):
  """Checks that a source leaf is either wholly consumed, exactly once, or dropped."""
  taken = {part.axes for part in parts}
  if is_dropped or len(taken) != 1:
    complete = is_dropped and not parts
  else:
    indices = itertools.product(*(range(leaf.shape[axis]) for axis in min(taken)))
    complete = sorted(part.index for part in parts) == list(indices)
  if not complete:
    raise errors.UnaccountedLeafError(
        path,
        "to be consumed exactly once",
        f"{len(parts)} target leaves made of it" + (", and dropped" if is_dropped else ""),
    )


def _check_result(path, leaf, move, sources, cast_to):
  """Checks that a move yields the shape and dtype of its target leaf."""
  if move is None:
    raise errors.UnaccountedLeafError(path, "a source leaf", "none")
  for source in move.sources:
    origin = sources[source]
    if not abstract_state.is_array(origin):
      if move.kind != "copy" or origin is not leaf:
        raise _result_error(path, "a Python scalar copied as it is", f"{move.kind} of {origin!r}")
      continue
    shape = move.shape(origin.shape, source)
    if shape != tuple(leaf.shape):
      raise _result_error(path, f"shape {tuple(leaf.shape)}", f"{shape} made of {'/'.join(source)}")
    if origin.dtype == leaf.dtype or (str(leaf.dtype) in cast_to and is_float_cast(origin, leaf)):
      continue
    if not (move.kind == "copy" and is_step_cast(origin, leaf)):
      raise _result_error(path, f"dtype {leaf.dtype}", f"{origin.dtype} of {'/'.join(source)}")


def _result_error(path, expected, found) -> errors.LayerStackError:
  return errors.LayerStackError(
      path, expected, found, "Layers that differ cannot be stacked: convert with --scan_layers=False."
  )
