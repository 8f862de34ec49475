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

"""What a conversion from or to remote storage will ask of it, by what its plan knows: requests and bytes. No I/O."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import moving
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files

# Counted with orbax-checkpoint 0.12.4: what a conversion takes besides its data. To find and read the source, where all
# else is local; to frame a pytree of the target, of which Orbax itself takes 69, and the step around it; to verify it.
_SOURCE, _PYTREE, _STEP, _VERIFIED = 18, 88, 28, 12
_COMMIT = 4  # Data files and OCDBT's manifest, which is read and written.
_STREAMS = 10  # To open the arrays.


@dataclasses.dataclass(frozen=True)
class Transfers:
  """What is asked of remote storage.

  Attributes:
    requests: how often.
    read: bytes that come here.
    written: bytes that go there.
    copied: bytes that it copies itself.
  """

  requests: int = 0
  read: int = 0
  written: int = 0
  copied: int = 0

  def __add__(self, other: "Transfers") -> "Transfers":
    pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other))
    return Transfers(*(one + another for one, another in pairs))

  def __str__(self) -> str:
    sizes = [f"{folding.size(getattr(self, name))} {name}" for name in ("read", "written", "copied")]
    return f"about {self.requests:,} requests to gs://, {', '.join(sizes)} by the store itself"


def estimate(moves: Sequence[moving.Move], target: locations.Location, is_verified: bool) -> Transfers:
  """What a conversion takes, of which the source or the target or both are in remote storage.

  Args:
    moves: how the bytes of each of the target's pytrees go.
    target: where it would appear.
    is_verified: whether it is verified; what `full` takes besides is not counted.
  """
  sides = remote_files.is_remote(moves[0].source.directory), remote_files.is_remote(target.final)
  fixed = _SOURCE + _VERIFIED // 2 * is_verified
  if sides[1]:
    step = _STEP * (target.step_folder is not None)
    fixed = step + len(moves) * (_PYTREE + _VERIFIED * is_verified) + sides[0] * _SOURCE // 2
  each = (part(move, *sides, is_verified) for move in moves for part in (_brought, _raw, _streamed))
  return sum(each, Transfers(fixed))


def _brought(move, is_from, is_to, _) -> Transfers:
  """Files that go as they are. The checksums that the store has of them verify them."""
  index = move.source.index
  if move.source.use_ocdbt:
    sizes = [move.lengths[file] for file in leaf_routes.data_files(move.routes, index)]
  else:
    sizes = _rows(move, leaf_routes.Way.REFERENCE, leaf_routes.Way.RAW)[:, 2].tolist()
  total = sum(sizes)
  if not is_to:
    return Transfers(len(sizes), read=total)
  if is_from:
    return Transfers(len(sizes), copied=total)
  return Transfers(sum(map(remote_files.uploads, sizes)), written=total)


def _raw(move, is_from, is_to, is_verified) -> Transfers:
  """Values that are copied as they are encoded, and read again on both sides to be verified."""
  if not move.source.use_ocdbt or not len(rows := _rows(move, leaf_routes.Way.RAW)):
    return Transfers()
  total, reads = int(rows[:, 2].sum()), _reads(move, rows)
  times = is_from * (1 + is_verified) + is_to * is_verified
  return Transfers(times * reads + is_to * _COMMIT * _batches(move, total), times * total, is_to * total)


def _streamed(move, is_from, is_to, is_verified) -> Transfers:
  """Chunks that are decoded and encoded. They are read back to be verified."""
  sizes = [leaf.size * leaf.dtype.itemsize for leaf in (move.plan.target.leaves[path] for path in move.streamed())]
  decoded = sum(sizes)
  if not decoded:
    return Transfers()
  rows = _rows(move, leaf_routes.Way.STREAMED)
  encoded = int(rows[:, 2].sum())
  written = decoded if move.form.compression == "none" else min(encoded, decoded)  # As well encoded as the source is.
  result = Transfers(is_from * _reads(move, rows), is_from * encoded)
  if not is_to:
    return result
  # What is read back of a leaf lies together, and some leaves do: of large ones, two of three took requests of their own.
  blocks = sum(-(-size // streaming.BLOCK_BYTES) for size in sizes)
  together = min(2 * blocks // 3, written // ocdbt_index.NEAR_BYTES)
  requests = _STREAMS + _COMMIT * _batches(move, decoded) + is_verified * together
  if not move.form.use_ocdbt:  # Chunks and zarr metadata are objects of their own.
    chunks = sum(_chunks(move, path) for path in move.streamed())
    requests = chunks * (1 + 2 * is_verified) + len(move.streamed()) * (2 + is_verified)
  return result + Transfers(requests, is_verified * written, written)


def _chunks(move, path) -> int:
  shape, chunk = move.plan.target.leaves[path].shape, move.routes[path].chunk_shape
  return math.prod(-(-size // step) for size, step in zip(shape, chunk))


def _rows(move, *ways: leaf_routes.Way) -> np.ndarray:
  """Where the values lie that the leaves of some ways are made of: the number of the file, the offset, the length."""
  paths = [path for path, route in move.routes.items() if route.way in ways]
  sources = dict.fromkeys(source for path in paths for source in move.plan.moves[path].sources)
  arrays = move.source.index.values.arrays
  names = (move.source.stored[source].name for source in sources)  # Of what is held in memory there are no values.
  return np.concatenate([np.empty((0, 3), np.int64), *(arrays[name].rows for name in names if name in arrays)])


def _reads(move, rows) -> int:
  """The requests that read values: of those that lie near each other, one for all that are wanted at a time."""
  rows = rows[rows[:, 0] > 0]
  if not move.source.use_ocdbt:
    return len(rows)
  rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
  is_far = (np.diff(rows[:, 0]) != 0) | (rows[1:, 1] - rows[:-1, 1] - rows[:-1, 2] > ocdbt_index.NEAR_BYTES)
  return int(is_far.sum()) + _batches(move, int(rows[:, 2].sum()))


def _batches(move, nbytes: int) -> int:
  return -(-nbytes // move.memory_budget.batch)
