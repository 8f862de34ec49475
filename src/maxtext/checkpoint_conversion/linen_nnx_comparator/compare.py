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
from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import os
import time
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import blocks
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_comparator import report
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening

PathLike = str | os.PathLike[str]

# Reading a part of a chunk decodes all of it, so not all parts of a block are read at once.
_READS = 4
# Arrays that are kept open: opening one anew reads its metadata again.
_MOST_OPEN = 1024


def compare_checkpoints(
    a: PathLike, b: PathLike, *, config: Any = None, progress: Any = None, **options: Any
) -> report.Comparison:
  """Compares two checkpoints; both are only read.

  Args:
    a: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    b: the other one.
    config: a MaxText config of the model, which says what the layer axis of scanned Params is.
    progress: is told how far the work has come, as `convert_checkpoint` tells it.
    **options: those of `options.Options`.

  Raises:
    ConversionError: one of its subclasses: no such option, no checkpoint there, or none that the converter can map; but
      for an option, the message begins with the side, A or B.
  """
  begin = time.monotonic()
  chosen, told = options_lib.Options.of(**options), progress_lib.checked(progress)
  run_config.check(config)
  places = _of_sides(locations.find_source, (a, b))
  checkpoints = _of_sides(opening.open_source, places)
  trees, notes = _trees(checkpoints, chosen, config)
  trees = [dataclasses.replace(tree, path=os.fspath(place.items)) for tree, place in zip(trees, places)]
  trees = list(map(alignment.without_rngs, trees)) if chosen.ignore_rngs else trees
  aligned = alignment.align(*trees, structure_only=chosen.structure_only)
  tolerance = _tolerance(chosen)
  reading = _Reading(checkpoints, aligned, tolerance, told)
  coroutines.run(reading.compare(chosen.of_sides()[0].memory_budget))
  pairs = list(reading.pairs.values())
  return report.Comparison(trees, pairs, tolerance, notes, time.monotonic() - begin)


def _tolerance(options) -> difference.Tolerance | None:
  """What values may differ by; None where any bit counts."""
  if options.atol is None and options.rtol is None:
    return None
  return difference.Tolerance(float(options.atol or 0), float(options.rtol or 0))


def _of_sides[T](function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
  """What `function` returns for A and for B, each with its own arguments; a refusal says which one it is about."""
  results = []
  for side, *of_side in zip("AB", *arguments):
    try:
      results.append(function(*of_side))
    except errors.ConversionError as e:
      raise type(e)(f"{side}: {e.path}", e.expected, e.found, e.remedy.replace("--source_path", side)) from e
  return results


def _trees(checkpoints, chosen: options_lib.Options, config) -> tuple[list[alignment.Tree], list[str]]:
  """Both canonical trees, and notes on them.

  Layers of unknown order cannot be taken apart, so then both checkpoints keep their scanned layers. If the converter
  refuses a checkpoint, perhaps because it is damaged, and both have one layout, their own trees are compared: how a
  damaged checkpoint differs from a sound one is worth knowing.
  """
  key = lambda leaf: leaf.ext_metadata.get("random_key_impl") if isinstance(leaf.ext_metadata, dict) else None
  keys = [{path: key(leaf) for path, leaf in checkpoint.stored.items()} for checkpoint in checkpoints]
  states = [checkpoint.state for checkpoint in checkpoints]
  layout_of_a, layout_of_b = _of_sides(layouts.detect, states)
  planned = lambda scan_layers: _of_sides(alignment.by_plan, states, keys, chosen.of_sides(config), [scan_layers] * 2)
  try:
    return planned(False), []
  except errors.ConversionError as refusal:
    if isinstance(refusal, errors.LayerStackError):
      with contextlib.suppress(errors.ConversionError):
        return planned(True), ["Layers whose order is unknown: scanned layers are compared whole."]
    if layout_of_a != layout_of_b or chosen.params_only or chosen.nnx_aux != "keep":
      raise
    note = f"Compared path by path as they stand, since the converter refuses one: {refusal}"
    return _of_sides(alignment.as_it_stands, states, keys), [note]


class _Reading:
  """Reads the blocks of both checkpoints, and records how each pair differs, or why it cannot be read."""

  def __init__(self, checkpoints, pairs: list[alignment.Pair], tolerance: difference.Tolerance | None, progress):
    self._checkpoints, self._tolerance, self._progress = checkpoints, tolerance, progress
    self.pairs = {pair.keys: pair for pair in pairs}
    self._gate = asyncio.Semaphore(_READS)
    self._open = {}

  async def compare(self, memory_budget: memory.Budget):
    """Compares everything that can be."""
    arrays = [pair for pair in self.pairs.values() if pair.is_array]
    self._progress.start("comparing", sum(pair.sides[0].nbytes for pair in arrays))
    chunk_shape_of = lambda side, path: self._checkpoints[side].stored[path].chunk_shape
    work = blocks.blocks(arrays, chunk_shape_of, memory_budget.box)
    nbytes_of = lambda block: block.nbytes

    async def compare_batch(batch):
      for some in streaming.batches(batch, nbytes_of, blocks.ENOUGH_BYTES):
        await self._compare(some)

    await streaming.in_batches(work, compare_batch, nbytes_of=nbytes_of, memory_budget=memory_budget)
    self._progress.finish()

  async def _compare(self, batch: list[blocks.Block]):
    """Reads and measures some blocks."""
    reads = [read for block in batch for read in block.reads]
    data = dict(zip(reads, await asyncio.gather(*map(self._read, reads))))
    cells = [cell for block in batch for cell in block.cells]
    for cell, found in zip(cells, await asyncio.to_thread(_measured, cells, data, self._tolerance)):
      pair = self.pairs[cell.pair.keys]
      if isinstance(found, errors.ConversionError):
        self.pairs[pair.keys] = dataclasses.replace(pair, structure=alignment.UNREADABLE, failure=str(found))
        continue
      self.pairs[pair.keys] = dataclasses.replace(pair, values=pair.values.merged(found))
      self._progress.advance(found.elements * pair.sides[0].stored.dtype.itemsize)

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


def _measured(cells: list[blocks.Cell], data, tolerance) -> list[difference.Difference | errors.ConversionError]:
  """How each cell differs, or why it could not be read."""
  found = []
  for cell in cells:
    failures = [data[read] for read in cell.reads if isinstance(data[read], errors.ConversionError)]
    found.append(failures[-1] if failures else difference.measure(*cell.values(data), cell.origin, tolerance))
  return found
