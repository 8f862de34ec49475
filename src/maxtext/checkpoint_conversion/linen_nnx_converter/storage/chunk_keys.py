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

"""The chunks of a stored array, and what becomes of them when a move leaves their bytes unchanged. No I/O.

An array is a zarr metadata document and a grid of chunks. A layer `(d0, d1)` in chunks `(c0, c1)` and the slab of
`(d0, N, d1)` at one index, in chunks `(c0, 1, c1)`, have the same bytes in C order, compressed or not. So a stack is the
layers' chunks under keys with an index inserted, and a new document; a slice is the reverse.

The formats: https://zarr-specs.readthedocs.io/en/latest/v2/v2.0.html and …/v3/core/index.html.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator, Sequence
import copy
import itertools
import math
import re
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves

Document = dict[str, Any]  # A zarr metadata document.
Index = tuple[int, ...]  # The place of a chunk in the grid.

DOCUMENT_NAMES = {2: ".zarray", 3: "zarr.json"}

# Codecs of a chunk's bytes, which do not depend on its shape.
_COMPRESSORS = frozenset({"zstd", "gzip", "blosc"})
_SHAPELESS_CODECS = _COMPRESSORS | {"bytes", "crc32c"}
_SEPARATOR = re.compile("[/.]")


def shape(document: Document) -> tuple[int, ...]:
  """The array's shape."""
  return tuple(document["shape"])


def chunk_shape(document: Document) -> tuple[int, ...]:
  """The shape of a chunk, the smallest unit with a key of its own."""
  if document["zarr_format"] == 3:
    return tuple(document["chunk_grid"]["configuration"]["chunk_shape"])
  return tuple(document["chunks"])


def grid(document: Document, fixed: Iterable[tuple[int, int]] = ()) -> Iterator[Index]:
  """The places of all chunks, in C order, or only of those at the `fixed` places along some axes."""
  places: list[Iterable[int]] = [range(-(-n // step)) for n, step in zip(shape(document), chunk_shape(document))]
  for axis, place in fixed:
    places[axis] = (place,)
  return itertools.product(*places)


def count(document: Document) -> int:
  """The number of all chunks."""
  return math.prod(-(-size // step) for size, step in zip(shape(document), chunk_shape(document)))


def key_of(document: Document) -> Callable[[Index], str]:
  """A function from a chunk's place in the grid to its key below the array's name."""
  if document["zarr_format"] == 2:
    separator = document.get("dimension_separator", ".")
    return lambda index: separator.join(map(str, index)) or "0"
  encoding = document.get("chunk_key_encoding", {"name": "default"})
  is_default = encoding["name"] == "default"
  separator = encoding.get("configuration", {}).get("separator", "/" if is_default else ".")
  if is_default:
    return lambda index: separator.join(("c", *map(str, index)))
  return lambda index: separator.join(map(str, index)) or "0"


def keys(name: str, document: Document) -> Iterator[str]:
  """The keys of all chunks of the array of this name."""
  return (f"{name}/{key}" for key in map(key_of(document), grid(document)))


def compression(document: Document) -> str:
  """The name of the chunks' compressor, or `none`."""
  if document["zarr_format"] == 2:
    return (document.get("compressor") or {}).get("id", "none")
  codecs = document["codecs"]
  if codecs and codecs[0]["name"] == "sharding_indexed":
    codecs = codecs[0]["configuration"]["codecs"]
  return next((codec["name"] for codec in codecs if codec["name"] in _COMPRESSORS), "none")


def keeps_chunks(move: leaf_moves.Move, documents: Sequence[Document]) -> bool:
  """Whether the target's chunks are the source's, byte for byte.

  Args:
    move: what makes the target leaf.
    documents: the documents of its source leaves.
  """
  if move.kind == "copy":
    return True
  is_one_index = all(chunk_shape(documents[0])[axis] == 1 for axis in move.taken)
  is_alike = all(document == documents[0] for document in documents[1:])
  return is_one_index and is_alike and not move.order and _has_plain_chunks(documents[0])


def restated(document: Document, move: leaf_moves.Move) -> Document:
  """The target's document, if `keeps_chunks`: another shape, and otherwise unchanged."""
  if move.kind == "copy":
    return document
  document = copy.deepcopy(document)
  moved = move.across(chunk_shape(document), itertools.repeat(1))
  document["shape"] = list(move.shape(shape(document)))
  if document["zarr_format"] == 2:
    document["chunks"] = list(moved)
    return document
  document["chunk_grid"]["configuration"]["chunk_shape"] = list(moved)
  for codec in document["codecs"]:
    if codec["name"] == "sharding_indexed":
      codec["configuration"]["chunk_shape"] = list(moved)
  return document


def renamed(
    move: leaf_moves.Move, documents: Sequence[Document], names: Sequence[str], target_name: str
) -> Iterator[tuple[str, str]]:
  """The keys of all chunks of a target leaf, in the source and in the target.

  Args:
    move: the target leaf's move, which `keeps_chunks`.
    documents: the documents of its source leaves.
    names: their names.
    target_name: the target leaf's name.
  """
  new_key, of = key_of(restated(documents[0], move)), dict(zip(move.sources, zip(documents, names)))
  for number, (source, at) in enumerate(move.pieces):
    document, name = of[source]
    old_key, place = key_of(document), move.place(number)
    for index in grid(document, zip(move.taken, at)):
      yield f"{name}/{old_key(index)}", f"{target_name}/{new_key(move.across(index, place))}"


def ranges(pairs: Iterable[tuple[str, str]], keys: Iterable[str]) -> list[tuple[str, str, bool]]:
  """The fewest prefix renamings that rename keys as `pairs` do, and no other key.

  A store renames a whole prefix as fast as a single key: 76,800 keys took 21 s one by one, and 1.6 s as 4,800 prefixes.

  Args:
    pairs: keys with their new names, both unique. A key that ends in a slash stands for all below it.
    keys: all existing keys, or what stands for them.

  Returns:
    (old, new, whether these are prefixes rather than single keys).
  """
  return list(_ranges(sorted(pairs), sorted(keys), 0))


def _has_plain_chunks(document) -> bool:
  """Whether chunks are their elements in C order, through codecs that ignore the shape."""
  if document["zarr_format"] == 2:
    return document["order"] == "C" and not document.get("filters")
  if "dimension_names" in document or document["chunk_grid"]["name"] != "regular":
    return False
  names = [codec["name"] for codec in document["codecs"]]
  if names == ["sharding_indexed"]:
    configuration = document["codecs"][0]["configuration"]
    if math.prod(configuration["chunk_shape"]) != math.prod(chunk_shape(document)):
      return False
    names = [codec["name"] for codec in configuration["codecs"]]
  return set(names) <= _SHAPELESS_CODECS


def _ranges(pairs, keys, shared: int) -> Iterator[tuple[str, str, bool]]:
  """The ranges of sorted pairs whose old keys share their first `shared` characters."""
  for old, members in itertools.groupby(pairs, lambda pair: _longer_prefix(pair[0], shared)):
    group = list(members)
    new = group[0][1][: len(group[0][1]) - len(group[0][0]) + len(old)]
    if old == group[0][0]:
      yield *group[0], old.endswith("/")
    elif new[-1:] in ("", "/", ".") and _is_range(old, new, group, keys):
      yield old, new, True
    else:
      yield from _ranges(group, keys, len(old))


def _longer_prefix(key_of_chunk: str, shared: int) -> str:
  """The key up to and including its next separator, or the whole key."""
  separator = _SEPARATOR.search(key_of_chunk, shared)
  return key_of_chunk[: separator.end()] if separator else key_of_chunk


def _is_range(old, new, pairs, keys) -> bool:
  """Whether the pairs are all the keys with the prefix `old`, replaced by `new`."""
  count = bisect.bisect_left(keys, old[:-1] + chr(ord(old[-1]) + 1)) - bisect.bisect_left(keys, old)
  return len(pairs) == count and all(new_key == new + old_key[len(old) :] for old_key, new_key in pairs)
