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

"""Proves that leaves are equal without decoding them: their chunks are the same bytes, in the places that the plan says.

Shares no code with what moves them: it starts from the keys that stand in the target, and asks which chunk of the source
each should be.
"""

import asyncio
from collections.abc import Iterator
import dataclasses
import math
import os

from etils import epath
import fsspec
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import chunks
from maxtext.checkpoint_conversion.linen_nnx_converter import key_values
from maxtext.checkpoint_conversion.linen_nnx_converter import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import storage

Path = abstract_state.Path

_PAIRS_AT_ONCE, _PAIRS_SHARE = 8, 1 / 8  # Chunks, each in the source and in the target; their share of the budget.
_FILES_AT_ONCE = 2
_PIECE_BYTES = 2**18  # Of a file: two pieces stay in a core's cache.


@dataclasses.dataclass(frozen=True)
class Proof:
  """Which target leaves are known to be equal to what the plan makes them of.

  Attributes:
    referenced: those whose chunks lie at the same places of the same data files, or of equal ones.
    same_values: those whose encoded chunks are equal.
  """

  referenced: frozenset[Path]
  same_values: frozenset[Path]

  @property
  def paths(self) -> frozenset[Path]:
    return self.referenced | self.same_values


async def prove(
    plan: plan_lib.Plan, source: storage.Checkpoint, written: storage.Checkpoint, *, memory_budget: int
) -> Proof:
  """Finds the target leaves whose equality can be proven; of the others, which must be decoded, nothing is known.

  Args:
    plan: the plan that was carried out.
    source: the source.
    written: the target.
    memory_budget: bytes, for the encoded chunks that are compared; a pair of larger ones is held alone.
  """
  candidates = _candidates(plan, source, written)
  values = {
      path: [(source.index.values[old], written.index.values[new]) for old, new in pairs]
      for path, pairs in candidates.items()
  }
  placed = {path: {_files(*pair) for pair in of_path} for path, of_path in values.items()}
  same = {(None, None)} | await _same_files(set().union(*placed.values()), source.directory, written.directory)
  referenced = {path for path in candidates if placed[path] <= same}
  copied = {
      path: pairs
      for path, pairs in candidates.items()
      if path not in referenced and all(old.nbytes == new.nbytes for old, new in values[path])
  }
  largest = max((old.nbytes for path in copied for old, _ in values[path]), default=1)
  gate = asyncio.Semaphore(max(1, min(_PAIRS_AT_ONCE, int(memory_budget * _PAIRS_SHARE) // (2 * largest))))
  equal = await asyncio.gather(*(_have_equal_values(pairs, source, written, gate) for pairs in copied.values()))
  return Proof(frozenset(referenced), frozenset(path for path, is_equal in zip(copied, equal) if is_equal))


def _candidates(plan, source, written) -> dict[Path, list[tuple[str, str]]]:
  """The pairs of keys, in the source and in the target, of the leaves whose chunks may be the same bytes."""
  candidates = {}
  for path, move in plan.moves.items():
    if path not in written.stored or not _is_the_same_encoding(path, move, source, written):
      continue
    if chunks.count(written.stored[path].document) > len(source.index.values):  # Some were left out.
      continue
    pairs = list(_chunk_pairs(path, move, source, written))
    if all(old in source.index.values and new in written.index.values for old, new in pairs):
      candidates[path] = pairs
  return candidates


def _is_the_same_encoding(path, move, source, written) -> bool:
  """Whether the zarr metadata agree in all but the layer axes, along which each chunk holds one index."""
  target = written.stored[path].document
  documents = [source.stored[origin].document for origin, _ in plan_lib.sources_of(move) if origin in source.stored]
  if not documents or isinstance(move, plan_lib.Transpose):
    return False
  if isinstance(move, plan_lib.Copy):
    return documents == [target]
  layered = [target] if isinstance(move, plan_lib.Stack) else documents
  return (
      all(chunks.chunk_shape(document)[axis] == 1 for document in layered for axis in move.axes)
      and all(_without_shapes(document) == _without_shapes(target) for document in documents)
      and all(_chunk_size(document) == _chunk_size(target) for document in documents)
      and target.get("order", "C") == "C"
  )


def _without_shapes(document):
  """A zarr metadata document without what tells the shape of the array, of its chunks, and of theirs."""
  if isinstance(document, dict):
    shapes = ("shape", "chunks", "chunk_shape")
    return {name: _without_shapes(value) for name, value in document.items() if name not in shapes}
  return [_without_shapes(value) for value in document] if isinstance(document, list) else document


def _chunk_size(document) -> int:
  return math.prod(chunks.chunk_shape(document))


def _chunk_pairs(path, move, source, written) -> Iterator[tuple[str, str]]:
  """For each chunk of a target leaf, the key that it should have been in the source, and its key."""
  target = written.stored[path]
  origins = [source.stored[origin] for origin, _ in plan_lib.sources_of(move)]
  steps = zip(target.shape, target.chunk_shape)
  for place in np.ndindex(*(-(-size // step) for size, step in steps)):
    number, inside = 0, list(place)
    if isinstance(move, plan_lib.Stack):
      number = int(np.ravel_multi_index([place[axis] for axis in move.axes], move.sizes))
      inside = [index for axis, index in enumerate(place) if axis not in move.axes]
    elif isinstance(move, plan_lib.Slice):
      for axis, index in zip(move.axes, move.index):
        inside.insert(axis, index)
    origin = origins[number]
    yield (
        f"{origin.name}/{chunks.key(origin.document, tuple(inside))}",
        f"{target.name}/{chunks.key(target.document, place)}",
    )


def _files(old: key_values.Value, new: key_values.Value) -> tuple[str | None, str | None]:
  """The files of two values that are equal if their files are; none if they stand in the trees and are equal."""
  if (old.offset, old.nbytes, old.inline) != (new.offset, new.nbytes, new.inline):
    return old.file, None
  return (old.file, new.file) if old.inline is None else (None, None)


async def _same_files(pairs: set[tuple[str | None, str | None]], ours: epath.Path, theirs: epath.Path):
  """Those pairs of files, in the one folder and in the other, that are the same."""
  gate = asyncio.Semaphore(_FILES_AT_ONCE)

  async def is_same(one, other) -> bool:
    async with gate:
      return await asyncio.to_thread(_is_the_same_file, ours / one, theirs / other)

  named = [pair for pair in pairs if None not in pair]
  same = await asyncio.gather(*(is_same(*pair) for pair in named))
  return {pair for pair, is_the_same in zip(named, same) if is_the_same}


def _is_the_same_file(ours: epath.Path, theirs: epath.Path) -> bool:
  """Whether two paths are one file, or two with the same content."""
  if key_values.is_remote(ours) and key_values.is_remote(theirs):
    digests = _remote_digest(ours), _remote_digest(theirs)
    return None not in digests and digests[0] == digests[1]
  if key_values.is_remote(ours) or key_values.is_remote(theirs) or not (ours.exists() and theirs.exists()):
    return False
  return os.path.samefile(ours, theirs) or _have_equal_bytes(ours, theirs)


def _have_equal_bytes(ours: epath.Path, theirs: epath.Path) -> bool:
  """Whether two files have the same content; `filecmp`, which reads 8 KiB at a time, takes four times as long."""
  with open(ours, "rb", buffering=0) as one, open(theirs, "rb", buffering=0) as other:
    if os.fstat(one.fileno()).st_size != os.fstat(other.fileno()).st_size:
      return False
    while piece := one.read(_PIECE_BYTES):
      if piece != other.read(_PIECE_BYTES):
        return False
  return True


def _remote_digest(path: epath.Path) -> tuple[int, str] | None:
  """The size of an object and the store's own checksum of its content, if it has one."""
  system, name = fsspec.core.url_to_fs(os.fspath(path))
  info = system.info(name)
  return (info["size"], info["crc32c"]) if info.get("crc32c") else None


async def _have_equal_values(pairs, source, written, gate) -> bool:
  """Whether the encoded chunks are equal."""
  for old, new in pairs:
    async with gate:
      ours, theirs = await asyncio.gather(source.read_value(old), written.read_value(new))
    if ours != theirs:
      return False
  return True
