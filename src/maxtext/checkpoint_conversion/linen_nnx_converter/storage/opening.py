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

"""Opens the checkpoint at a location, of one pytree or several; restores and saves whole trees."""

from collections.abc import Iterable
import dataclasses
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values

Path = abstract_state.Path


def open_source(location: locations.Location) -> reader.Checkpoint:
  """The checkpoint at a location: one pytree, or several of Tunix's, with the step from the folder's name.

  Raises:
    ConversionError: one of its subclasses: its metadata cannot be read or parsed.
  """
  if not location.split:
    return reader.Checkpoint(location.items)
  source, path = SplitCheckpoint(location.items, location.split), layouts.FOLDER_STEP
  if location.step is None or layouts.TUNIX_ITEMS[1] not in location.split:
    return source
  return source.with_arrays({path: abstract_state.checked_cast(path, np.array(location.updates), np.dtype(np.int64))})


class SplitCheckpoint(reader.Checkpoint):
  """The same view of a train state that is split over several pytrees of one folder.

  The pytrees' names are the top-level keys of the tree, and the first part of the names of stored leaves, keys and data
  files, which are all relative to the common folder.
  """

  def __init__(self, directory: epath.Path, names: Iterable[str]):
    """Reads the metadata of the pytrees `<directory>/<name>`.

    Raises:
      UnfinishedCheckpointError: Orbax cannot read that of one of them.
      DamagedSourceError: an array has no metadata, or none that makes sense.
    """
    # pylint: disable=super-init-not-called
    self.directory, self._arrays = directory, {}
    self._items = {name: reader.Checkpoint(directory / name) for name in names}
    items = self._items.items()
    self.stores = tuple(f"{name}/" for name in self._items)
    self.is_uniform = len({(item.use_ocdbt, item.use_zarr3) for _, item in items}) == 1
    self.use_ocdbt = any(item.use_ocdbt for _, item in items)
    self.use_zarr3 = all(item.use_zarr3 for _, item in items)
    self.context = ocdbt_index.new_context()
    self.has_all_chunks = all(item.has_all_chunks for _, item in items)
    values = (
        (f"{name}/{key}", value._replace(file=value.file and f"{name}/{value.file}"))
        for name, item in items
        for key, value in item.index.values.items()
    )
    tree_files = frozenset(f"{name}/{file}" for name, item in items for file in item.index.tree_files)
    self.index = ocdbt_index.Index(stored_values.Values(values, slashes=1), tree_files)
    self.stored = {
        (name, *path): dataclasses.replace(leaf, name=f"{name}/{leaf.name}")
        for name, item in items
        for path, leaf in item.stored.items()
    }
    lists = frozenset((name, *path) for name, item in items for path in item.state.lists)
    leaves: dict[Path, Any] = {}
    for name, item in items:
      leaves |= {(name, *path): leaf for path, leaf in item.state.leaves.items()}
    self.state = abstract_state.AbstractState(leaves, lists)

  async def _open(self, path):
    return await self._items[path[0]].open(path[1:])

  async def read_value(self, key: str) -> bytes:
    """Reads the value of a key: an encoded chunk, or zarr metadata."""
    name, _, inner = key.partition("/")
    return await self._items[name].read_value(inner)


def check_chunks(checkpoint: reader.Checkpoint, paths: Iterable[Path]):
  """Checks that no chunk of the arrays at `paths` is empty, or absent where it must be there.

  Arrays held in memory have none.

  Raises:
    DamagedSourceError: one is.
  """
  for path in paths:
    leaf = checkpoint.stored.get(path)
    below = checkpoint.index.values.arrays.get(leaf.name) if leaf else None
    if not leaf or not below:
      continue
    if not below.rows[:, 2].all():
      rest = next(rest for rest, row in below.rows_of.items() if not below.rows[row, 2])
      raise errors.DamagedSourceError(path, f"a chunk at {leaf.name + rest}", "0 bytes")
    for rest in chunk_keys.keys("", leaf.document) if checkpoint.has_all_chunks else ():
      if rest not in below.rows_of:
        raise errors.DamagedSourceError(path, f"its chunk at {leaf.name + rest}", "no such key")


def check_whole(checkpoint: reader.Checkpoint):
  """Checks, without reading them, that the chunks of all arrays and their data files are there.

  Raises:
    DamagedSourceError: one is missing, or a file is too short.
  """
  check_chunks(checkpoint, checkpoint.stored)
  if checkpoint.use_ocdbt:  # Otherwise each value is a file that was just listed.
    ocdbt_index.file_lengths(checkpoint.directory, checkpoint.index)


def restore(directory: epath.Path) -> Any:
  """Restores a pytree into host memory, its arrays as NumPy arrays."""
  handler = ocp.PyTreeCheckpointHandler()
  with ocp.Checkpointer(handler) as checkpointer:
    restore_args = jax.tree.map(
        lambda leaf: ocp.RestoreArgs(restore_type=np.ndarray)
        if hasattr(leaf, "storage") and leaf.storage
        else ocp.RestoreArgs(),
        handler.metadata(directory).tree,
    )
    return checkpointer.restore(directory, args=ocp.args.PyTreeRestore(restore_args=restore_args))


def save_tree(directory: epath.Path, tree: Any):
  """Saves a pytree of arrays as a flat pytree folder."""
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))
