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

"""Reading checkpoints: the metadata of every leaf, and arrays on demand.

Tried with orbax-checkpoint 0.11.37, 0.12.4 and 0.12.8, whose private parts are imported from `orbax.checkpoint._src`.
"""

import asyncio
from collections.abc import Mapping
import copy
import dataclasses
import functools
import json
import math
from typing import Any

from etils import epath
import jax
import numpy as np
from orbax.checkpoint._src.metadata import array_metadata
from orbax.checkpoint._src.metadata import tree as tree_metadata
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import leaf_metadata
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values

Path = abstract_state.Path

# Orbax's value types: of stored arrays, of strings, of nodes without children.
ARRAY_TYPES = JAX_ARRAY, NUMPY_ARRAY, SCALAR = "jax.Array", "np.ndarray", "scalar"
_STRING = "string"
_COMPRESSION = "compression_algorithm", "compression_level"
_ANY_AGE = 0.0  # Of the manifest, which TensorStore would ask for anew for each value.
_EMPTY_NODES: dict[str, Any] = {"None": None, "Dict": {}, "List": [], "Tuple": (), "NamedTuple": None}


@dataclasses.dataclass(frozen=True)
class StoredLeaf:
  """How an array leaf is stored.

  Attributes:
    name: Orbax's name for it, its path joined by dots, below which its keys are.
    value_type: Orbax's value type: `jax.Array`, `np.ndarray` or `scalar`.
    dtype: its dtype.
    document: its zarr metadata document.
    write_shape: the shape that a device wrote at once, from Orbax's array metadata, or None.
    sharding: Orbax's JSON of the sharding that it was saved with, or None.
    ext_metadata: Orbax's further metadata: the implementation of a typed PRNG key whose data this is.
    compression: what Orbax's array metadata, from 0.12.8 on, says of the compression.
  """

  name: str
  value_type: str
  dtype: np.dtype
  document: chunk_keys.Document
  write_shape: tuple[int, ...] | None = None
  sharding: str | None = None
  ext_metadata: Any = None
  compression: Mapping[str, Any] = dataclasses.field(default_factory=dict)

  @property
  def shape(self) -> tuple[int, ...]:
    return chunk_keys.shape(self.document)

  @property
  def chunk_shape(self) -> tuple[int, ...]:
    """The shape of its chunks, the smallest units that can be decoded."""
    return chunk_keys.chunk_shape(self.document)

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


class Checkpoint:
  """A read-only view of a pytree that Orbax saved.

  Attributes:
    directory: the folder of the pytree, with `_METADATA`.
    state: its abstract state.
    stored: its array leaves by path.
    use_ocdbt: whether the arrays are in an OCDBT store.
    use_zarr3: whether the arrays are zarr 3.
    has_all_chunks: whether an absent chunk was lost, rather than left out because it holds only the fill value.
    index: the keys of its stores, and where their values lie.
    stores: the folders of its stores below `directory`, with which their keys and data files begin.
    is_uniform: whether all its stores are of one kind.
  """

  stores: tuple[str, ...] = ("",)
  is_uniform = True

  @abstract_state.uncollected()
  def __init__(self, directory: epath.Path, values: stored_values.Values | None = None):
    """Reads the metadata of every leaf, and no array.

    Orbax's own `metadata` opens every array: 20,000 leaves take it 8 s, and this one.

    Args:
      directory: the folder of the pytree.
      values: where the values of its keys lie, if already known.

    Raises:
      UnfinishedCheckpointError: Orbax cannot read the metadata that the folder should have.
      DamagedSourceError: an array has no metadata, or implausible ones.
    """
    ocdbt_index.check_place(directory)
    self.directory, self._arrays = directory, {}
    self._store: ts.KvStore | None = None
    self.use_ocdbt = (directory / "manifest.ocdbt").exists()
    self.context = ocdbt_index.new_context()
    self._spec = ocdbt_index.spec(directory, use_ocdbt=self.use_ocdbt)
    try:
      if self.use_ocdbt:
        source_files.check_file(directory / "manifest.ocdbt")
      document = source_files.read_json(directory / "_METADATA")
      with leaf_metadata.parsing():
        metadata = tree_metadata.InternalTreeMetadata.from_json(document)
        nested = metadata.as_nested_tree()
      tree = abstract_state.flatten(nested)
      self._strings = source_files.read_json(directory / "_strings.json", {})
      self.index = ocdbt_index.Index(values or stored_values.Values())
      if values is None:
        self.index = coroutines.run(ocdbt_index.read_index(directory, use_ocdbt=self.use_ocdbt, context=self.context))
      array_metadatas = leaf_metadata.read_array_metadatas(directory)
      shardings = leaf_metadata.read_shardings(directory)
    except errors.ConversionError:
      raise
    except (OSError, ValueError) as e:  # What the system, json and TensorStore raise on damaged files.
      errors.check_access(directory, e)
      raise errors.UnfinishedCheckpointError(directory, "metadata that Orbax can read", errors.one_line(e)) from e
    if metadata.use_ocdbt and not self.use_ocdbt:
      raise errors.UnfinishedCheckpointError(directory, "an OCDBT store, as its metadata says", "no manifest.ocdbt")
    self.use_zarr3 = bool(metadata.use_zarr3)
    self.has_all_chunks = bool(metadata.store_array_data_equal_to_fill_value)
    leaf_metadata.check_names(tree.leaves, use_ocdbt=self.use_ocdbt)
    leaf_metadata.check_all_named({*array_metadatas, *shardings}, tree.leaves, "in Orbax's array metadata and shardings")
    # Like layers have equal documents, and share one here.
    parse = functools.cache(functools.partial(leaf_metadata.parse_document, use_zarr3=self.use_zarr3))
    arrays = {path: leaf.value_type for path, leaf in tree.leaves.items() if leaf.value_type in ARRAY_TYPES}
    texts = coroutines.run(self._texts([self._document_key(path) for path in arrays]))
    self.stored = {
        path: self._stored_leaf(path, value_type, texts, parse, array_metadatas, shardings)
        for path, value_type in arrays.items()
    }
    leaf_metadata.check_all_named(leaf_metadata.array_names(self.index), self.stored, "in the store")
    self.state = dataclasses.replace(
        tree, leaves={path: self._abstract(path, leaf.value_type) for path, leaf in tree.leaves.items()}
    )

  async def open(self, path: Path) -> ts.TensorStore:
    """Opens the array of a leaf for reading."""
    return ts.array(self._arrays[path]) if path in self._arrays else await self._open(path)

  async def _open(self, path):
    spec = {
        "driver": "zarr3" if self.use_zarr3 else "zarr",
        "kvstore": self._spec | {"path": self._spec["path"] + self.stored[path].name},
        "recheck_cached_data": False,
        "recheck_cached_metadata": False,
        "fill_missing_data_reads": not self.has_all_chunks,
    }
    return await ts.open(spec, open=True, read=True, context=self.context)

  def read(self, path: Path) -> np.ndarray:
    """Reads the whole array of a leaf; for small leaves."""

    async def read():
      return await read_region(path, await self.open(path), ...)

    return coroutines.run(read())

  async def read_value(self, key: str) -> bytes:
    """Reads the value of a key: an encoded chunk, or zarr metadata."""
    value = self.index.values[key]
    if value.inline is not None:
      return value.inline
    if not remote_files.is_remote(self.directory):  # TensorStore would take three times as long.
      return await asyncio.to_thread(ocdbt_index.read_range, self.directory / value.file, value.offset, value.nbytes)
    if self._store is None:
      self._store = await ts.KvStore.open(self._spec, context=self.context)
    result = await self._store.read(key, staleness_bound=_ANY_AGE)
    if result.state != "value":
      raise errors.DamagedSourceError(key, "a value", f"{result.state} key")
    return result.value

  def _document_key(self, path) -> str:
    return f"{'.'.join(path)}/{chunk_keys.DOCUMENT_NAMES[3 if self.use_zarr3 else 2]}"

  async def _texts(self, keys) -> dict[str, Any]:
    """The values of those of the keys that there are, read together; or what kept one from being read."""
    keys = [key for key in keys if key in self.index.values]
    return dict(zip(keys, await asyncio.gather(*map(self.read_value, keys), return_exceptions=True)))

  def _stored_leaf(self, path, value_type, texts, parse, array_metadatas, shardings) -> StoredLeaf:
    name, key = ".".join(path), self._document_key(path)
    try:
      if isinstance(text := texts.get(key, ValueError("no such key")), Exception):
        raise text
      document, dtype = parse(text)
      metadata = array_metadatas.get(name)
      write_shape = metadata and tuple(metadata.write_shape)
      if write_shape is not None and len(write_shape) != len(document["shape"]):
        raise ValueError(f"Orbax's array metadata say that it was written by {write_shape}")
      return StoredLeaf(
          name,
          value_type,
          dtype,
          document,
          write_shape,
          shardings.get(name),
          metadata and metadata.ext_metadata,
          {name: getattr(metadata, name) for name in _COMPRESSION if hasattr(metadata, name)},
      )
    except errors.ConversionError:
      raise
    except (OSError, ValueError) as e:
      errors.check_access(path, e)
      raise errors.DamagedSourceError(path, f"an array whose metadata is at {key}", errors.one_line(e)) from e

  def with_arrays(self, arrays: Mapping[Path, Any]) -> "Checkpoint":
    """The same view with more leaves, held in memory. Typed PRNG keys become raw data, as Orbax stores them."""
    extended = copy.copy(self)
    extended._arrays = {path: np.asarray(_key_data(array)) for path, array in arrays.items()}
    stored = {path: self._held(path, array, _key_metadata(arrays[path])) for path, array in extended._arrays.items()}
    structs = {path: jax.ShapeDtypeStruct(array.shape, array.dtype) for path, array in extended._arrays.items()}
    extended.stored = {**self.stored, **stored}
    extended.state = dataclasses.replace(self.state, leaves={**self.state.leaves, **structs})
    return extended

  def _held(self, path, array, ext_metadata) -> StoredLeaf:
    """How to store an array held in memory: in one chunk, replicated over the others' devices."""
    sharding = json.loads(next((leaf.sharding for leaf in self.stored.values() if leaf.sharding), "null"))
    if sharding and "partition_spec" in sharding:
      sharding["partition_spec"] = []
    document: chunk_keys.Document = {"zarr_format": 2, "shape": array.shape, "chunks": array.shape}
    return StoredLeaf(
        ".".join(path), JAX_ARRAY, array.dtype, document, None, sharding and json.dumps(sharding), ext_metadata
    )

  def _abstract(self, path, value_type):
    if path in self.stored:
      return jax.ShapeDtypeStruct(self.stored[path].shape, self.stored[path].dtype)
    if value_type in _EMPTY_NODES:
      return _EMPTY_NODES[value_type]
    if value_type == _STRING and isinstance(text := self._strings.get(".".join(path)), str):
      return text
    raise errors.LayoutError(
        path,
        "an array, a scalar, a string or an empty node",
        f"Orbax's value type {value_type}{', and no text' if value_type == _STRING else ''}",
        "Save the train state without it.",
    )


async def read_region(path: Path, array: ts.TensorStore, region: Any) -> np.ndarray:
  """Reads a region of the array of a leaf.

  Raises:
    DamagedSourceError: a chunk is missing, truncated or corrupt.
  """
  try:
    return await array[region].read()
  except ValueError as e:  # What TensorStore then raises.
    errors.check_access(path, e)
    raise errors.DamagedSourceError(path, "chunks that can be read", errors.one_line(e)) from e


def _is_key(array) -> bool:
  return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def _key_data(array):
  return jax.random.key_data(array) if _is_key(array) else array


def _key_metadata(array):
  """What Orbax stores of a typed PRNG key besides its data."""
  return {array_metadata.RANDOM_KEY_IMPL: str(jax.random.key_impl(array))} if _is_key(array) else None
