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

The target is read back from the store that it was just written to, by arrays that are opened here. Of the writer nothing
is taken but the block: that it is the source's is seen from where its array lies, and what its zarr metadata are. A block
is whole chunks of the target, so nothing that is written later changes what was compared; that the target's keys still
refer to it, `digests` makes sure of. What is not proven here is compared like all others, by decoding both sides.
"""

from collections.abc import Mapping
import itertools
import re
from typing import Any

from etils import epath
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests as digests_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen

Path = abstract_state.Path


class Comparison:
  """Compares blocks, in the process that writes all of them."""

  def __init__(
      self, plan: plan_lib.Plan, source: reopen.Arrays, chunk_shapes: Mapping[Path, tuple[int, ...]], *, use_zarr3: bool
  ):
    """Begins without any block.

    Args:
      plan: the plan that is carried out.
      source: the source.
      chunk_shapes: of the target leaves that are streamed, the shapes of their chunks.
      use_zarr3: whether they are zarr 3.
    """
    self.plan, self.source = plan, source
    # Orbax has every chunk written. One that is not must not be taken for zeros.
    self._metadata = {"use_zarr3": use_zarr3, "store_array_data_equal_to_fill_value": True}
    self._chunk_shapes = chunk_shapes
    self._parts = plan.parts() if chunk_shapes else {}
    self._collector = digests_lib.Collector(plan.target.leaves, chunk_shapes)
    self._unsure: set[Path] = set()
    self._written: reopen.Arrays | None = None

  async def compare(self, items: epath.Path, path: Path, array: Any, region: tuple[slice, ...], data: np.ndarray):
    """Compares what stands in the target with a region of a source leaf.

    Args:
      items: the folder of the target's pytree.
      path: the source leaf.
      array: the array that the data were read from.
      region: the region.
      data: what stands in it.

    Raises:
      VerificationError: naming the first element that differs.
    """
    parts = [part for part in self._parts[path] if part.target in self._chunk_shapes]
    if not await self._is_the_source(path, array):
      self._unsure.update(part.target for part in parts)
      return
    box = tuple((part.start, part.stop) for part in region)
    there = [(part.target, place) for part in parts if (place := decoded.placed(part, box, data))]
    for some in itertools.batched(there, decoded.PARTS_AT_ONCE):
      await coroutines.settle(self._compare_box(items, target, *place) for target, place in some)

  async def digests(self, written: reopen.Arrays) -> dict[Path, digests_lib.Digest]:
    """The digests of the target leaves that are proven equal.

    Args:
      written: the target as it is to be committed, whose places are read.
    """
    found = self._collector.digests()
    if self._written is None or not found:
      return {}
    folder = self._store(written.directory)
    own = reopen.Arrays(folder, metadata=self._metadata)  # Orbax has renamed the folder that it is in.
    await own.read_places()
    inside = f"{folder.name}/" if folder != written.directory else ""
    lies_there = lambda key, place: written.places.get(key) == place._replace(file=place.file and inside + place.file)
    moved = (key for key, place in own.places.items() if not lies_there(key, place))
    touched = {key[: slash.start()] for key in moved for slash in re.finditer("/", key)}
    sure = (path for path in found if path not in self._unsure and written.name(path) not in touched)
    return {path: found[path] for path in sure}

  def _store(self, items: epath.Path) -> epath.Path:
    """Where the process writes to: with OCDBT, a store of its own, which Orbax merges."""
    own = items / "ocdbt.process_0"
    return own if own.exists() else items

  async def _compare_box(self, items, path, place, expected):
    self._written = self._written or reopen.Arrays(self._store(items), metadata=self._metadata)
    target = await decoded.opened(path, self.plan.target.leaves[path], self._written.open)
    if target.chunk_layout.write_chunk.shape != self._chunk_shapes[path]:
      self._unsure.add(path)
    await decoded.verify_box(path, target, place, expected, self._collector.add)

  async def _is_the_source(self, path, array) -> bool:
    """Whether an array is the source leaf's, as it is found by the names of its folder and of the leaf alone."""
    if plan_lib.is_held(path):
      return True
    ours = await decoded.opened(path, self.plan.source.leaves[path], self.source.open)
    return identity(ours) == identity(array)


def identity(array: Any) -> tuple[Any, ...]:
  """Where an array lies, and all that tells how it is decoded."""
  spec = array.spec().to_json()
  meaning = ("driver", "dtype", "metadata", "transform", "fill_missing_data_reads")
  return array.kvstore and array.kvstore.url, *(spec.get(name) for name in meaning)
