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

"""The metadata of a pytree's leaves besides `_METADATA`: Orbax's and zarr's, checked for plausibility."""

import base64
from collections.abc import Iterable, Iterator
from concurrent import futures
import contextlib
import json
import math
import re
from typing import Any

from etils import epath
import numpy as np
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.metadata import sharding as sharding_metadata
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files

# No leaf exceeds these: the largest of a 700 B model has 2**40 bytes, and a chunk is what one device writes.
_MOST_BYTES, _MOST_CHUNKS, _MOST_CHUNK_BYTES = 2**50, 2**24, 2**40
_FOREIGN = re.compile("[/\0\ud800-\udfff]")  # UTF-8 has no surrogates.
_FOREIGN_FOLDER = re.compile(rf"{_FOREIGN.pattern}|\\|\.__lock\Z")
# What parsers raise, besides ValueError, on documents with unexpected content.
_NONSENSE = ArithmeticError, AssertionError, AttributeError, LookupError, NotImplementedError, RecursionError, TypeError
_DOCUMENT_KEYS = {
    False: {"zarr_format", "shape", "chunks", "dtype", "order", "compressor", "fill_value", "filters"},
    True: {"zarr_format", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs", "fill_value"},
}


@contextlib.contextmanager
def parsing() -> Iterator[None]:
  """Turns whatever a parser raises on a JSON document with unexpected content into a ValueError.

  Only for parsing: around more it would hide defects.
  """
  try:
    yield
  except _NONSENSE as e:
    raise ValueError(errors.named(e)) from e


def read_array_metadatas(directory: epath.Path) -> dict[str, Any]:
  """Orbax's array metadata, by name."""
  folder = directory / "array_metadatas"
  # Orbax's own `Store.read` treats the folder's path as a pattern: it finds nothing in `[a]`, and in `?` what is in `b`.
  paths = sorted(remote_files.children(folder)) if folder.exists() else []
  with futures.ThreadPoolExecutor() as threads:
    lists = list(threads.map(_read_array_metadatas, [path for path in paths if path.name.startswith("process_")]))
  with parsing():
    named = {metadata.param_name: metadata for metadatas in lists for metadata in metadatas}
    for metadata in named.values():
      tuple(map(int, metadata.write_shape))
  return named


def _read_array_metadatas(path) -> list[Any]:
  source_files.check_file(path)
  text = path.read_text()
  with parsing():
    return array_metadata_store.Serializer().deserialize(text)


def read_shardings(directory: epath.Path) -> dict[str, str]:
  """Orbax's JSON of each sharding, by name."""
  document = source_files.read_json(directory / "_sharding", {})
  with parsing():
    for sharding in set(document.values()):
      sharding_metadata.ShardingTypes(json.loads(sharding)["sharding_type"])
      with contextlib.suppress(NotImplementedError):  # A kind that Orbax writes but does not read.
        sharding_metadata.from_serialized_string(sharding)
  return {base64.urlsafe_b64decode(name).decode(): sharding for name, sharding in document.items()}


def check_names(paths: Iterable[abstract_state.Path], *, use_ocdbt: bool):
  """Checks that each leaf's name in storage, its path joined by dots, can be the name of a folder.

  With OCDBT it is not a folder's, so it may be one that TensorStore rejects: see `ocdbt_index.check_place`.
  """
  foreign = _FOREIGN if use_ocdbt else _FOREIGN_FOLDER
  for path in paths:
    name = ".".join(path)
    if name in ("", ".", "..") or foreign.search(name):
      raise errors.LayoutError(
          repr(path), "keys that can be names of files", f"the name {name!r}", "Rename the key in the source."
      )


def check_all_named(names: Iterable[str], paths: Iterable[abstract_state.Path], where: str):
  """Checks that each name is a leaf's, because an array that the tree does not name would be lost."""
  if unknown := set(names) - {".".join(path) for path in paths}:
    raise errors.DamagedSourceError(min(unknown), f"a leaf in _METADATA, for {where} there is this name", "none")


def array_names(index: ocdbt_index.Index) -> Iterator[str]:
  """The names of all arrays in a store."""
  ends = tuple(f"/{document}" for document in chunk_keys.DOCUMENT_NAMES.values())
  return (key.rpartition("/")[0] for key in index.values if key.endswith(ends))


def parse_document(text: bytes, use_zarr3: bool) -> tuple[chunk_keys.Document, np.dtype]:
  """A zarr metadata document, and the dtype that it names.

  Raises:
    ValueError: `check_document` rejects it.
  """
  with parsing():
    document = json.loads(text)
  check_document(document, use_zarr3)
  return document, dtype(document)


def check_document(document: chunk_keys.Document, use_zarr3: bool):
  """Checks that TensorStore would open an array with this zarr metadata document, and that its size is plausible.

  Raises:
    ValueError: it is not.
  """
  if not isinstance(document, dict):
    raise ValueError("the zarr metadata are no JSON object")
  if missing := _DOCUMENT_KEYS[use_zarr3] - document.keys():
    raise ValueError(f"the zarr metadata lack {min(missing)}")
  driver = "zarr3" if use_zarr3 else "zarr"
  with parsing():  # An integer may overflow.
    ts.Spec({"driver": driver, "kvstore": {"driver": "memory"}, "metadata": document})  # 8 µs, and no I/O.
  shape, chunk_shape = chunk_keys.shape(document), chunk_keys.chunk_shape(document)
  if not all(isinstance(size, int) for size in shape + chunk_shape) or len(shape) != len(chunk_shape):
    raise ValueError(f"the shape {shape} in chunks {chunk_shape}")
  if (nbytes := math.prod(shape) * dtype(document).itemsize) > _MOST_BYTES:
    raise ValueError(f"the shape {shape} has {nbytes} bytes; {_MOST_BYTES} are the most")
  if (nbytes := math.prod(chunk_shape) * dtype(document).itemsize) > _MOST_CHUNK_BYTES:
    raise ValueError(f"the chunks {chunk_shape} have {nbytes} bytes each; {_MOST_CHUNK_BYTES} are the most")
  if (count := chunk_keys.count(document)) > _MOST_CHUNKS:
    raise ValueError(f"the shape {shape} in chunks {chunk_shape} has {count} chunks; {_MOST_CHUNKS} are the most")


def dtype(document: chunk_keys.Document) -> np.dtype:
  """The dtype that a zarr metadata document names."""
  name = document["data_type"] if document["zarr_format"] == 3 else document["dtype"]
  with parsing():
    return np.dtype(name) if name[0] in "<>|" else ts.dtype(name).numpy_dtype
