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

"""Compares two checkpoints on disk."""

import asyncio
from collections.abc import Callable, Iterator
import functools
import math
import os
import time
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import align
from maxtext.checkpoint_conversion.linen_nnx_comparator import blocks
from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import result
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening

Path = canonical.Path
PathLike = str | os.PathLike[str]

# Two blocks at a time, so that one is measured while the next is decoded.
_WORKERS = 2
# A block is held encoded and decoded, on two sides, by two workers, and the allocator keeps some of what was freed.
_COST_OF_A_BYTE = 16
# Reading a part of a chunk decodes all of it, so not all parts of a block are read at once.
_READS = 4
# Arrays that are kept open: opening one anew reads its metadata again.
_MOST_OPEN = 1024


def compare_checkpoints(
    a: PathLike,
    b: PathLike,
    *,
    param_scan_axes: tuple[int, int] = (1, 1),
    nnx_aux: str = "keep",
    params_only: bool = False,
    atol: float | None = None,
    rtol: float | None = None,
    memory_budget_gib: float = 2.0,
    progress: Any = None,
) -> result.Comparison:
  """Compares two checkpoints; both are only read.

  Args:
    a: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    b: the other one.
    param_scan_axes: the layer axis of scanned Params, in A and in B.
    nnx_aux: `keep` or `drop`: whether to compare NNX state that is no Param.
    params_only: whether to compare the params alone.
    atol: the absolute tolerance; with it or with `rtol`, values that differ within the tolerance are accepted.
    rtol: the relative tolerance, as a share of B's value.
    memory_budget_gib: GiB of memory for data under way. A chunk that is larger is still held whole.
    progress: is told how far the work has come, as `convert_checkpoint` tells it.

  Raises:
    ConversionError: one of its subclasses: no checkpoint there, or none that the converter can map. The message begins
      with the side, A or B.
  """
  begin = time.monotonic()
  chosen = [
      options.Options.of(
          param_scan_axis=axis, nnx_aux=nnx_aux, params_only=params_only, memory_budget_gib=memory_budget_gib
      )
      for axis in param_scan_axes
  ]
  places = [_of_side(side, locations.find_source, path) for side, path in zip("AB", (a, b))]
  checkpoints = [_of_side(side, opening.open_source, place) for side, place in zip("AB", places)]
  trees, notes = _trees(checkpoints, chosen)
  aligned = align.align(*trees)
  tolerance = None if atol is None and rtol is None else difference.Tolerance(atol or 0.0, rtol or 0.0)
  if progress:
    progress.start("comparing", sum(item.sides[0].nbytes for item in aligned if item.is_comparable))
  reading = _Reading(checkpoints, tolerance, chosen[0].memory_budget, progress.advance if progress else None)
  coroutines.run(reading.compare(aligned))
  if progress:
    progress.finish()
  sides = [result.Side(os.fspath(place.items), tree.layout, tree.is_scanned) for place, tree in zip(places, trees)]
  return result.Comparison(
      *sides,
      leaves=[_outcome(item, reading) for item in aligned],
      left_out=[{**tree.left_out} for tree in trees],
      tolerance=tolerance,
      notes=notes,
      seconds=time.monotonic() - begin,
  )


def _trees(checkpoints, chosen) -> tuple[list[canonical.Tree], list[str]]:
  """Both canonical trees, and what is to be said of them.

  Layers whose order is unknown cannot be taken apart: then both checkpoints keep their scanned layers. Where the
  converter refuses a checkpoint, as it does a damaged one, and both are of one layout, their own trees are compared:
  it is worth knowing how a damaged checkpoint differs from a sound one.
  """
  keys = [_keys(checkpoint) for checkpoint in checkpoints]
  found = [_of_side(side, layouts.detect, checkpoint.state) for side, checkpoint in zip("AB", checkpoints)]

  def planned(apart):
    trees = []
    for side, checkpoint, key, options_of_side in zip("AB", checkpoints, keys, chosen):
      plan = functools.partial(canonical.by_plan, apart=apart)
      trees.append(_of_side(side, plan, checkpoint.state, key, options_of_side))
    return trees

  try:
    return planned(True), []
  except errors.ConversionError as refusal:
    if isinstance(refusal, errors.LayerStackError):
      try:
        return planned(False), ["Layers whose order is unknown: scanned layers are compared whole."]
      except errors.ConversionError:
        pass
    if found[0] != found[1] or chosen[0].params_only or chosen[0].nnx_aux != "keep":
      raise
    return (
        [canonical.as_it_stands(checkpoint.state, key) for checkpoint, key in zip(checkpoints, keys)],
        [f"Compared path by path as they stand, since the converter refuses one: {refusal}"],
    )


def _keys(checkpoint) -> dict[Path, str]:
  """The implementations of the typed PRNG keys that a checkpoint holds."""
  return {
      path: leaf.ext_metadata["random_key_impl"]
      for path, leaf in checkpoint.stored.items()
      if isinstance(leaf.ext_metadata, dict) and "random_key_impl" in leaf.ext_metadata
  }


def _of_side[T](side: str, function: Callable[..., T], *args) -> T:
  """Calls `function`, and says of a refusal which side it is about."""
  try:
    return function(*args)
  except errors.ConversionError as e:
    remedy = e.remedy.replace("--source_path", side)
    raise type(e)(f"{side}: {e.path}", e.expected, e.found, remedy) from e


def _outcome(item: align.Aligned, reading: "_Reading") -> result.Outcome:
  if item.structure is None and not item.is_comparable:
    return result.Outcome(item, _of_strings(*(leaf.value for leaf in item.sides)))
  return result.Outcome(item, reading.differences.get(item.path), reading.failures.get(item.path))


def _of_strings(a, b) -> difference.Difference:
  """How leaves differ that are no arrays, which Orbax keeps as strings."""
  if a == b:
    return difference.Difference(elements=1)
  element = difference.Element((), repr(a), repr(b), "", "")
  return difference.Difference(elements=1, differing=1, first=element, outside=1)


class _Reading:
  """Reads the blocks of both checkpoints and collects how they differ.

  Attributes:
    differences: by canonical path, of what was read of each leaf.
    failures: by canonical path, why a leaf cannot be read.
  """

  def __init__(self, checkpoints, tolerance, memory_budget: int, advance: Callable[[int], None] | None):
    self._checkpoints, self._tolerance, self._advance = checkpoints, tolerance, advance
    self._most_bytes = memory_budget // _COST_OF_A_BYTE
    self._gate = asyncio.Semaphore(_READS)
    self._open = {}
    self.differences: dict[Path, difference.Difference] = {}
    self.failures: dict[Path, str] = {}

  async def compare(self, aligned: list[align.Aligned]):
    """Compares all that can be."""
    for item in aligned:
      if item.is_comparable:
        self.differences[item.path] = difference.Difference()
    work = self._blocks(aligned)

    async def take_from_work():
      for block in work:
        await self._compare(block)

    workers = _WORKERS if self._all_small(aligned) else 1
    await streaming.settle(take_from_work() for _ in range(workers))

  def _blocks(self, aligned) -> Iterator[blocks.Block]:
    for batch in align.batches(aligned):
      yield from blocks.blocks(batch, self._chunk_shape_of, self._most_bytes)

  def _chunk_shape_of(self, side, path):
    return self._checkpoints[side].stored[path].chunk_shape

  def _all_small(self, aligned) -> bool:
    """Whether no chunk is larger than a block may be; two that are would be too much."""
    sources = {(side, place.source) for item in aligned if item.is_comparable for side, place in enumerate(item.places)}
    stored = [self._checkpoints[side].stored[path] for side, path in sources]
    return all(math.prod(leaf.chunk_shape) * leaf.dtype.itemsize <= self._most_bytes for leaf in stored)

  async def _compare(self, block: blocks.Block):
    """Reads and measures a block."""
    data = await asyncio.gather(*(self._read(read) for read in block.reads))
    failed = {number: str(found) for number, found in enumerate(data) if isinstance(found, errors.ConversionError)}
    self.failures |= {cell.leaf.path: failed[i] for cell in block.cells for i in cell.reads if i in failed}
    cells = [cell for cell in block.cells if not failed.keys() & set(cell.reads)]
    measured = await asyncio.to_thread(_measured, cells, data, self._tolerance)
    for cell, value in zip(cells, measured):
      self.differences[cell.leaf.path] = self.differences[cell.leaf.path].merged(value)
    if self._advance:
      self._advance(sum(getattr(found, "nbytes", 0) for read, found in zip(block.reads, data) if read.side == 0))

  async def _read(self, read: blocks.Read) -> Any:
    """Reads a region; returns a DamagedSourceError if it cannot, so that the others of its block are still compared."""
    try:
      async with self._gate:
        store = await self._opened(read.side, read.source)
        return await store[read.region].read()
    except ValueError as e:  # What TensorStore raises for missing, truncated or corrupt data.
      place = f"{'AB'[read.side]}: {'/'.join(read.source)}"
      errors.check_access(place, e)
      return errors.DamagedSourceError(place, "chunks that can be read", errors.one_line(e))

  async def _opened(self, side, source):
    if (side, source) not in self._open:
      if len(self._open) >= _MOST_OPEN:
        self._open.pop(next(iter(self._open)))
      self._open[side, source] = await self._checkpoints[side].open(source)
    return self._open[side, source]


def _measured(cells: list[blocks.Cell], data, tolerance) -> list[difference.Difference]:
  """How each cell differs. Where both sides hold the same layers in one array each, first whether anything does."""
  is_like = len(data) == 2 and cells and all(cell.inside[0] == cell.inside[1] for cell in cells)
  if is_like and data[0].dtype == data[1].dtype and difference.same_bits(*data):
    return [difference.Difference(elements=data[0][cell.inside[0]].size) for cell in cells]
  taken = ([data[number][inside] for number, inside in zip(cell.reads, cell.inside)] for cell in cells)
  return [difference.measure(a, b, cell.origin, tolerance) for cell, (a, b) in zip(cells, taken)]
