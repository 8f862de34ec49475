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

"""What a conversion would take: memory by its budget, time by briefly measuring this disk and these cores.

Nothing is left behind: what is written goes into memory, or into an unnamed file that ends with the process.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import os
import resource
import sys
import tempfile
import time

import numpy as np
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import moving
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import transfers
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import targets

_SECONDS, _BYTES, _PIECE_BYTES = 0.5, 2**28, 2**23  # At most, of one measurement; and of one write to a file.
_LITTLE = 2**20  # Bytes; for less, no rate is measured.
_KEY_BYTES = 330  # Memory to rename and verify a key: 0.5 GiB for 1.6 million.
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


def estimate(moves: Sequence[moving.Move], target: locations.Location, verify: bool | str) -> str:
  """A line for a person: the memory and time that it would take.

  Args:
    moves: how the bytes of each of the target's pytrees go.
    target: where it would appear.
    verify: the option. The time includes verification, but not what `full` takes besides.
  """
  budget, pieces = moves[0].memory_budget, [_pieces(move) for move in moves]
  held, wanted = max(map(budget.held, pieces)), max(map(budget.wanted, pieces))
  so_far = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT
  metadata = so_far + _KEY_BYTES * len(moves[0].source.index.values)
  more = f" (--memory_budget_gib={-(-wanted // 2**30)} would keep all cores busy)" if wanted > budget.nbytes else ""
  memory = f"about {folding.size(metadata)} of memory for all but data, at most {folding.size(held)} for data under way"
  return f"cost: {memory}{more}; {_work(moves, target, bool(verify))}"


def _pieces(move) -> list[int]:
  """The sizes of what is held in memory in turn."""
  return [*(block.nbytes for block in move.blocks(move.streamed())), *move.raw()]


def _work(moves, target, is_verified) -> str:
  """The time to read and write; for remote storage, how much there is to transfer."""
  way, source = leaf_routes.Way, moves[0].source
  if remote_files.is_remote(source.directory) or remote_files.is_remote(target.final):
    return f"{transfers.estimate(moves, target, is_verified)}, time not measured in remote storage"
  target = target.final
  sizes = [move.nbytes() for move in moves]
  streamed, raw, files = (sum(size[each] for size in sizes) for each in (way.STREAMED, way.RAW, way.REFERENCE))
  if moves[0].copy_mode != "copy" and targets.can_link(source.directory, target):
    files = 0
  copied = raw + files
  if streamed + copied < _LITTLE:
    return f"{streamed + copied:,} bytes to read and write"
  encoded = sum(int(array.rows[:, 2].sum()) for array in source.index.values.arrays.values())
  share = encoded / sum(leaf.nbytes for leaf in source.stored.values())
  written = int(streamed * min(1, share)) + copied  # Assuming that it compresses like the source.
  try:
    rates = {"written": (written, _rate(_write(targets.nearest(target), written)))}
  except OSError as e:
    return f"no time: nothing could be written to {targets.nearest(target)}: {errors.one_line(e)}"
  if copied >= _LITTLE:  # To verify what is raw, both sides are read; files, while caches have them.
    rates["read"] = (copied + 2 * raw * is_verified, _rate(_read(source)))
  if streamed >= _LITTLE:
    name = "decoded, encoded and read back" if is_verified else "decoded and encoded"
    rates[name] = (streamed, _rate(_stream(moves, is_verified)))
  seconds = sum(nbytes / rate for nbytes, rate in rates.values())
  each = ", ".join(f"{folding.size(nbytes)} {name} at {folding.size(rate)}/s" for name, (nbytes, rate) in rates.items())
  return f"about {max(1, round(seconds)):,} s beyond what the plan took ({each}, measured for a moment)"


def _rate(work: Iterator[int]) -> float:
  """The bytes per second of work that yields the bytes done, piece by piece."""
  begin = time.monotonic()
  done = sum(_enough(work, int))
  return done / (time.monotonic() - begin)


def _enough[T](work: Iterable[T], nbytes_of: Callable[[T], int]) -> Iterator[T]:
  """As much of the work as is to be measured."""
  begin, done = time.monotonic(), 0
  for piece in work:
    yield piece
    done += nbytes_of(piece)
    if done >= _BYTES or time.monotonic() - begin > _SECONDS:
      return


def _write(folder, nbytes) -> Iterator[int]:
  """Writes to a folder's disk, into an unnamed file."""
  piece = np.random.default_rng(0).bytes(_PIECE_BYTES)
  with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
    for _ in range(-(-nbytes // _PIECE_BYTES)):
      yield file.write(piece)
      os.fsync(file.fileno())


def _read(source) -> Iterator[int]:
  """Reads data files of the source."""
  for name in filter(None, source.index.values.files):
    with open(source.directory / name, "rb", buffering=0) as file:
      while piece := file.read(_PIECE_BYTES):
        yield len(piece)


def _stream(moves, is_read_back) -> Iterator[int]:
  """Streams blocks of the source into memory, as they would be to disk."""
  move = next(move for move in moves if move.streamed())
  chunk_shapes, stores, done = move.streamed(), _InMemory(move), []

  async def on_written(block, *_):
    for part in block.parts if is_read_back else ():
      await stores[part.target][part.move.region(part.number, block.region)].read()
    done.append(block.nbytes)

  coroutines.run(
      streaming.stream(
          _enough(move.blocks(chunk_shapes), lambda block: block.nbytes),
          open_source=move.source.open,
          targets=stores,
          new_transaction=ts.Transaction,
          memory_budget=move.memory_budget,
          on_written=on_written,
      )
  )
  yield sum(done)


class _InMemory(dict):
  """In-memory stores for what is streamed, made on demand."""

  def __init__(self, move: moving.Move):
    super().__init__()
    self._move = move

  def __missing__(self, path):
    leaf, form = self._move.plan.target.leaves[path], self._move.form
    zstd = [{"name": "zstd", "configuration": {"level": 1}}] * (form.compression != "none")
    metadata = {"compressor": {"id": "zstd", "level": 1} if zstd else None}
    if form.use_zarr3:
      metadata = {"codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, *zstd]}
    spec = {"driver": "zarr3" if form.use_zarr3 else "zarr", "kvstore": "memory://", "metadata": metadata}
    layout = ts.ChunkLayout(write_chunk_shape=self._move.routes[path].chunk_shape)
    self[path] = ts.open(spec, create=True, dtype=leaf.dtype, shape=leaf.shape, chunk_layout=layout).result()
    return self[path]
