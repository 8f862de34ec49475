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

"""Takes over what a killed conversion had finished.

It leaves the folder in which Orbax was making the target (see `atomic_target`): plain chunks, or one OCDBT store per
process, in which every committed transaction is whole. A leaf that has all its chunks is compared with the source, to the
bit, like any target, and if it is equal its chunks are taken by reference. So it does not matter what made the folder:
leaves of another source, or damaged ones, are not equal.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
import dataclasses
import json
from typing import Any

from etils import epath
import jax
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import leaf_metadata
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import processes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf

Path = abstract_state.Path

# Compares target leaves, whose arrays the second opens, and passes those that are not equal to the third.
Compare = Callable[[Iterable[Path], Callable[[Path], Awaitable[Any]], Callable[[Path, Exception], None]], Awaitable[None]]

_READS_AT_ONCE = 1000
_TIMEOUT_MS = 7 * 24 * 3600 * 1000  # The whole source may have to be read. If the first process dies, so do the others.


@dataclasses.dataclass(frozen=True)
class Leftover:
  """A pytree that was being written.

  Attributes:
    directory: its folder.
    context: the TensorStore context for reading it.
    index: its keys, from all processes.
    use_ocdbt: whether they are in OCDBT stores.
    use_zarr3: whether the arrays are zarr 3.
    stores: as in `reader.Checkpoint`: one store of everything in the folder.
  """

  directory: epath.Path
  context: ts.Context
  index: ocdbt_index.Index
  use_ocdbt: bool
  use_zarr3: bool
  stores: tuple[str, ...] = ("",)

  async def open(self, path: Path) -> ts.TensorStore:
    """Opens the array of a leaf for reading."""
    store = ocdbt_index.spec(self.directory, use_ocdbt=self.use_ocdbt)
    spec = {
        "driver": "zarr3" if self.use_zarr3 else "zarr",
        "kvstore": store | {"path": store["path"] + ".".join(path)},
        "fill_missing_data_reads": False,
    }
    return await ts.open(spec, open=True, read=True, context=self.context)

  async def read(self, keys: Iterable[str]) -> list[bytes]:
    """Reads the values of keys that are in the index."""
    if not self.use_ocdbt:
      return await asyncio.gather(*(asyncio.to_thread((self.directory / key).read_bytes) for key in keys))
    store = await ts.KvStore.open(ocdbt_index.spec(self.directory, use_ocdbt=True), context=self.context)
    return [result.value for result in await asyncio.gather(*(store.read(key) for key in keys))]


@dataclasses.dataclass(frozen=True)
class Resumption:
  """What is taken over.

  Attributes:
    routes: the new routes of these leaves.
    origins: the leftovers, each with the leaves taken from it.
    redone: leaves that were finished, but differ from what the plan makes of the source.
    folders: the leftovers' folders, which `discard` removes.
    unreadable: pytrees in them that are too damaged to be used.
  """

  routes: Mapping[Path, leaf_routes.Route] = dataclasses.field(default_factory=dict)
  origins: tuple[tuple[Leftover, tuple[Path, ...]], ...] = ()
  redone: tuple[Path, ...] = ()
  folders: tuple[epath.Path, ...] = ()
  unreadable: tuple[epath.Path, ...] = ()

  def summary(self) -> str:
    """A clause for a person."""
    if not self.routes and not self.redone:
      why = ", for what was left cannot be read" if self.unreadable else ", for no leaf was finished"
      return "nothing to resume" + (why if self.folders else "")
    redone = f", {len(self.redone)} that were damaged or of another source done anew" if self.redone else ""
    unreadable = f", {len(self.unreadable)} stores of it cannot be read" if self.unreadable else ""
    return f"{len(self.routes)} leaves taken from the interrupted run{redone}{unreadable}"


def take(
    target: locations.Location,
    plan: plan_lib.Plan,
    source: reader.Checkpoint,
    routes: Mapping[Path, leaf_routes.Route],
    form: storage_form.StorageForm,
    *,
    progress: Any,
    compare: Compare,
) -> Resumption:
  """Finds the leaves that need not be streamed or copied again.

  The first of several processes does so, and the others learn what it found.

  Args:
    target: where the conversion goes to.
    plan: the plan.
    source: the source.
    routes: how the plan's leaves would go.
    form: how the target is stored.
    progress: a `progress.Progress`, is told how far the comparison has come.
    compare: compares target leaves with what the plan makes of the source.
  """
  found: list[Resumption] = []

  def find() -> str:
    found.append(_take(target, plan, source, routes, form, progress, compare))
    return json.dumps([number for number, path in enumerate(routes) if path in found[0].routes])

  numbers = set(json.loads(processes.from_first(find, _TIMEOUT_MS)))
  if found:
    return found[0]
  return Resumption({path: _resumed(routes[path]) for number, path in enumerate(routes) if number in numbers})


def _take(target, plan, source, routes, form, progress, compare) -> Resumption:
  atomic_target.keep(target.final)
  folders = tuple(atomic_target.kept(target.final))
  moved = (leaf_routes.Way.STREAMED, leaf_routes.Way.RAW)
  wanted = {
      path: leaf
      for path, leaf in target_leaves.target_leaves(plan, source, routes).items()
      if path in routes and routes[path].way in moved
  }
  taken, origins, redone, unreadable = {}, [], set(), []
  for directory in _directories(folders, target):
    try:
      leftover = coroutines.run(_open(directory, form))
      finished = coroutines.run(_finished(leftover, wanted, form.compression)) if leftover else {}
    except (OSError, ValueError) as e:  # What the system, TensorStore and Orbax raise on a damaged store.
      errors.check_access(directory, e)
      unreadable.append(directory)
      continue
    if leftover is None:
      continue
    failed = coroutines.run(_unequal(plan, leftover, finished, progress, compare))
    equal = {path: keys for path, keys in finished.items() if path not in failed}
    origins.append((leftover, tuple(equal)))
    redone |= failed
    taken |= {path: _resumed(routes[path], keys) for path, keys in equal.items()}
    wanted = {path: leaf for path, leaf in wanted.items() if path not in equal}
  return Resumption(taken, tuple(origins), tuple(sorted(redone - taken.keys())), folders, tuple(unreadable))


def _resumed(route, keys=()) -> leaf_routes.Route:
  """The route of a leaf whose keys are taken over."""
  renamed = tuple((key, key) for key in keys)
  return dataclasses.replace(route, way=leaf_routes.Way.RESUMED, renamed=renamed, documents={})


def prepare(final: epath.Path, *, keeps: bool):
  """Puts back what a killed conversion to `final` had moved away; in remote storage, moves aside what it was making.

  Raises:
    TargetError: another conversion to `final` is under way.
  """
  if jax.process_index() == 0:
    atomic_target.recover(final)
  if keeps and remote_files.is_remote(final):  # It stands at `final`: the others may look there when it is moved.
    processes.from_first(lambda: str(atomic_target.keep(final)), _TIMEOUT_MS)


def discard(final: epath.Path):
  """Removes the leftovers of earlier runs."""
  for folder in atomic_target.kept(final) if jax.process_index() == 0 else ():
    folder.rmtree()


def _directories(folders: Iterable[epath.Path], target: locations.Location) -> Iterator[epath.Path]:
  """The folders of the pytrees that were being written."""
  for folder in folders:
    inner = [path for path in folder.iterdir() if path.name.startswith(target.items.name)]
    yield from inner if target.step_folder else [folder]


async def _open(directory, form) -> Leftover | None:
  has_stores = any(path.name.startswith("ocdbt.process_") for path in directory.iterdir())
  if has_stores != form.use_ocdbt:
    return None
  context = ocdbt_index.new_context()
  if has_stores:  # Merged into one, as by Orbax before it commits; the data files stay where they are.
    await orbax_writer.merge_stores(directory, context, use_zarr3=form.use_zarr3)
  index = await ocdbt_index.read_index(directory, use_ocdbt=form.use_ocdbt, context=context)
  return Leftover(directory, context, index, form.use_ocdbt, form.use_zarr3)


async def _finished(leftover, leaves: Mapping[Path, target_leaf.TargetLeaf], compression) -> dict[Path, list[str]]:
  """The keys of those leaves that are there whole, in the wanted chunks and compression."""
  lengths, found = _lengths(leftover), {}
  documents = {path: f"{'.'.join(path)}/{chunk_keys.DOCUMENT_NAMES[3 if leftover.use_zarr3 else 2]}" for path in leaves}
  present = [path for path in leaves if documents[path] in leftover.index.values]
  for i in range(0, len(present), _READS_AT_ONCE):
    some = present[i : i + _READS_AT_ONCE]
    for path, text in zip(some, await leftover.read([documents[path] for path in some])):
      keys = _keys(path, leaves[path], text, compression)
      if keys and all(_is_there(leftover.index.values.get(key), lengths) for key in keys):
        found[path] = [*keys, documents[path]]
  return found


def _keys(path, leaf: target_leaf.TargetLeaf, text: bytes, compression: str | None) -> list[str]:
  """The keys of a leaf's chunks; none if its zarr metadata do not match."""
  try:
    document = json.loads(text)
    found = chunk_keys.shape(document), chunk_keys.chunk_shape(document), leaf_metadata.dtype(document)
    if found != (leaf.shape, leaf.chunk_shape, leaf.dtype):
      return []
    if compression not in (None, chunk_keys.compression(document)):
      return []
    return list(chunk_keys.keys(".".join(path), document))
  except (ValueError, KeyError, TypeError, AttributeError):
    return []


def _lengths(leftover) -> dict[str, int]:
  """The lengths of the data files that exist."""
  paths = {file: leftover.directory / file for file in leftover.index.values.files if file}
  return {file: path.stat().length for file, path in paths.items() if path.exists()}


def _is_there(value: stored_values.Value | None, lengths: Mapping[str, int]) -> bool:
  if value is None:
    return False
  return value.inline is not None or value.offset + value.nbytes <= lengths.get(value.file, 0)


async def _unequal(plan, leftover, paths, progress, compare) -> set[Path]:
  """Those leaves that are not what the plan makes of the source, or cannot be read."""
  failed: dict[Path, Exception | None] = {}
  leaves = plan.target.leaves
  progress.start("verifying what was left", sum(leaves[path].size * leaves[path].dtype.itemsize for path in paths))
  try:
    await compare(paths, leftover.open, failed.__setitem__)
  except (OSError, ValueError):  # The source cannot be read, which streaming it will report.
    failed = dict.fromkeys(paths, None)
  progress.finish()
  return set(failed)
