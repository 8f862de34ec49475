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

"""Compares what was written with the source, to the bit, by code that neither reads nor writes: see `reopen.py`."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
import dataclasses
import itertools
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import merged
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import rounding

Path = abstract_state.Path
Open = Callable[[Path], Awaitable[Any]]
Box = tuple[tuple[int, int], ...]  # (start, stop) for each axis.
Sums = Iterator[tuple[Box, np.ndarray]]
OnEqual = Callable[[Path, Box, np.ndarray], None]

PARTS_AT_ONCE = 4  # Of a box; more would hold as much of the target as of the source.
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # By the bytes of an element.


@dataclasses.dataclass(frozen=True)
class Sides:
  """The arrays that are compared.

  Attributes:
    open_source: opens a source leaf's array.
    open_target: opens a target leaf's array.
    chunk_shape_of: the shape that is decoded at once: a source leaf's chunk, or more, so as not to cut target chunks.
  """

  open_source: Open
  open_target: Open
  chunk_shape_of: Callable[[Path], tuple[int, ...]]


def verify_state(expected: abstract_state.AbstractState, found: abstract_state.AbstractState):
  """Compares the written tree's structure, shapes and dtypes with the plan's.

  Raises:
    VerificationError: naming the first path that differs.
  """
  for path in dict.fromkeys([*expected.leaves, *found.leaves]):
    wanted, got = (plan_lib.described(state.leaves.get(path, "no leaf")) for state in (expected, found))
    if wanted != got:
      raise errors.VerificationError(path, wanted, got)
  for path in sorted(expected.lists ^ found.lists):
    raise errors.VerificationError(path, "a list" if path in expected.lists else "a dict", "the other")


def verify_names(expected: abstract_state.AbstractState, name_of: Callable[[Path], str], found: set[str]):
  """Compares the names of a store's arrays with those that it should have.

  Raises:
    VerificationError: naming the first that is missing or too many.
  """
  arrays = [
      path for path, leaf in expected.leaves.items() if abstract_state.is_array(leaf) and not plan_lib.is_held(path)
  ]
  wanted = {name_of(path) for path in arrays}
  for name in sorted(wanted ^ found):
    raise errors.VerificationError(name, *(("an array", "none") if name in wanted else ("no array", "one")))


async def verify_arrays(
    plan: plan_lib.Plan,
    targets: Iterable[Path],
    sides: Sides,
    *,
    memory_budget: memory.Budget,
    on_verified: Callable[[int], None],
    on_equal: OnEqual | None = None,
    on_failure: Callable[[Path, Exception], None] | None = None,
):
  """Reads every source element that these target leaves have, and compares its bytes with theirs.

  `plan.validate()` has shown that these elements fill the target.

  Args:
    plan: the plan that was carried out.
    targets: the target leaves to compare.
    sides: their arrays, and the source's.
    memory_budget: what the data held at a time may take.
    on_verified: called with the bytes of each verified part.
    on_equal: called, in a thread, with each box of a target leaf that was found equal, and its values.
    on_failure: called with a target leaf's failure, which is then not raised.

  Raises:
    VerificationError: naming the first element that differs.
    DamagedSourceError: a chunk of the source cannot be read.
  """
  targets = frozenset(targets)
  wanted = {path: [part for part in parts if part.target in targets] for path, parts in plan.parts().items()}
  stored = {path: parts for path, parts in wanted.items() if parts and abstract_state.is_array(plan.source.leaves[path])}
  gate, failures = memory_budget.comparisons(), []

  async def verify_part(part, target, box, data):
    if (there := placed(part, box, data)) is None:
      return
    try:
      await verify_box(part.target, target, *there, on_equal, sums_of(plan, part, box, data))
    except errors.VerificationError as e:  # A value differs, or a chunk cannot be read.
      if on_failure is None:
        raise
      on_failure(part.target, e)

  async def verify_leaf(path, parts):
    leaf, chunk_shape = plan.source.leaves[path], sides.chunk_shape_of(path)
    async with gate.inside(memory_budget.read_at_once(leaf, chunk_shape)):
      if failures:
        return
      source = await opened(path, leaf, sides.open_source)
      arrays = await coroutines.settle(opened(p.target, plan.target.leaves[p.target], sides.open_target) for p in parts)
      itemsize = source.dtype.numpy_dtype.itemsize
      for box in boxes(source.shape, chunk_shape, memory_budget.box // itemsize):
        data = await _read_source(path, source, box)
        for some in itertools.batched(zip(parts, arrays), PARTS_AT_ONCE):
          await coroutines.settle(verify_part(part, target, box, data) for part, target in some)
      on_verified(sum(min(math.prod(t.shape), math.prod(source.shape)) for t in arrays) * itemsize)

  async def verify_unless_failed(path, parts):
    try:
      await verify_leaf(path, parts)
    except Exception as e:  # Raised below, when nothing is in flight any more.  pylint: disable=broad-except
      failures.append(e)

  await asyncio.gather(*(verify_unless_failed(path, parts) for path, parts in stored.items()))
  if failures:
    raise failures[0]


async def opened(path: Path, leaf: Any, open_array: Open) -> Any:
  """Opens an array, which must have the planned shape and dtype.

  Raises:
    VerificationError: it does not.
  """
  try:
    array = await open_array(path)
  except (ValueError, KeyError) as e:  # What TensorStore raises if there is none, or it cannot read it.
    raise errors.VerificationError(path, "an array that can be opened", errors.one_line(e)) from e
  found = array.shape, array.dtype.numpy_dtype
  if found != (leaf.shape, leaf.dtype):
    raise errors.VerificationError(path, plan_lib.described(leaf), f"{found[1]}{list(found[0])}")
  return array


async def _read_source(path, source, box) -> np.ndarray:
  try:
    return await source[as_slices(box)].read()
  except ValueError as e:  # What TensorStore raises for a chunk that is missing, truncated or corrupt.
    raise errors.DamagedSourceError(path, "chunks that can be read", errors.one_line(e)) from e


def placed(part: plan_lib.Part, box: Box, data: np.ndarray) -> tuple[Box, np.ndarray] | None:
  """Where a part puts a box of its source, and the values that should be there; None if it uses none of it."""
  move, place, expected = part.move, list(box), data
  for axis, index in reversed(list(zip(part.axes, part.index))):
    start, stop = place.pop(axis)
    if not start <= index < stop:
      return None
    expected = expected[(slice(None),) * axis + (index - start,)]
  if move.order:
    place, expected = [place[axis] for axis in move.order], expected.transpose(move.order)
  number, at = part.number, []
  for size in reversed(move.sizes):  # The last one varies fastest.
    number, index = divmod(number, size)
    at.insert(0, (index, index + 1))
  for axis, bounds in zip(move.stacked, at):
    place.insert(axis, bounds)
  return tuple(place), np.expand_dims(expected, move.stacked)


def sums_of(plan: plan_lib.Plan, part: plan_lib.Part, box: Box, data: np.ndarray) -> Sums | None:
  """What a part puts into the target of a weight that adapters are merged into; None for all others."""
  if (adapter := plan.merges.get(part.move.pieces[part.number][0])) is None:
    return None
  placed_sums = (placed(part, strip, sums) for strip, sums in merged.sums(adapter, box, data))
  return (there for there in placed_sums if there)


async def verify_box(
    path: Path, target: Any, place: Box, expected: np.ndarray, on_equal: OnEqual | None, sums: Sums | None = None
):
  """Compares a box of a target leaf with the values that should be there, which are `sums` if given.

  Raises:
    VerificationError: they differ.
  """
  try:
    found = await target[as_slices(place)].read()
  except ValueError as e:  # What TensorStore raises for a chunk that cannot be read.
    errors.check_access(path, e)
    raise errors.VerificationError(path, "chunks that can be read", errors.one_line(e)) from e
  if sums is not None:
    await asyncio.to_thread(_compare_sums, path, found, sums, place)
  elif plan_lib.is_float_cast(expected, found):
    _compare_rounded(path, found, expected, place)
  else:
    # Of all others, only the step's dtype may differ, but not its value.
    _compare(path, found, expected.astype(found.dtype) if found.shape == () else expected, place)
  if on_equal:
    await asyncio.to_thread(on_equal, path, place, found)


def as_slices(box: Box) -> tuple[slice, ...]:
  """The box as an index."""
  return tuple(slice(start, stop) for start, stop in box)


def boxes(shape, chunk_shape, elements: int) -> Iterator[Box]:
  """Boxes of whole chunks that cover the array: one chunk, doubled while they have at most `elements`."""
  steps = list(chunk_shape)
  for axis in reversed(range(len(shape))):
    while steps[axis] < shape[axis] and 2 * math.prod(steps) <= elements:
      steps[axis] *= 2
  for start in itertools.product(*(range(0, size, step) for size, step in zip(shape, steps))):
    yield tuple((a, min(a + step, size)) for a, step, size in zip(start, steps, shape))


def _compare(path, found, expected, place):
  """Compares bytes, so that NaNs, signed zeros and all dtypes count as stored."""
  if found.dtype != expected.dtype:
    raise errors.VerificationError(path, str(expected.dtype), str(found.dtype))
  bits = _BITS.get(found.dtype.itemsize)
  if bits and np.array_equal(found.view(bits), expected.view(bits)):  # Copies neither, with any strides.
    return
  found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
  if found.tobytes() == expected.tobytes():
    return
  as_bytes = lambda array: array.reshape(array.size, 1).view(np.uint8)
  different = int(np.argmax((as_bytes(found) != as_bytes(expected)).any(axis=1)))
  inside = np.unravel_index(different, found.shape)
  raise errors.VerificationError(path, f"{expected[inside]} at index {_index(place, inside)}", f"{found[inside]}")


def _compare_rounded(path, found, source, place):
  """Compares numbers that were cast on request with the original ones."""
  different = rounding.first_difference(found, source)
  if different is not None:
    inside = np.unravel_index(different, found.shape)
    number = rounding.rounded(rounding.exact(source[inside].reshape(1)), str(found.dtype))[0]
    raise errors.VerificationError(
        path, f"{number:.9g} at index {_index(place, inside)}, for {source[inside]}", f"{found[inside]}"
    )


def _compare_sums(path, found, sums, place):
  """Compares weights that adapters were merged into with the right sums, strip by strip."""
  for strip, expected in sums:
    inside = tuple(slice(start - begin, stop - begin) for (start, stop), (begin, _) in zip(strip, place))
    different = merged.first_difference(found[inside], expected)
    if different is not None:
      at = np.unravel_index(different, found[inside].shape)
      raise errors.VerificationError(
          path, f"{expected['value'][at]:.9g} at index {_index(strip, at)}", f"{found[inside][at]}"
      )


def _index(place, inside) -> tuple[int, ...]:
  return tuple(int(start + offset) for (start, _), offset in zip(place, inside))
