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

"""The key-value store under a pytree: which keys it has, and where their values lie.

A pytree's chunks and zarr metadata are the values of a store. Without OCDBT each is a file. With OCDBT the keys are in a
B-tree, whose nodes and values are in data files that never change once written. TensorStore describes the format:
https://google.github.io/tensorstore/kvstore/ocdbt/index.html#storage-format
"""

import asyncio
from collections.abc import Iterator
import dataclasses
import functools
import itertools
import os
from typing import Any
from urllib import parse

from etils import epath
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import btree_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import stored_values

_NODES_AT_ONCE = 64
NEAR_BYTES = 2**16  # Values in remote storage that are this near each other are read together.
# As Orbax reads remote storage: neighbouring values are read together. Orbax also reads up to a megabyte between them, a
# tenth of all bytes in 48 MiB of small chunks.
_READ_COALESCING = {
    "experimental_read_coalescing_threshold_bytes": NEAR_BYTES,
    "experimental_read_coalescing_merged_bytes": 500_000_000_000,
    "experimental_read_coalescing_interval": "1ms",
}


@dataclasses.dataclass(frozen=True)
class Index:
  """What a store holds.

  Attributes:
    values: where the value of each key lies.
    tree_files: the data files with nodes of the B-tree; none without OCDBT.
  """

  values: stored_values.Values
  tree_files: frozenset[str] = frozenset()


def new_context() -> ts.Context:
  """TensorStore's resources as Orbax sets them: nodes of B-trees are cached, chunks are not."""
  return ts.Context({"file_io_concurrency": {"limit": 128}, "cache_pool#ocdbt": {"total_bytes_limit": 100_000_000}})


def spec(directory: epath.Path, *, use_ocdbt: bool) -> dict[str, Any]:
  """TensorStore's spec of the store under a pytree. In that of a leaf's part, the `path` goes on with its name."""
  if not use_ocdbt:
    return _place_spec(directory)
  ocdbt = {"driver": "ocdbt", "base": _place_spec(directory), "path": "", "cache_pool": "cache_pool#ocdbt"}
  return ocdbt | (_READ_COALESCING if remote_files.is_remote(directory) else {})


def writable_spec(directory: epath.Path, data_file_size: int | None = None) -> dict[str, Any]:
  """TensorStore's spec of an OCDBT store to write, configured as Orbax configures its own.

  An existing store cannot be opened with another configuration, and Orbax merges others into this one. A new data file
  begins after `data_file_size` bytes.
  """
  config = {"max_inline_value_bytes": 1024, "max_decoded_node_bytes": 100_000_000}
  return spec(directory, use_ocdbt=True) | {"config": config, "target_data_file_size": data_file_size or 2**31}


def check_place(directory: epath.Path):
  """Checks that TensorStore takes the path of a local folder literally.

  It takes `\\` for `/`, reserves names that end in `.__lock`, and knows only UTF-8.

  Raises:
    PathNameError: it does not.
  """
  if remote_files.is_remote(directory):
    return
  place = _place_spec(directory)
  try:
    place["path"].encode()
    is_taken = ts.KvStore.Spec(place).to_json() == place
  except ValueError:
    is_taken = False
  if not is_taken:
    raise errors.PathNameError(
        directory,
        "a path of UTF-8 without backslashes, in which no name ends in .__lock: TensorStore takes no others",
        repr(os.fspath(directory)),
        "Rename the folder, or give another one.",
    )


def _place_spec(directory) -> dict[str, Any]:
  """A folder's spec, not as a URL, in which `%20`, `#` and `?` would not be literal."""
  path = os.path.join(os.fspath(directory), "")
  if not remote_files.is_remote(directory):
    return {"driver": "file", "path": path}
  bucket, _, name = path.removeprefix("gs://").partition("/")
  return {"driver": "gcs", "bucket": bucket, "path": name}


async def read_index(directory: epath.Path, *, use_ocdbt: bool, context: ts.Context) -> Index:
  """Reads the keys of a store and where their values lie, but no values except those in the tree itself.

  Raises:
    ForeignFileError: a node or a value would lie outside the folder.
  """
  if not use_ocdbt:
    return Index(stored_values.Values(await asyncio.to_thread(_files, directory)))
  base = await ts.KvStore.open(_place_spec(directory), context=context)
  nodes, files = await _leaf_nodes(directory, base)
  return Index(await asyncio.to_thread(stored_values.Values, _entries(directory, nodes)), files)


async def read_tree_files(directory: epath.Path, context: ts.Context) -> frozenset[str]:
  """The data files with nodes of a store's B-tree."""
  return (await _leaf_nodes(directory, await ts.KvStore.open(_place_spec(directory), context=context)))[1]


def _entries(directory, nodes) -> Iterator[tuple[str, stored_values.Value]]:
  """The keys in the leaves of the B-tree, with the places of their values."""
  for prefix, node in nodes:
    place = _place(directory, node["location"])
    encoded = remote_files.read_range(directory / place.file, place.offset, place.nbytes)
    base = parse.unquote(node["location"].split(":")[1])
    for key, value in btree_leaves.entries(encoded, base, prefix, node["statistics"]):
      _check_inside(directory, value.file)
      yield key, value


async def _leaf_nodes(directory, base) -> tuple[list[tuple[bytes, Any]], frozenset[str]]:
  """Walks the B-tree of the newest version, level by level, to its leaves.

  Returns:
    The prefix of their keys with what the nodes above say of them; and the data files with nodes.
  """
  versions = (await ts.ocdbt.dump(base))["versions"]
  if not versions:
    raise ValueError("the manifest has no version")
  root = versions[-1]
  files = set()
  level = [(b"", root["root"])] if "location" in root["root"] else []
  for height in reversed(range(root["root_height"] + 1)):  # A damaged tree cannot lead round in a circle.
    files.update(_place(directory, node["location"]).file for _, node in level)
    below = []
    for some in itertools.batched(level if height else (), _NODES_AT_ONCE):
      nodes = await asyncio.gather(*(ts.ocdbt.dump(base, node["location"]) for _, node in some))
      for (prefix, _), node in zip(some, nodes):
        below += [(prefix + entry["subtree_common_prefix"], entry) for entry in node["entries"]]
    level = below or level
  return level, frozenset(files)


def read_range(file: epath.Path, offset: int, nbytes: int) -> bytes:
  """Reads a value out of a data file.

  Raises:
    DamagedSourceError: the file is missing or too short.
  """
  try:
    found = remote_files.read_range(file, offset, nbytes)
  except FileNotFoundError:
    found = b""
  if len(found) != nbytes:
    raise errors.DamagedSourceError(file, f"{nbytes} bytes from {offset} on", f"{len(found)}")
  return found


def file_lengths(directory: epath.Path, index: Index) -> dict[str, int]:
  """The lengths of the data files, which must hold the values that the index places in them.

  Raises:
    DamagedSourceError: a file is missing or too short; names a key whose value is not there.
  """
  lengths = {}
  for file, (end, key) in index.values.ends().items():
    path = directory / file
    length = path.stat().length if path.exists() else None
    if length is None or length < end:
      raise errors.DamagedSourceError(
          key,
          f"its value in {path}, which should have at least {end} bytes",
          "no such file" if length is None else f"{length} bytes",
      )
    lengths[file] = length
  return lengths


def _place(directory, location: str) -> stored_values.Value:
  """The place that TensorStore writes as `<type>:<base>:<file>:<offset>:<length>`, relative to the store's folder."""
  _, base, file, offset, nbytes = map(parse.unquote, location.split(":"))
  _check_inside(directory, base + file)
  return stored_values.Value(base + file, int(offset), int(nbytes))


@functools.lru_cache(maxsize=2**12)  # Files hold many values.
def _check_inside(directory, file: str):
  if file.startswith("/") or ".." in file.split("/"):
    raise errors.ForeignFileError(
        directory,
        "data files inside the checkpoint",
        f"one at {file}",
        "This is no checkpoint that a trainer wrote: do not use it.",
    )


def _files(directory) -> list[tuple[str, stored_values.Value]]:
  """Every file below a folder, as a value."""
  values, folders = [], [""]
  while folders:
    folder = folders.pop()
    for child in remote_files.children(directory / folder):
      name = f"{folder}{child.name}"
      if child.is_dir():
        folders.append(name + "/")
      else:
        values.append((name, stored_values.Value(name, 0, child.stat().length)))
  return values
