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

"""Proves that leaves are equal without decoding them: their chunks are the same bytes, in the planned places.

Shares no code with what reads and moves them: it finds both sides' keys by itself, starts from those in the target, and
asks which chunk of the source each should be.
"""

import asyncio
from collections.abc import Callable, Iterator
import functools
import itertools
import math
import os

from etils import epath
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import copied
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen

Path = abstract_state.Path
Pairs = Callable[[], Iterator[tuple[str, str]]]  # Keys, in the source and in the target.

_PAIRS_OF_A_LEAF = 32  # That are looked at together.


async def prove(
    plan: plan_lib.Plan,
    source: reopen.Arrays,
    written: reopen.Arrays,
    *,
    files: copied.CopiedFiles,
    memory_budget: memory.Budget,
) -> frozenset[Path]:
  """Finds the target leaves that can be proven equal; nothing is known of the others, which must be decoded.

  Chunks at the same place of one file (a hard link), or of two files that were compared while copying, are not read.
  Others are read as they are encoded.

  Args:
    plan: the plan that was carried out.
    source: the source, whose places are read.
    written: the target, whose places are read.
    files: the files that were compared while copying.
    memory_budget: what the encoded chunks that are compared may take; a single pair may take more.
  """
  candidates = await _candidates(plan, source, written)
  gate = memory_budget.comparisons()
  is_one_file = _OneFile(source.directory, written.directory, files)

  async def is_equal(path, document, pairs) -> bool:
    if plan.moves[path].kind == "copy" and await _lies_where_it_lay(path, plan, source, written, document, is_one_file):
      return True
    for some in itertools.batched(pairs(), _PAIRS_OF_A_LEAF):
      rest = []
      for keys in some:
        old, new = source.places.get(keys[0]), written.places.get(keys[1])
        if old is None or new is None or old.nbytes != new.nbytes:
          return False
        if not (old.file and new.file and old.offset == new.offset and await is_one_file(old.file, new.file)):
          rest.append(keys)
      if not all(await coroutines.settle(_have_equal_bytes(keys, source, written, gate) for keys in rest)):
        return False
    return True

  equal = await asyncio.gather(*(is_equal(path, *each) for path, each in candidates.items()))
  return frozenset(path for path, is_the_same in zip(candidates, equal) if is_the_same)


async def _lies_where_it_lay(path, plan, source, written, document, is_one_file) -> bool:
  """Whether a copied leaf has all its values in the very same ranges of the same files, as with links."""
  (origin,) = plan.moves[path].sources
  ours, theirs = source.places.arrays[source.name(origin)], written.places.arrays[written.name(path)]
  if ours.rows_of != theirs.rows_of or ours.inline != theirs.inline:
    return False
  if not np.array_equal(ours.rows[:, 1:], theirs.rows[:, 1:]):
    return False
  for old, new in set(zip(ours.rows[:, 0].tolist(), theirs.rows[:, 0].tolist())) - {(0, 0)}:
    if not (old and new and await is_one_file(source.places.files[old], written.places.files[new])):
      return False
  return all(key in ours.rows_of for key in chunk_keys.keys("", document))


async def _candidates(plan, source, written) -> dict[Path, tuple[chunk_keys.Document, Pairs]]:
  """The leaves whose chunks may be the same bytes, with the target's document and a function for the pairs of keys."""
  ours, theirs = await _documents(source, plan.source), await _documents(written, plan.target)
  candidates = {}
  for path, move in plan.moves.items():
    if path not in theirs or not ours.keys() >= set(move.sources):
      continue
    target, documents = theirs[path], {origin: ours[origin] for origin in move.sources}
    if not _is_the_same_encoding(move, documents, target) or chunk_keys.count(target) > len(source.places):
      continue  # More chunks than keys: some were left out.
    names = {origin: source.name(origin) for origin in move.sources}
    candidates[path] = target, functools.partial(_chunk_pairs, move, names, documents, written.name(path), target)
  return candidates


async def _documents(arrays, state) -> dict[Path, chunk_keys.Document]:
  """The zarr metadata of those arrays that are stored with the planned shape."""
  paths = [p for p, leaf in state.leaves.items() if abstract_state.is_array(leaf) and not plan_lib.is_held(p)]
  documents = zip(paths, await asyncio.gather(*map(arrays.document, paths)))
  return {path: found for path, found in documents if found and chunk_keys.shape(found) == state.leaves[path].shape}


def _is_the_same_encoding(move, documents, target) -> bool:
  """Whether the zarr metadata agree except in the layer axes, along which each chunk holds one index."""
  if move.order:
    return False
  if not move.taken and not move.stacked:
    return list(documents.values()) == [target]
  return (
      all(
          chunk_keys.chunk_shape(document)[axis] == 1
          for source, document in documents.items()
          for axis in move.axes(source)
      )
      and all(chunk_keys.chunk_shape(target)[axis] == 1 for axis in move.stacked)
      and all(_without_shapes(document) == _without_shapes(target) for document in documents.values())
      and all(_chunk_size(document) == _chunk_size(target) for document in documents.values())
      and target.get("order", "C") == "C"
  )


def _without_shapes(document):
  """A zarr metadata document without the shapes of the array, of its chunks, and of chunks in shards."""
  if isinstance(document, dict):
    shapes = ("shape", "chunks", "chunk_shape")
    return {name: _without_shapes(value) for name, value in document.items() if name not in shapes}
  return [_without_shapes(value) for value in document] if isinstance(document, list) else document


def _chunk_size(document) -> int:
  return math.prod(chunk_keys.chunk_shape(document))


def _chunk_pairs(move, names, documents, target_name, target) -> Iterator[tuple[str, str]]:
  """For each chunk of a target leaf, its key in the source and in the target."""
  steps = zip(chunk_keys.shape(target), chunk_keys.chunk_shape(target))
  old_keys, new_key = {origin: chunk_keys.key_of(document) for origin, document in documents.items()}, chunk_keys.key_of(
      target
  )
  for place in itertools.product(*(range(-(-size // step)) for size, step in steps)):
    along = [place[axis] for axis in move.stacked]
    source, at = move.pieces[int(np.ravel_multi_index(along, move.sizes)) if along else 0]
    inside = [index for axis, index in enumerate(place) if axis not in move.stacked]
    for axis, index in zip(move.axes(source), at):
      inside.insert(axis, index)
    yield f"{names[source]}/{old_keys[source](tuple(inside))}", f"{target_name}/{new_key(place)}"


class _OneFile:
  """Whether files of the two folders are one, or known to be equal."""

  def __init__(self, ours: epath.Path, theirs: epath.Path, files: copied.CopiedFiles):
    self._ours, self._theirs, self._files = ours, theirs, files
    self._found: dict[tuple[str, str], asyncio.Task[bool]] = {}

  async def __call__(self, old: str, new: str) -> bool:
    if (old, new) not in self._found:
      found = asyncio.to_thread(_is_one_file, self._ours / old, self._theirs / new, self._files)
      self._found[old, new] = asyncio.create_task(found)
    return await self._found[old, new]


def _is_one_file(ours: epath.Path, theirs: epath.Path, files: copied.CopiedFiles) -> bool:
  if remote_files.is_remote(ours) or remote_files.is_remote(theirs):
    return remote_files.have_one_checksum(ours, theirs)
  return ours.exists() and theirs.exists() and (os.path.samefile(ours, theirs) or files.have(ours, theirs))


async def _have_equal_bytes(keys: tuple[str, str], source, written, gate) -> bool:
  """Whether two encoded chunks are equal."""
  old, new = source.places[keys[0]], written.places[keys[1]]
  ours, theirs = source.directory / old.file, written.directory / new.file
  async with gate.inside(old.nbytes):
    if old.inline is new.inline is None and not remote_files.is_remote(ours) and not remote_files.is_remote(theirs):
      return await asyncio.to_thread(_are_equal_ranges, ours, old.offset, theirs, new.offset, old.nbytes)
    values = await coroutines.settle((source.read(keys[0]), written.read(keys[1])))
    return values[0] == values[1]


def _are_equal_ranges(ours: epath.Path, begin: int, theirs: epath.Path, their_begin: int, nbytes: int) -> bool:
  """Compares two ranges of files."""
  with open(ours, "rb", buffering=0) as one, open(theirs, "rb", buffering=0) as other:
    one.seek(begin)
    other.seek(their_begin)
    return copied.have_equal_bytes(one, other, nbytes)
