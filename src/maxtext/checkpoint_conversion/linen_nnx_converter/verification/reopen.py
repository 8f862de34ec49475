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

"""Opens a checkpoint's arrays for the verifier, only by the names of its folder and leaves.

It shares nothing with the converter's reading (`storage.reader`, `storage.ocdbt_index`), so that a mistaken folder, file
or key cannot verify itself; except for the decoding of B-tree leaves, which have a checksum, and counts above them.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping
import functools
import json
import os
from typing import Any, NamedTuple
from urllib import parse

from etils import epath
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import btree_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values

Path = abstract_state.Path


_ANY_AGE = 0.0  # What `read` reads is whole.


class Pytree(NamedTuple):
  """A pytree's folder, TensorStore's spec of its store, and what `_METADATA` says of its arrays."""

  folder: epath.Path
  store: dict[str, Any]
  is_zarr3: bool
  has_all_chunks: bool


class Arrays:
  """The arrays of a checkpoint.

  Attributes:
    directory: its folder.
    places: where the value of each key lies; empty before `read_places`.
  """

  def __init__(self, directory: epath.Path, split: Iterable[str] = (), metadata: Mapping[str, Any] | None = None):
    """Finds the pytree in the folder, or the pytrees of these names below it.

    Args:
      directory: the folder.
      split: the names of pytrees below it.
      metadata: replaces the `_METADATA` of a pytree that is not complete.
    """
    self.directory = directory
    self.places = stored_values.Values()
    self._rechecked = "open" if metadata else False
    self._pytrees = {f"{name}/": _pytree(directory / name) for name in split} or {"": _pytree(directory, metadata)}
    self._context = ts.Context({"file_io_concurrency": {"limit": 64}, "cache_pool#ocdbt": {"total_bytes_limit": 10**8}})

  def name(self, path: Path) -> str:
    """The part of a leaf's keys before the slash."""
    return ".".join(path) if "" in self._pytrees else f"{path[0]}/{'.'.join(path[1:])}"

  def names(self) -> set[str]:
    """The names of all arrays."""
    ends = tuple(f"/{document}" for document in chunk_keys.DOCUMENT_NAMES.values())
    return {key.rpartition("/")[0] for key in self.places if key.endswith(ends)}

  async def open(self, path: Path) -> ts.TensorStore:
    """Opens the array of a leaf."""
    pytree, name = self._found(self.name(path))
    spec = {
        "driver": "zarr3" if pytree.is_zarr3 else "zarr",
        "kvstore": pytree.store | {"path": pytree.store.get("path", "") + name},
        "fill_missing_data_reads": not pytree.has_all_chunks,
        # Else TensorStore asks for the manifest with each read. What is being written is as it is when it is opened here.
        **dict.fromkeys(("recheck_cached_data", "recheck_cached_metadata"), self._rechecked),
    }
    return await ts.open(spec, open=True, read=True, context=self._context)

  async def document(self, path: Path) -> chunk_keys.Document | None:
    """The zarr metadata of a leaf, if there are any."""
    name = self.name(path)
    key = f"{name}/{chunk_keys.DOCUMENT_NAMES[3 if self._found(name)[0].is_zarr3 else 2]}"
    return _parsed(await self.read(key)) if key in self.places else None

  async def read(self, key: str) -> bytes:
    """Reads the value of a key: an encoded chunk, or zarr metadata."""
    if (inline := self.places[key].inline) is not None:
      return inline
    pytree, name = self._found(key)
    store = await ts.KvStore.open(pytree.store, context=self._context)
    return (await store.read(name, staleness_bound=_ANY_AGE)).value

  async def read_places(self):
    """Finds where the values lie, by reading the tree of keys or listing files; reads no values."""
    self.places = await asyncio.to_thread(
        stored_values.Values, self._all_places(), slashes=0 if "" in self._pytrees else 1
    )

  def _all_places(self) -> Iterator[tuple[str, stored_values.Value]]:
    for prefix, pytree in self._pytrees.items():
      for key, place in (_in_tree if "base" in pytree.store else _in_files)(pytree, self._context):
        yield prefix + key, place._replace(file=place.file and prefix + place.file) if prefix else place

  def _found(self, key: str) -> tuple[Pytree, str]:
    """A key's pytree, and the key in it."""
    prefix = "" if "" in self._pytrees else key[: key.index("/") + 1]
    return self._pytrees[prefix], key.removeprefix(prefix)


# Like layers have equal documents, and share one.
_parsed = functools.lru_cache(maxsize=2**12)(json.loads)


def _pytree(folder, metadata=None) -> Pytree:
  path = f"{os.fspath(folder)}/"
  store: dict[str, Any] = {"driver": "file", "path": path}
  if path.startswith("gs://"):
    bucket, _, path = path.removeprefix("gs://").partition("/")
    store = {"driver": "gcs", "bucket": bucket, "path": path}
  if (folder / "manifest.ocdbt").exists():
    # In remote storage, values that lie near each other are read together: what is between them costs less.
    near = {"experimental_read_coalescing_threshold_bytes": 2**16, "experimental_read_coalescing_interval": "1ms"}
    store = {"driver": "ocdbt", "base": store, "cache_pool": "cache_pool#ocdbt"} | (near if "bucket" in store else {})
  metadata = metadata or json.loads((folder / "_METADATA").read_text())
  has_all_chunks = bool(metadata.get("store_array_data_equal_to_fill_value"))
  return Pytree(folder, store, bool(metadata.get("use_zarr3")), has_all_chunks)


def _in_files(pytree, context) -> Iterator[tuple[str, stored_values.Value]]:
  for key in map(bytes.decode, ts.KvStore.open(pytree.store, context=context).result().list().result()):
    yield key, stored_values.Value(key, 0, (pytree.folder / key).stat().length)


def _in_tree(pytree, context) -> Iterator[tuple[str, stored_values.Value]]:
  """The keys of an OCDBT store's newest version: https://google.github.io/tensorstore/kvstore/ocdbt/index.html."""
  base = ts.KvStore.open(pytree.store["base"], context=context).result()

  def below(node, height, prefix):
    if height:
      for entry in ts.ocdbt.dump(base, node["location"]).result()["entries"]:
        yield from below(entry, height - 1, prefix + entry["subtree_common_prefix"])
    else:  # The parts of a location are escaped as in URLs.
      _, folder, file, offset, nbytes = map(parse.unquote, node["location"].split(":"))
      encoded = remote_files.read_range(pytree.folder / (folder + file), int(offset), int(nbytes))
      yield from btree_leaves.entries(encoded, folder, prefix, node["statistics"])

  newest = ts.ocdbt.dump(base).result()["versions"][-1]
  return below(newest["root"], newest["root_height"], b"") if "location" in newest["root"] else iter(())
