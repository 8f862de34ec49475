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

"""Reading checkpoints. With `framing.py`, the only module that knows Orbax and TensorStore.

Tried with orbax-checkpoint 0.11.39 and 0.12.4. What is private to Orbax is imported from `orbax.checkpoint._src`.
"""

import asyncio
import dataclasses
import importlib.metadata
import json
import os
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.serialization import tensorstore_utils
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

Path = abstract_state.Path

JAX_ARRAY, NUMPY_ARRAY, SCALAR = "jax.Array", "np.ndarray", "scalar"  # Orbax's value types of stored arrays.


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """How an array leaf is stored.

  Attributes:
    name: Orbax's name for it, its path joined by dots.
    value_type: Orbax's value type: `jax.Array`, `np.ndarray` or `scalar`.
    shape: its shape.
    dtype: its dtype.
    chunk_shape: the shape of its chunks, the smallest unit that can be decoded.
    sharding: Orbax's metadata of the sharding that it was saved with, or None.
    ext_metadata: Orbax's further metadata: the implementation of a typed PRNG key whose data this is.
  """

  name: str
  value_type: str
  shape: tuple[int, ...]
  dtype: np.dtype
  chunk_shape: tuple[int, ...]
  sharding: Any = None
  ext_metadata: Any = None

  @property
  def nbytes(self) -> int:
    return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Checkpoint:
  """A read-only view of a pytree that Orbax saved.

  Attributes:
    directory: the folder of the pytree, the one that holds `_METADATA`.
    state: its abstract state.
    stored: its array leaves by path.
    use_ocdbt: whether the arrays are in an OCDBT store.
    use_zarr3: whether the arrays are zarr 3.
  """

  def __init__(self, directory: epath.Path):
    """Reads the metadata of every leaf, and no array.

    Raises:
      UnfinishedCheckpointError: Orbax cannot read the metadata that the folder should have.
    """
    self.directory = directory
    try:
      metadata = ocp.PyTreeCheckpointHandler().metadata(directory)
      document = json.loads((directory / "_METADATA").read_text())
      ext_metadata = _read_ext_metadata(directory)
    except Exception as e:  # Whatever Orbax, TensorStore or json raise on a damaged file.  pylint: disable=broad-except
      raise errors.UnfinishedCheckpointError(
          directory,
          expected="metadata that Orbax can read",
          found=first_line(e),
          remedy="The checkpoint is damaged or was never committed: use another step.",
      ) from e
    self.use_ocdbt = ocp.type_handlers.is_ocdbt_checkpoint(directory)
    self.use_zarr3 = bool(metadata.use_zarr3)
    # Where the writer left out chunks that hold the fill value, a missing chunk is no damage.
    self._fill_missing = not document.get("store_array_data_equal_to_fill_value", False)
    self._context = tensorstore_utils.get_ts_context(use_ocdbt=self.use_ocdbt)
    value_types = _value_types(document)
    tree = abstract_state.flatten(metadata.tree)
    self.stored = {
        path: _stored_leaf(leaf, value_types.get(path, JAX_ARRAY), ext_metadata)
        for path, leaf in tree.leaves.items()
        if abstract_state.is_array(leaf)
    }
    self.state = dataclasses.replace(
        tree, leaves={path: self._abstract(path, leaf) for path, leaf in tree.leaves.items()}
    )

  async def open(self, path: Path) -> ts.TensorStore:
    """Opens the array of a leaf for reading."""
    spec = {
        "driver": "zarr3" if self.use_zarr3 else "zarr",
        "kvstore": tensorstore_utils.build_kvstore_tspec(
            os.fspath(self.directory), self.stored[path].name, use_ocdbt=self.use_ocdbt
        ),
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": self._fill_missing,
    }
    return await ts.open(spec, open=True, read=True, context=self._context)

  def read(self, path: Path) -> np.ndarray:
    """Reads the whole array of a leaf, for leaves that are small."""

    async def read():
      return await (await self.open(path)).read()

    return asyncio.run(read())

  def _abstract(self, path, leaf):
    if path in self.stored:
      return jax.ShapeDtypeStruct(self.stored[path].shape, self.stored[path].dtype)
    if abstract_state.is_empty(leaf):
      return leaf
    return json.loads((self.directory / "_strings.json").read_text())[leaf.name]


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


def versions() -> dict[str, str]:
  """The versions of the libraries that read and write."""
  return {
      "jax": jax.__version__,
      "orbax-checkpoint": ocp.__version__,
      "tensorstore": importlib.metadata.version("tensorstore"),
  }


def _stored_leaf(leaf, value_type, ext_metadata) -> StoredLeaf:
  storage = getattr(leaf, "storage", None)
  return StoredLeaf(
      leaf.name,
      value_type,
      tuple(leaf.shape),
      np.dtype(leaf.dtype),
      tuple(storage.chunk_shape) if storage is not None else (),
      leaf.sharding,
      ext_metadata.get(leaf.name),
  )


def _read_ext_metadata(directory) -> dict[str, Any]:
  if not (directory / "array_metadatas").exists():
    return {}
  by_process = asyncio.run(array_metadata_store.Store().read(directory)) or {}
  lists = by_process.values() if isinstance(by_process, dict) else [by_process]
  return {metadata.param_name: metadata.ext_metadata for metadatas in lists for metadata in metadatas}


def _value_types(document) -> dict[Path, str]:
  """Orbax's value type of each leaf, from `_METADATA`."""
  return {
      tuple(str(key["key"]) for key in entry["key_metadata"]): entry["value_metadata"]["value_type"]
      for entry in document["tree_metadata"].values()
  }


def first_line(e: BaseException) -> str:
  return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"[:300]
