# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""Compares what is streamed with the source while the source's block is in memory, so that it is decoded once.

The target is read back from the store that it was just written to, through arrays opened here. Only the block is taken
from the writer; that it is the source's shows in its array's place and zarr metadata. A block is whole chunks of the
target, so nothing written later changes what was compared; `digests` makes sure that the target's keys still refer to it.
What is not proven here is compared like all else, by decoding both sides. Files are compared while they are copied.
"""

from collections.abc import Mapping
import itertools
import json
import re
from typing import Any

from etils import epath
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import copied
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests as digests_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen

Path = abstract_state.Path

_FILE = "linen_nnx_converter_compared.process_{}"


class Comparison:
  """Compares the blocks that a process writes. The first puts together what all have compared.

  Attributes:
    plan: the plan.
    source: the source.
    files: the files that were copied and compared.
  """

  def __init__(self, move: Any, source: reopen.Arrays):
    """Begins without any block.

    Args:
      move: the `moving.Move`, for its plan, the chunk shapes of what is streamed, and the process's index and count.
      source: the source.
    """
    self.plan, self.source, self.files = move.plan, source, copied.CopiedFiles()
    self.watch = self.files.watch
    self._process, self._processes = move.process, move.processes
    # Orbax writes every chunk. A missing one must not be taken for zeros.
    self._metadata = {"use_zarr3": move.form.use_zarr3, "store_array_data_equal_to_fill_value": True}
    self._chunk_shapes: Mapping[Path, tuple[int, ...]] = move.streamed()
    self._parts = self.plan.parts() if self._chunk_shapes else {}
    self._collector = digests_lib.Collector(self.plan.target.leaves, self._chunk_shapes)
    self._unsure: set[Path] = set()
    self._written: reopen.Arrays | None = None

  async def compare(self, items: epath.Path, path: Path, array: Any, region: tuple[slice, ...], data: np.ndarray):
    """Compares the target with a region of a source leaf.

    Args:
      items: the folder of the target's pytree.
      path: the source leaf.
      array: the array that the data were read from.
      region: the region.
      data: its values.

    Raises:
      VerificationError: naming the first element that differs.
    """
    parts = [part for part in self._parts[path] if part.target in self._chunk_shapes]
    if not await self._is_the_source(path, array):
      self._unsure.update(part.target for part in parts)
      return
    box = tuple((part.start, part.stop) for part in region)
    there = [(part, place) for part in parts if (place := decoded.placed(part, box, data))]
    sums_of = lambda part: decoded.sums_of(self.plan, part, box, data)
    # Opened together: each asks anew what is written by now, which in remote storage is a request.
    targets = await coroutines.settle(self._opened(items, part.target) for part, _ in there)
    compared = zip(there, targets)
    for some in itertools.batched(compared, decoded.PARTS_AT_ONCE):
      await coroutines.settle(
          decoded.verify_box(part.target, target, *place, self._collector.add, sums_of(part))
          for (part, place), target in some
      )

  def hand_over(self, items: epath.Path):
    """Tells the first process what this one has compared."""
    if self._process:
      unsure = sorted(".".join(path) for path in self._unsure)
      (items / _FILE.format(self._process)).write_text(
          json.dumps(self._collector.parts() | {"unsure": unsure, "files": self.files.parts()})
      )

  async def digests(self, written: reopen.Arrays) -> dict[Path, digests_lib.Digest]:
    """The digests of the target leaves that are proven equal, in the first process.

    Args:
      written: the target as it will be committed, with its places.
    """
    unsure = {written.name(path) for path in self._unsure}
    for file in (written.directory / _FILE.format(process) for process in range(1, self._processes)):
      if file.exists():  # If there is none, nothing was streamed.
        parts = json.loads(file.read_text())
        unsure.update(parts["unsure"])
        self.files.merge(parts["files"])
        self._collector.merge(parts)
        file.unlink()
    found = self._collector.digests()
    if found:
      unsure |= await self._moved(written)
    return {path: digest for path, digest in found.items() if written.name(path) not in unsure}

  async def _moved(self, written) -> set[str]:
    """The names of leaves whose values are not where they were compared; and other names."""
    moved = set()
    for folder in {self._store(written.directory, process) for process in range(self._processes)}:
      own = reopen.Arrays(folder, metadata=self._metadata)  # Orbax has renamed its parent folder.
      await own.read_places()
      inside = f"{folder.name}/" if folder != written.directory else ""
      for key, place in own.places.items():
        if written.places.get(key) != place._replace(file=place.file and inside + place.file):
          moved.update(key[: slash.start()] for slash in re.finditer("/", key))
    return moved

  def _store(self, items: epath.Path, process: int) -> epath.Path:
    """Where a process writes: with OCDBT, into a store of its own, which Orbax merges."""
    own = items / f"ocdbt.process_{process}"
    return own if own.exists() else items

  async def _opened(self, items, path) -> Any:
    self._written = self._written or reopen.Arrays(self._store(items, self._process), metadata=self._metadata)
    target = await decoded.opened(path, self.plan.target.leaves[path], self._written.open)
    if target.chunk_layout.write_chunk.shape != self._chunk_shapes[path]:
      self._unsure.add(path)
    return target

  async def _is_the_source(self, path, array) -> bool:
    """Whether an array is the source leaf's, as found only by the names of folder and leaf."""
    if plan_lib.is_held(path):
      return True
    ours = await decoded.opened(path, self.plan.source.leaves[path], self.source.open)
    return identity(ours) == identity(array)


def identity(array: Any) -> tuple[Any, ...]:
  """Where an array is, and everything that determines how it is decoded."""
  spec = array.spec().to_json()
  meaning = ("driver", "dtype", "metadata", "transform", "fill_missing_data_reads")
  return array.kvstore and array.kvstore.url, *(spec.get(name) for name in meaning)
