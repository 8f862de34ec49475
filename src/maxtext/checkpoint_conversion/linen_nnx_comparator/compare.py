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
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import math
import numbers
import os
import time
from typing import Any, Literal, Self

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import blocks
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import report
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening

Path = alignment.Path
PathLike = str | os.PathLike[str]

# The share of the budget that a block may read on one side: two are under way, encoded and decoded, on two sides.
_BLOCKS_IN_BUDGET = 16
# Reading a part of a chunk decodes all of it, so not all parts of a block are read at once.
_READS = 4
# Arrays that are kept open: opening one anew reads its metadata again.
_MOST_OPEN = 1024


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """What is compared, and what is accepted.

  Attributes:
    param_scan_axes: the layer axis of scanned Params, in A and in B; None is the config's, else 1.
    nnx_aux: whether to compare NNX state that is no Param.
    params_only: whether to compare the params alone.
    atol: the absolute tolerance; with it or with `rtol`, values that differ within the tolerance are accepted.
    rtol: the relative tolerance, as a share of B's value.
    memory_budget_gib: GiB of memory for data under way. A chunk that is larger is still held whole.
  """

  param_scan_axes: tuple[int, int] | None = None
  nnx_aux: Literal["keep", "drop"] = "keep"
  params_only: bool = False
  atol: float | None = None
  rtol: float | None = None
  memory_budget_gib: float = 2.0

  def __post_init__(self):
    """Checks every value.

    Raises:
      OptionError: one is of another type, or none of those that there are.
    """
    if self.param_scan_axes is not None and (type(self.param_scan_axes) is not tuple or len(self.param_scan_axes) != 2):
      raise errors.OptionError("--param_scan_axis", "two axes, of A and of B", repr(self.param_scan_axes))
    self.of_sides()
    for name, value in (("atol", self.atol), ("rtol", self.rtol)):
      if value is not None and (type(value) is bool or not isinstance(value, numbers.Real) or not value >= 0):
        raise errors.OptionError(f"--{name}", "a number of at least 0", repr(value))

  @classmethod
  def of(cls, **values: Any) -> Self:
    """The options with these values.

    Raises:
      OptionError: there is no such option, or no such value of it.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values.keys() - set(names):
      raise errors.OptionError(f"--{name}", f"one of {', '.join(names)}", "no such option", "Check its spelling.")
    return cls(**values)

  def of_sides(self, config: Any = None) -> list[options_lib.Options]:
    """The converter's options for A and for B, with what the config says where these leave it open."""
    axes = self.param_scan_axes or (1 if config is None else config.param_scan_axis,) * 2
    shared = {name: getattr(self, name) for name in ("nnx_aux", "params_only", "memory_budget_gib")}
    return [options_lib.Options.of(param_scan_axis=axis, **shared) for axis in axes]

  @property
  def tolerance(self) -> difference.Tolerance | None:
    """What values may differ by; None where any bit counts."""
    if self.atol is None and self.rtol is None:
      return None
    return difference.Tolerance(float(self.atol or 0), float(self.rtol or 0))


def compare_checkpoints(
    a: PathLike, b: PathLike, *, config: Any = None, progress: Any = None, **options: Any
) -> report.Comparison:
  """Compares two checkpoints; both are only read.

  Args:
    a: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    b: the other one.
    config: a MaxText config of the model, which says what the layer axis of scanned Params is.
    progress: is told how far the work has come, as `convert_checkpoint` tells it.
    **options: those of `Options`.

  Raises:
    ConversionError: one of its subclasses: no such option, no checkpoint there, or none that the converter can map. The
      message of the latter begins with the side, A or B.
  """
  begin = time.monotonic()
  chosen = Options.of(**options)
  told = progress or progress_lib.Silent()
  places = _of_sides(locations.find_source, (a, b))
  checkpoints = _of_sides(opening.open_source, places)
  trees, notes = _trees(checkpoints, chosen, config)
  trees = [dataclasses.replace(tree, path=os.fspath(place.items)) for tree, place in zip(trees, places)]
  pairs = alignment.align(*trees)
  stored = {pair.sides[0].source for pair in pairs if pair.is_comparable}
  told.start("comparing", sum(checkpoints[0].stored[source].nbytes for source in stored))
  reading = _Reading(checkpoints, chosen.tolerance, told.advance)
  pairs = coroutines.run(reading.compare(pairs, chosen.of_sides()[0].memory_budget))
  told.finish()
  return report.Comparison(*trees, pairs, chosen.tolerance, notes, time.monotonic() - begin)


def _trees(checkpoints, chosen: Options, config) -> tuple[list[alignment.Tree], list[str]]:
  """Both canonical trees, and what is to be said of them.

  Layers whose order is unknown cannot be taken apart: then both checkpoints keep their scanned layers. Where the
  converter refuses a checkpoint, as it does a damaged one, and both are of one layout, their own trees are compared:
  it is worth knowing how a damaged checkpoint differs from a sound one.
  """
  states, keys = [checkpoint.state for checkpoint in checkpoints], list(map(_keys, checkpoints))
  layout_of_a, layout_of_b = _of_sides(layouts.detect, states)
  planned = lambda scan_layers: _of_sides(alignment.by_plan, states, keys, chosen.of_sides(config), [scan_layers] * 2)
  try:
    return planned(False), []
  except errors.ConversionError as refusal:
    if isinstance(refusal, errors.LayerStackError):
      try:
        return planned(True), ["Layers whose order is unknown: scanned layers are compared whole."]
      except errors.ConversionError:
        pass
    if layout_of_a != layout_of_b or chosen.params_only or chosen.nnx_aux != "keep":
      raise
    note = f"Compared path by path as they stand, since the converter refuses one: {refusal}"
    return _of_sides(alignment.as_it_stands, states, keys), [note]


def _keys(checkpoint) -> dict[Path, str]:
  """The implementations of the typed PRNG keys that a checkpoint holds."""
  return {
      path: leaf.ext_metadata["random_key_impl"]
      for path, leaf in checkpoint.stored.items()
      if isinstance(leaf.ext_metadata, dict) and "random_key_impl" in leaf.ext_metadata
  }


def _of_sides[T](function: Callable[..., T], *arguments: Iterable[Any]) -> list[T]:
  """What `function` returns for A and for B, each with its own of the arguments; a refusal says which one it is about."""
  results = []
  for side, *of_side in zip("AB", *arguments):
    try:
      results.append(function(*of_side))
    except errors.ConversionError as e:
      raise type(e)(f"{side}: {e.path}", e.expected, e.found, e.remedy.replace("--source_path", side)) from e
  return results


class _Reading:
  """Reads the blocks of both checkpoints and collects how they differ, and why a leaf cannot be read."""

  def __init__(self, checkpoints, tolerance: difference.Tolerance | None, advance: Callable[[int], None]):
    self._checkpoints, self._tolerance, self._advance = checkpoints, tolerance, advance
    self._gate = asyncio.Semaphore(_READS)
    self._open = {}
    self._found: dict[Path, difference.Difference] = {}
    self._failures: dict[Path, str] = {}

  async def compare(self, pairs: Sequence[alignment.Pair], memory_budget: int) -> list[alignment.Pair]:
    """Compares all that can be."""
    self._found = {pair.keys: difference.Difference() for pair in pairs if pair.is_comparable}
    work = self._blocks(pairs, memory_budget // _BLOCKS_IN_BUDGET)
    await streaming.in_batches(work, self._compare_all, nbytes_of=self._nbytes, memory_budget=memory_budget)
    return [
        dataclasses.replace(pair, values=self._found.get(pair.keys, pair.values), failure=self._failures.get(pair.keys))
        for pair in pairs
    ]

  def _blocks(self, pairs, most_bytes) -> Iterator[blocks.Block]:
    chunk_shape_of = lambda side, path: self._checkpoints[side].stored[path].chunk_shape
    for side, batch in blocks.batches(pairs):
      yield from blocks.blocks(side, batch, chunk_shape_of, most_bytes)

  def _nbytes(self, block: blocks.Block) -> int:
    """What it reads of the array that leads it."""
    lead = block.reads[0]
    size = math.prod(part.stop - part.start for part in lead.region)
    return size * self._checkpoints[lead.side].stored[lead.source].dtype.itemsize

  async def _compare_all(self, batch: list[blocks.Block]):
    for block in batch:
      await self._compare(block)

  async def _compare(self, block: blocks.Block):
    """Reads and measures a block."""
    data = await asyncio.gather(*map(self._read, block.reads))
    failed = {number: str(found) for number, found in enumerate(data) if isinstance(found, errors.ConversionError)}
    self._failures |= {cell.pair.keys: failed[i] for cell in block.cells for i in cell.reads if i in failed}
    cells = [cell for cell in block.cells if not failed.keys() & set(cell.reads)]
    measured = lambda: [_measured(block, cell, data, self._tolerance) for cell in cells]
    for cell, value in zip(cells, await asyncio.to_thread(measured)):
      self._found[cell.pair.keys] = self._found[cell.pair.keys].merged(value)
      self._advance(value.elements * cell.pair.sides[0].stored.dtype.itemsize)

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


def _measured(block: blocks.Block, cell: blocks.Cell, data, tolerance) -> difference.Difference:
  """How a cell differs."""
  a, b = (block.values(cell, side, data) for side in (0, 1))
  return difference.measure(a, b, tuple(part.start for part in cell.region), tolerance)
