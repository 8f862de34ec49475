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

"""How each target leaf's bytes get there: by reference, raw or streamed. Chosen from metadata, without I/O."""

from collections.abc import Iterator, Mapping
import dataclasses
import enum
import json

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_chunks
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form

Path = abstract_state.Path

_LONGEST_FILE_NAME = 255
# How many dead bytes, which the target does not refer to, whole data files may bring along: a share of the live bytes,
# and room for the tree's nodes.
_DEAD_SHARE, _DEAD_BYTES = 0.1, 2**20


class Way(enum.StrEnum):
  """How a target leaf's bytes get there, the cheapest first."""

  REFERENCE = "by reference"  # The target's keys point into the source's data files, linked or copied whole.
  RAW = "raw"  # Encoded chunks are copied as they are, into new data files.
  STREAMED = "streamed"  # Chunks are decoded, rearranged and encoded.
  RESUMED = "resumed"  # Chunks that an interrupted run had finished are linked.


@dataclasses.dataclass(frozen=True)
class Route:
  """How a target leaf's bytes get there.

  Attributes:
    way: how.
    renamed: unless streamed, every key taken from the source, with its new name. An array's name with a slash stands for
      all its keys.
    documents: unless streamed, values to write: zarr metadata with another shape.
    chunk_shape: the shape of the target's chunks.
  """

  way: Way
  renamed: tuple[tuple[str, str], ...] = ()
  documents: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
  chunk_shape: tuple[int, ...] = ()


def choose(
    plan: plan_lib.Plan,
    source: reader.Checkpoint,
    lengths: Mapping[str, int],
    form: storage_form.StorageForm,
    *,
    room: int,
    copy_mode: str = "auto",
) -> dict[Path, Route]:
  """The route of every target leaf that is an array.

  Args:
    plan: the plan.
    source: the source, of which only metadata are used.
    lengths: the lengths of its data files, in bytes.
    form: how the target is stored.
    room: bytes of the source that may be held at once to fill joined chunks.
    copy_mode: `link` refers to data files whatever else they hold, even to files of single chunks. These are otherwise
      copied, because without OCDBT a save over the source may write into them.

  Raises:
    DamagedSourceError: the source lacks a chunk.
    PathCollisionError: two target leaves have the same name in storage.
    TargetError: the name of one is too long for a file.
  """
  opening.check_chunks(source, plan.parts())
  _check_names(plan, form.use_ocdbt)
  routes = {}
  for path, move in plan.moves.items():
    if abstract_state.is_array(plan.target.leaves[path]):
      routes[path] = _route(path, move, plan, source, form, room)
  takes_new_files = not source.use_ocdbt or form.data_file_size is not None
  if copy_mode != "link" and (takes_new_files or _has_dead_bytes(routes, source.index, lengths)):
    return {
        path: dataclasses.replace(route, way=Way.RAW) if route.way == Way.REFERENCE else route
        for path, route in routes.items()
    }
  return routes


def nbytes(plan: plan_lib.Plan, ways: Mapping[Path, Way]) -> dict[Way, int]:
  """The bytes of the target's arrays, by way."""
  totals = dict.fromkeys((Way.REFERENCE, Way.RAW, Way.STREAMED), 0)
  for path, way in ways.items():
    leaf = plan.target.leaves[path]
    totals[way] = totals.get(way, 0) + leaf.size * leaf.dtype.itemsize
  return totals


def data_files(routes: Mapping[Path, Route], index: ocdbt_index.Index) -> set[str]:
  """The data files that the leaves by reference point into."""
  return set().union(*(index.values.files_of(old) for old in _referenced(routes)))


def _route(path, move, plan, source, form, room) -> Route:
  leaf, origin = plan.target.leaves[path], source.stored[move.sources[0]]
  kept = target_chunks.kept(move, origin)
  is_kept = (
      not plan.is_merged(path) and _is_kept(source, form) and target_chunks.wanted(move, origin, leaf, form, room) == kept
  )
  if is_kept and (route := _encoded_route(path, move, plan, source, form.compression)):
    return dataclasses.replace(route, chunk_shape=kept)
  return Route(Way.STREAMED, chunk_shape=target_chunks.streamed(move, origin, leaf, form, room))


def _is_kept(source, form) -> bool:
  """Whether the target can have encoded chunks of the source."""
  return source.is_uniform and (source.use_ocdbt, source.use_zarr3) == (form.use_ocdbt, form.use_zarr3)


def _encoded_route(path, move, plan, source, compression) -> Route | None:
  """The route of a leaf whose encoded chunks need not change; None if they must."""
  stored = [source.stored[origin] for origin in move.sources]
  documents = [leaf.document for leaf in stored]
  if any(leaf.dtype != plan.target.leaves[path].dtype for leaf in stored) or not chunk_keys.keeps_chunks(move, documents):
    return None
  if compression not in (None, chunk_keys.compression(documents[0])):
    return None
  if source.use_ocdbt and documents[0].get("dimension_separator") == "/":  # Orbax misses such chunks when it merges.
    return None
  name = ".".join(path)
  if move.kind == "copy" and _has_its_keys_alone(source, stored[0]):
    return Route(Way.REFERENCE, ((f"{stored[0].name}/", f"{name}/"),))
  renamed = tuple(chunk_keys.renamed(move, documents, [leaf.name for leaf in stored], name))
  if any(old not in source.index.values for old, _ in renamed):  # Left out because it holds only the fill value.
    return None
  document_name = chunk_keys.DOCUMENT_NAMES[documents[0]["zarr_format"]]
  if move.kind == "copy":
    return Route(Way.REFERENCE, (*renamed, (f"{stored[0].name}/{document_name}", f"{name}/{document_name}")))
  text = json.dumps(chunk_keys.restated(documents[0], move), sort_keys=True, separators=(",", ":"))
  return Route(Way.REFERENCE, renamed, {f"{name}/{document_name}": text.encode()})


def _has_its_keys_alone(source, leaf) -> bool:
  """Whether the keys below an array's name are exactly those of its chunks and its document."""
  below = source.index.values.arrays.get(leaf.name)  # None for a leaf that is held in memory.
  if below is None or len(below.rows) != chunk_keys.count(leaf.document) + 1:
    return False
  return source.has_all_chunks or all(key in source.index.values for key in chunk_keys.keys(leaf.name, leaf.document))


def _referenced(routes) -> Iterator[str]:
  """What is taken from the source by reference: keys, and arrays' names with a slash."""
  return (old for route in routes.values() if route.way == Way.REFERENCE for old, _ in route.renamed)


def _has_dead_bytes(routes, index, lengths) -> bool:
  """Whether the data files that would be brought along have too many dead bytes."""
  live = sum(map(index.values.nbytes_of, _referenced(routes)))
  total = sum(lengths[file] for file in data_files(routes, index))
  return total - live > max(_DEAD_SHARE * live, _DEAD_BYTES)


def _check_names(plan, use_ocdbt):
  """Checks that no two leaves share a name, which is Orbax's: the path joined by dots."""
  names = {}
  for path in plan.target.leaves:
    name = ".".join(path)
    if not use_ocdbt and len(name.encode()) > _LONGEST_FILE_NAME:
      raise errors.TargetError(
          path,
          f"a name of at most {_LONGEST_FILE_NAME} bytes, for without OCDBT it is a folder's",
          f"{len(name.encode())} bytes",
          "Convert with --use_ocdbt.",
      )
    other = names.setdefault(name, path)
    if other != path:
      raise errors.PathCollisionError(
          path,
          "a name of its own in storage",
          f"{name}, which is {'/'.join(other)}'s too",
          "Rename one of them in the source.",
      )
