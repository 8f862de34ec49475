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

"""The plan of a conversion: for every target leaf, where it comes from. No I/O and no arrays.

A plan is made from two abstract states and can be printed, checked, inverted and costed before a byte moves.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import itertools
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts

Path = abstract_state.Path

# The first key of a source leaf that no checkpoint has, for it is held in memory: where it is from.
MADE, FROM_FOLDER = "made by MaxText's model", layouts.FOLDER_STEP[0]
# The only leaf that changes its dtype is the step, and only among these.
STEP_DTYPES = frozenset({"int32", "uint32", "int64", "uint64"})


@dataclasses.dataclass(frozen=True)
class Copy:
  """The target leaf is the source leaf."""

  source: Any  # A path; while layers are being arranged, a variable. Likewise below.


@dataclasses.dataclass(frozen=True)
class Stack:
  """The target leaf is the source leaves stacked along new axes.

  Attributes:
    sources: the source leaves, in C order of their place along the axes.
    axes: the places of the axes in the target's shape, ascending.
    sizes: their lengths.
  """

  sources: tuple[Any, ...]
  axes: tuple[int, ...]
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Slice:
  """The target leaf is the source leaf at one index along each of some axes.

  Attributes:
    source: the source leaf.
    axes: the places of the axes in the source's shape, ascending.
    index: the index along each.
  """

  source: Any
  axes: tuple[int, ...]
  index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Transpose:
  """The target leaf is the source leaf with its axes in another order: `np.transpose(source, axes)`."""

  source: Any
  axes: tuple[int, ...]


Move = Copy | Stack | Slice | Transpose


@dataclasses.dataclass(frozen=True)
class Part:
  """What one source leaf gives to one target leaf.

  Attributes:
    target: the target leaf's path.
    move: the target leaf's move.
    index: for a `Stack`, the source's place in it; for a `Slice`, the index that is taken; () for a `Copy`.
  """

  target: Path
  move: Move
  index: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """A conversion, leaf by leaf. `validate()` holds every invariant.

  Attributes:
    source: the abstract state of the source.
    target: the abstract state of the target.
    moves: for every target leaf that is not an empty node, where it comes from.
    dropped: the source leaves that the target does not get, each with the reason. Empty nodes that the target's
      framework does not write are not among them: they hold nothing.
    source_layout: the layout of the source.
    target_layout: the layout of the target.
    empty_nodes: the optimizer's empty nodes, by their Linen path below `opt_state`, that an NNX target does not write.
      They are kept on record, for the way back.
    scan_layers: what MaxText's `scan_layers` says of the target; None if it has no layer stack.
    source_scan_layers: what it says of the source.
    notes: what the summary shall say besides.
  """

  source: abstract_state.AbstractState
  target: abstract_state.AbstractState
  moves: Mapping[Path, Move]
  dropped: Mapping[Path, str]
  source_layout: layouts.StateLayout
  target_layout: layouts.StateLayout
  empty_nodes: Mapping[Path, Any] = dataclasses.field(default_factory=dict)
  scan_layers: bool | None = None
  source_scan_layers: bool | None = None
  notes: tuple[str, ...] = ()

  def parts(self) -> dict[Path, list[Part]]:
    """For every source leaf that the target gets, the parts that it gives."""
    by_source = {}
    for target, move in self.moves.items():
      for source, index in sources_of(move):
        by_source.setdefault(source, []).append(Part(target, move, index))
    return by_source

  def inverse(self) -> "Plan":
    """The plan that leads back. It exists when nothing is dropped.

    Raises:
      UnaccountedLeafError: a source leaf is dropped.
    """
    if self.dropped:
      path, reason = next(iter(self.dropped.items()))
      raise errors.UnaccountedLeafError(
          path,
          expected="a plan that drops nothing",
          found=f"a leaf dropped: {reason}",
          remedy="Keep it to invert the plan.",
      )
    moves = {source: _inverted(parts) for source, parts in self.parts().items() if not is_held(source)}
    made = {part.target: source[0] for source, parts in self.parts().items() if is_held(source) for part in parts}
    stored = {path: leaf for path, leaf in self.source.leaves.items() if not is_held(path)}
    source = dataclasses.replace(self.source, leaves=stored)
    return Plan(self.target, source, moves, made, self.target_layout, self.source_layout)

  def counts(self) -> dict[str, int]:
    """The number of target leaves by kind of move, or by where they are from; and of dropped source leaves."""
    kinds = [_kind(move) for move in self.moves.values()]
    names = dict.fromkeys(["copy", "stack", "slice", "transpose", *sorted(kinds)])
    return {kind: kinds.count(kind) for kind in names} | {"dropped": len(self.dropped)}

  def lines(self) -> Iterator[str]:
    """The plan for a person: a line for each target leaf, then one for each source leaf that is dropped."""
    for path, move in self.moves.items():
      yield f"{'/'.join(path)}  {described(self.target.leaves[path])}  {_how(move)}"
    for path, reason in self.dropped.items():
      yield f"{'/'.join(path)}  left out: {reason}"

  def validate(self):
    """Checks that no byte is lost, made up or written twice.

    Raises:
      UnaccountedLeafError: a source leaf, or an index along its sliced axis, is not consumed exactly once or dropped.
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
        _check_result(path, leaf, self.moves.get(path), self.source.leaves)


def is_held(source: Path) -> bool:
  """Whether a source leaf is held in memory, not read from a checkpoint."""
  return source[0] in (MADE, FROM_FOLDER)


def described(leaf: abstract_state.Leaf) -> str:
  """A leaf's shape and dtype, or the leaf itself."""
  return f"{tuple(leaf.shape)} {leaf.dtype}" if abstract_state.is_array(leaf) else repr(leaf)


def insert[T](values: Sequence[T], axes: tuple[int, ...], new: Iterable[T]) -> tuple[T, ...]:
  """`values`, one for each axis, with `new` ones put in at the ascending places `axes`."""
  result = list(values)
  for axis, value in zip(axes, new):
    result.insert(axis, value)
  return tuple(result)


def remove[T](values: Sequence[T], axes: tuple[int, ...]) -> tuple[T, ...]:
  """`values`, one for each axis, without those at `axes`."""
  return tuple(value for axis, value in enumerate(values) if axis not in axes)


def sources_of(move: Move) -> Iterator[tuple[Path, tuple[int, ...]]]:
  """The source leaves of a move, each with its index along the layer axes."""
  if isinstance(move, Stack):
    yield from zip(move.sources, itertools.product(*map(range, move.sizes)))
  else:
    yield move.source, move.index if isinstance(move, Slice) else ()


def result_shape(move: Move, source_shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape that `move` makes of a source leaf of this shape; of each of its source leaves, for a `Stack`."""
  return moved(source_shape, move, move.sizes if isinstance(move, Stack) else ())


def moved[T](values: Sequence[T], move: Move, new: Iterable[T]) -> tuple[T, ...]:
  """What a source leaf has for each axis, as the target leaf has it; `new` for the axes that a `Stack` puts in."""
  if isinstance(move, Stack):
    return insert(values, move.axes, new)
  if isinstance(move, Slice):
    return remove(values, move.axes)
  if isinstance(move, Transpose):
    return tuple(values[axis] for axis in move.axes)
  return tuple(values)


def _kind(move: Move) -> str:
  """The name of the move; for a leaf held in memory, where it is from."""
  source, _ = next(sources_of(move))
  return source[0] if is_held(source) else type(move).__name__.lower()


def _how(move: Move) -> str:
  """A move for a person."""
  sources = ["/".join(source) for source, _ in sources_of(move) if not is_held(source)]
  if not sources:
    return _kind(move)
  axes = "" if isinstance(move, Copy) else f" axis {_numbers(move.axes)}"
  index = f" index {_numbers(move.index)}" if isinstance(move, Slice) else ""
  origin = sources[0] if len(sources) == 1 else f"{sources[0]} … {sources[-1]} ({len(sources)})"
  return f"{_kind(move)}{axes}{index} of {origin}"


def _numbers(values: tuple[int, ...]) -> str:
  return ", ".join(map(str, values))


def _inverted(parts: list[Part]) -> Move:
  """The move that rebuilds a source leaf from the parts that it gave."""
  first = parts[0].move
  if isinstance(first, Slice):
    ordered = sorted(parts, key=lambda part: part.index)
    sizes = tuple(last + 1 for last in ordered[-1].index)
    return Stack(tuple(part.target for part in ordered), first.axes, sizes)
  if isinstance(first, Stack):
    return Slice(parts[0].target, first.axes, parts[0].index)
  if isinstance(first, Transpose):
    return Transpose(parts[0].target, tuple(first.axes.index(axis) for axis in range(len(first.axes))))
  return Copy(parts[0].target)


def _check_paths(paths, moves):
  inner = {path[:i] for path in paths for i in range(1, len(path))}
  for path in paths:
    if path in inner:
      origin = next(sources_of(moves[path]))[0] if path in moves else path
      raise errors.PathCollisionError(
          origin,
          expected="a path of its own in the target",
          found=f"{'/'.join(path)}, below which there are leaves too",
          remedy="Rename one of them in the source.",
      )


def _check_consumed(path, leaf, parts, is_dropped):
  """A source leaf is wholly consumed, exactly once, or dropped."""
  slices = sorted(part.index for part in parts if isinstance(part.move, Slice))
  axes = {part.move.axes for part in parts if isinstance(part.move, Slice)}
  if is_dropped:
    complete = not parts
  elif slices:
    indices = list(itertools.product(*(range(leaf.shape[axis]) for axis in min(axes))))
    complete = len(parts) == len(slices) and len(axes) == 1 and slices == indices
  else:
    complete = len(parts) == 1
  if not complete:
    raise errors.UnaccountedLeafError(
        path,
        expected="to be consumed exactly once",
        found=f"{len(parts)} target leaves made of it" + (", and dropped" if is_dropped else ""),
        remedy="This is a defect of the converter: please report it.",
    )


def _check_result(path, leaf, move, sources):
  """A move yields the shape and dtype of its target leaf."""
  if move is None:
    raise errors.UnaccountedLeafError(
        path, expected="a source leaf", found="none", remedy="This is a defect of the converter: please report it."
    )
  for source, _ in sources_of(move):
    origin = sources[source]
    if not abstract_state.is_array(origin):
      if not isinstance(move, Copy) or origin is not leaf:
        raise _result_error(path, "a Python scalar copied as it is", f"{type(move).__name__} of {origin!r}")
      continue
    shape, dtype = result_shape(move, origin.shape), str(origin.dtype)
    if shape != tuple(leaf.shape):
      raise _result_error(path, f"shape {tuple(leaf.shape)}", f"{shape} made of {'/'.join(source)}")
    is_step_cast = isinstance(move, Copy) and shape == () and {dtype, str(leaf.dtype)} <= STEP_DTYPES
    if dtype != str(leaf.dtype) and not is_step_cast:
      raise _result_error(path, f"dtype {leaf.dtype}", f"{dtype} of {'/'.join(source)}")


def _result_error(path, expected, found) -> errors.LayerStackError:
  return errors.LayerStackError(
      path,
      expected=expected,
      found=found,
      remedy="Layers that differ cannot be stacked: convert with --scan_layers=False.",
  )
