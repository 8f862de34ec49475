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

"""Moves the arrays of a plan, each by its route, into the folder that `orbax_writer.save` is filling."""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
from typing import Any, Protocol

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import by_reference
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import resume
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import durable
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form

Path = abstract_state.Path

# Keys per transaction: 1.6 million at once took 1.2 GiB; in batches they take 0.7 GiB, and 17 percent longer.
_KEYS_AT_ONCE = 200_000


class Comparison(Protocol):
  """Compares what is streamed while it is in memory, and files while they are copied."""

  async def compare(self, items: epath.Path, path: Path, array: Any, region: streaming.Region, data: Any) -> None:
    """Compares the target's pytree with what was read of a region of a source leaf's array."""

  @property
  def watch(self) -> durable.Watch:
    """Compares a file with what it is copied from."""

  def hand_over(self, items: epath.Path) -> None:
    """Everything that this process streams has been compared."""


@dataclasses.dataclass(frozen=True)
class Move:
  """Moves a plan's arrays into the folder that `orbax_writer.save` is filling.

  Attributes:
    plan: the plan.
    source: the source.
    form: how the target is stored.
    routes: the route of each target leaf that is an array.
    lengths: the lengths of the source's data files.
    copy_mode: how to bring data files, as `options.Options` has it.
    memory_budget: what the data in flight may take.
    progress: is told of the bytes of decoded chunks, and of copied values and files.
    taken: what interrupted runs left, each with the leaves that are taken over from it.
    process: the index of this process; each moves a share of the bytes.
    processes: how many processes there are.
    comparison: compares what was streamed, and files that were copied, with the source.
  """

  plan: plan_lib.Plan
  source: reader.Checkpoint
  form: storage_form.StorageForm
  routes: Mapping[Path, leaf_routes.Route]
  lengths: Mapping[str, int]
  copy_mode: str
  memory_budget: memory.Budget
  progress: progress_lib.Progress
  taken: tuple[tuple[resume.Leftover, tuple[Path, ...]], ...] = ()
  process: int = 0
  processes: int = 1
  comparison: Comparison | None = None

  def nbytes(self) -> dict[leaf_routes.Way, int]:
    """The bytes, by way, of which the processes' `progress` will be told."""
    way = leaf_routes.Way
    ways = {path: route.way for path, route in self.routes.items()}
    return {
        way.STREAMED: leaf_routes.nbytes(self.plan, ways)[way.STREAMED],
        way.RAW: sum(self.raw()),
        way.REFERENCE: sum(self.lengths[file] for file in leaf_routes.data_files(self.routes, self.source.index)),
    }

  def raw(self) -> list[int]:
    """The sizes of the encoded values to copy."""
    return [self.source.index.values.nbytes_of(old) for old, _ in self._keys(leaf_routes.Way.RAW)]

  def blocks(self, chunk_shapes: Mapping[Path, tuple[int, ...]]) -> Iterator[streaming.Block]:
    """The blocks that fill target leaves of these chunk shapes."""
    return streaming.blocks(self.plan, chunk_shapes, lambda path: self.source.stored[path].chunk_shape)

  def leaves(self) -> abstract_state.AbstractState:
    """The leaves to give to Orbax, and their lists."""
    leaves = target_leaves.target_leaves(self.plan, self.source, self.routes)
    return dataclasses.replace(self.plan.target, leaves=leaves)

  def streamed(self) -> dict[Path, tuple[int, ...]]:
    """The target leaves that are streamed, each with the shape of its chunks."""
    return {p: route.chunk_shape for p, route in self.routes.items() if route.way == leaf_routes.Way.STREAMED}

  async def stream(self, stores: Mapping[Path, Any], items: epath.Path):
    """Streams arrays into open stores of the pytree in this folder."""

    async def on_written(block, array, data):
      if self.comparison:
        await self.comparison.compare(items, block.source, array, block.region, data)
      self.progress.advance(block.nbytes)

    chunk_shapes = {path: store.chunk_layout.write_chunk.shape or () for path, store in stores.items()}
    await streaming.stream(
        self._share(self.blocks(chunk_shapes), lambda block: block.nbytes),
        open_source=self.source.open,
        targets=stores,
        new_transaction=orbax_writer.new_transaction,
        memory_budget=self.memory_budget,
        on_written=on_written,
    )
    if self.comparison:
      self.comparison.hand_over(items)

  async def put_encoded(self, items: epath.Path):
    """Puts all other arrays into the folder of the pytree."""
    if not self.source.use_ocdbt:
      await self._bring_chunks(items)
      await self._take_over(items)
      return
    await self._refer(items)
    await self._take_over(items)
    raw = self._keys(leaf_routes.Way.RAW)
    if raw:
      await by_reference.copy_values(
          self.source,
          ocdbt_index.writable_spec(items / f"ocdbt.process_{self.process}", self.form.data_file_size),
          self._share(raw, lambda pair: self.source.index.values.nbytes_of(pair[0])),
          self._documents(leaf_routes.Way.RAW) if self.process == 0 else {},
          memory_budget=self.memory_budget,
          on_copied=lambda old: self.progress.advance(self.source.index.values.nbytes_of(old)),
      )

  async def _refer(self, items):
    """Brings the source's data files, and makes the target's store refer to them."""
    renamed = self._renamed(leaf_routes.Way.REFERENCE)
    if not renamed:
      return
    tree_files = self.source.index.tree_files
    files = leaf_routes.data_files(self.routes, self.source.index) - tree_files
    mine = self._share(sorted(files), self.lengths.__getitem__)
    await self._bring(items, [(file, file) for file in mine])
    if self.process == 0:
      await self._refer_to(self.source, items, renamed, self._documents(leaf_routes.Way.REFERENCE))

  async def _refer_to(self, origin: reader.Checkpoint | resume.Leftover, items, renamed, documents):
    """Makes the target's store refer to data files that are already there.

    Files with nodes of the tree are brought, because they are read to rename keys, and removed if the target does not
    need them.
    """
    tree_files = origin.index.tree_files
    await self._bring(
        items, [(file, file) for file in sorted(tree_files)], None if origin is self.source else origin.directory
    )
    values, arrays = origin.index.values, {old for old, _ in renamed if old.endswith("/")}
    names = (f"{name}/" for name in values.arrays)
    keys = sorted(key for name in names for key in ((name,) if name in arrays else values.keys_of(name)))
    for some in streaming.batches(renamed, lambda pair: values.count_of(pair[0]), _KEYS_AT_ONCE):
      await by_reference.rename(origin, items, chunk_keys.ranges(some, keys), documents)
      documents = {}
    for file in tree_files - await ocdbt_index.read_tree_files(items, origin.context) - self._value_files():
      (items / file).unlink()

  def _value_files(self) -> set[str]:
    """The data files with values that the target refers to."""
    stores = [(leftover, paths) for leftover, paths in self.taken if leftover.use_ocdbt]
    taken = [leftover.index.values.files_of(key) for leftover, paths in stores for key, _ in self._kept(paths)]
    return leaf_routes.data_files(self.routes, self.source.index).union(*taken)

  def _kept(self, paths) -> list[tuple[str, str]]:
    return [pair for path in paths for pair in self.routes[path].renamed]

  async def _take_over(self, items):
    """Takes over what an interrupted run had finished, under the same keys."""
    for leftover, paths in self.taken:
      keys = self._kept(paths)
      if not keys:
        continue
      if not leftover.use_ocdbt:
        await self._bring(items, keys, leftover.directory)
        continue
      files = set().union(*(leftover.index.values.files_of(key) for key, _ in keys)) - leftover.index.tree_files
      await self._bring(items, [(file, file) for file in sorted(files)], leftover.directory)
      await self._refer_to(leftover, items, keys, {})

  async def _bring_chunks(self, items):
    """Brings the files of chunks under their new names."""
    for way in (leaf_routes.Way.REFERENCE, leaf_routes.Way.RAW):
      await self._bring(items, self._share(self._keys(way), lambda pair: self.lengths[pair[0]]))
      if self.process == 0:
        for key, text in self._documents(way).items():
          (items / key).write_bytes(text)

  async def _bring(self, items, files, leftover: epath.Path | None = None):
    """Brings files of the source, or of an interrupted run, which nobody owns and which need not be copied."""
    copy_mode = "auto"
    if not leftover:  # Without OCDBT, whoever saves over the source may write into its files.
      copy_mode = "copy" if self.copy_mode == "auto" and not self.source.use_ocdbt else self.copy_mode
    await by_reference.bring(
        leftover or self.source.directory,
        items,
        files,
        copy_mode=copy_mode,
        on_brought=lambda file: None if leftover else self.progress.advance(self.lengths.get(file, 0)),
        watch=self.comparison.watch if self.comparison else None,
    )

  def _share[T](self, work: Iterable[T], nbytes_of: Callable[[T], int]) -> Iterator[T]:
    """This process's share of the work: each piece goes to the process with the fewest bytes so far."""
    loads = [0] * self.processes
    for piece in work:
      owner = loads.index(min(loads))
      loads[owner] += nbytes_of(piece)
      if owner == self.process:
        yield piece

  def _keys(self, way) -> list[tuple[str, str]]:
    """All old and new keys of a way, one by one."""
    keys_of = self.source.index.values.keys_of
    return [(key, new + key[len(old) :]) for old, new in self._renamed(way) for key in keys_of(old)]

  def _renamed(self, way) -> list[tuple[str, str]]:
    return [pair for route in self.routes.values() if route.way == way for pair in route.renamed]

  def _documents(self, way) -> dict[str, bytes]:
    return {key: text for route in self.routes.values() if route.way == way for key, text in route.documents.items()}
