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

"""Carries a plan out block by block, between two checkpoints, under a memory budget."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
import dataclasses
import functools
import itertools
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_chunks
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

Path = abstract_state.Path
Region = tuple[slice, ...]

# Small chunks are read together up to this size, to save calls.
BLOCK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Block:
  """A region of a source leaf, which is read once, and what is made of it.

  Attributes:
    source: the source leaf.
    region: the region of it.
    nbytes: the size of the region.
    parts: the target leaves that get some of it.
    merge: merges adapters into what was read, if there are any.
  """

  source: Path
  region: Region
  nbytes: int
  parts: tuple[plan_lib.Part, ...]
  merge: Callable[[Region, np.ndarray], np.ndarray] | None = None

  async def made(self, data: np.ndarray) -> np.ndarray:
    """What to write, given the data read."""
    return await asyncio.to_thread(self.merge, self.region, data) if self.merge else data


def check_casts(plan: plan_lib.Plan, read: Callable[[Path], Any]):
  """Checks, before anything is written, that the step fits the target's dtype."""
  for path, move in plan.moves.items():
    leaf = plan.target.leaves[path]
    if move.kind != "copy" or not abstract_state.is_array(leaf):
      continue
    (source,) = move.sources
    origin = plan.source.leaves[source]
    if origin.dtype != leaf.dtype and plan_lib.is_step_cast(origin, leaf):
      abstract_state.checked_cast(source, read(source), leaf.dtype)


def blocks(
    plan: plan_lib.Plan, targets: Mapping[Path, tuple[int, ...]], chunk_shape_of: Callable[[Path], tuple[int, ...]]
) -> Iterator[Block]:
  """The blocks that fill `targets`, given their chunk shapes: whole chunks on both sides, none in two blocks."""
  for source, parts in plan.parts().items():
    wanted = tuple(part for part in parts if part.target in targets)
    if not wanted:
      continue
    leaf = plan.source.leaves[source]
    itemsize = np.dtype(leaf.dtype).itemsize
    whole = plan_lib.whole_chunks(source, chunk_shape_of(source), wanted, targets.__getitem__)
    shape = target_chunks.grown(leaf.shape, whole, BLOCK_BYTES // itemsize)
    merge, dtype = plan.merges.get(source), np.dtype(plan.target.leaves[wanted[0].target].dtype)
    made = merge and functools.partial(merge.merged, dtype=dtype, path=source)
    for region in _regions(leaf.shape, shape):
      size = math.prod(part.stop - part.start for part in region) * itemsize
      inside = tuple(part for part in wanted if part.move.region(part.number, region) is not None)
      yield Block(source, region, size, inside, made)


async def stream(
    work: Iterable[Block],
    *,
    open_source: Callable[[Path], Awaitable[Any]],
    targets: Mapping[Path, Any],
    new_transaction: Callable[[], Any],
    memory_budget: memory.Budget,
    on_written: Callable[[Block, Any, np.ndarray], Awaitable[None]],
):
  """Reads and writes blocks, several at a time, in memory bounded by the budget and the largest block.

  Args:
    work: the blocks.
    open_source: opens a source leaf's array for reading.
    targets: the target leaves' arrays, open for writing.
    new_transaction: makes a transaction; a batch is committed in one, a large block in several.
    memory_budget: what the data in flight may take.
    on_written: called for each committed block, with its source's array and what was read of it.
  """

  async def write_batch(batch):
    await _write_batch(batch, open_source, targets, new_transaction, on_written)

  await in_batches(work, write_batch, nbytes_of=lambda block: block.nbytes, memory_budget=memory_budget)


async def in_batches[T](
    work: Iterable[T],
    run: Callable[[list[T]], Coroutine[Any, Any, None]],
    *,
    nbytes_of: Callable[[T], int],
    memory_budget: memory.Budget,
):
  """Runs over batches of work, several at a time if the budget allows; a large piece is a batch of its own."""
  gate = memory_budget.batches()
  tasks = []
  for batch in batches(work, nbytes_of, memory_budget.batch):
    nbytes = await gate.enter(sum(map(nbytes_of, batch)))
    if any(task.done() and task.exception() for task in tasks):
      break
    tasks = [task for task in tasks if not task.done()]
    task = asyncio.create_task(run(batch))
    task.add_done_callback(lambda _, nbytes=nbytes: gate.leave(nbytes))
    tasks.append(task)
  await coroutines.settle(tasks)


async def _write_batch(batch, open_source, targets, new_transaction, on_written):
  """Reads blocks and writes what is made of them, at once except for a large block's pieces, which take turns."""
  sources = {source: await open_source(source) for source in dict.fromkeys(block.source for block in batch)}
  read = await coroutines.settle(reader.read_region(block.source, sources[block.source], block.region) for block in batch)
  made = await coroutines.settle(block.made(data) for block, data in zip(batch, read))
  pieces = [(block, part, data) for block, data in zip(batch, made) for part in block.parts]
  piece_bytes = lambda piece: piece[1].piece(piece[0].region, piece[2])[1].nbytes
  for some in batches(pieces, piece_bytes, memory.BATCH_BYTES):
    transaction = new_transaction()
    await coroutines.settle(_write_piece(block, part, data, targets, transaction) for block, part, data in some)
    await transaction.commit_async()
  await coroutines.settle(on_written(block, sources[block.source], data) for block, data in zip(batch, read))


async def _write_piece(block, part, data, targets, transaction):
  target = targets[part.target].with_transaction(transaction)
  region, values = part.piece(block.region, data)
  if values.dtype != target.dtype.numpy_dtype:
    values = abstract_state.checked_cast(block.source, values, target.dtype.numpy_dtype)
  # Nobody changes `values`, so TensorStore need not copy them before it encodes them.
  await target[region].write(values, can_reference_source_data_indefinitely=True)


def _regions(shape, block_shape) -> Iterator[Region]:
  """The regions of the grid of blocks."""
  ranges = [range(0, size, step) for size, step in zip(shape, block_shape)]
  for start in itertools.product(*ranges):
    yield tuple(slice(a, min(a + step, size)) for a, step, size in zip(start, block_shape, shape))


def batches[T](work: Iterable[T], size_of: Callable[[T], int], limit: int) -> Iterator[list[T]]:
  """Groups pieces of work up to a size limit; a larger piece is a batch of its own."""
  batch, size = [], 0
  for piece in work:
    if batch and size + size_of(piece) > limit:
      yield batch
      batch, size = [], 0
    batch.append(piece)
    size += size_of(piece)
  if batch:
    yield batch
