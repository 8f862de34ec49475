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

"""Saving a checkpoint: framed by Orbax, filled by us.

Orbax makes the temporary folder, writes the metadata, merges and commits. This module adds handlers of our own leaf type,
`TargetLeaf`, so that arrays are written block by block instead of whole.
"""

import asyncio
import base64
from collections.abc import Callable, Mapping
import dataclasses
import fnmatch
import json
import os
from typing import Any, Protocol

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.serialization import ocdbt_utils
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import write_specs

Path = abstract_state.Path

_OPENS_AT_ONCE = 1000


class Content(Protocol):
  """What writes the bytes of the arrays."""

  async def stream(self, stores: Mapping[Path, ts.TensorStore], items: epath.Path) -> None:
    """Writes the arrays of these target leaves into their stores, which are open for writing, of this pytree."""

  async def put_encoded(self, items: epath.Path) -> None:
    """Puts the other arrays, chunks and zarr metadata, into the folder of the pytree."""


def new_transaction() -> ts.Transaction:
  """A transaction for `Stream` to write in."""
  return ts.Transaction()


def check_target(folder: epath.Path, *, use_ocdbt: bool):
  """Checks that Orbax will find what it writes below a folder, where it looks for processes' files by `glob`.

  Raises:
    PathNameError: the path does not match itself. Orbax would commit a checkpoint that cannot be read.
  """
  if "**" in os.fspath(folder) or (use_ocdbt and not all(fnmatch.fnmatchcase(name, name) for name in folder.parts)):
    raise errors.PathNameError(
        folder,
        "a path without ** and [...]: Orbax takes it for a pattern, and would not find what it has written",
        repr(os.fspath(folder)),
        "Choose another --target_path.",
    )


@dataclasses.dataclass(frozen=True)
class Pytree:
  """A pytree of `TargetLeaf`s and others.

  Attributes:
    leaves: its leaves and lists.
    content: writes the bytes; its encoded arrays are written once, before Orbax merges the stores.
  """

  leaves: abstract_state.AbstractState
  content: Content


def save(
    path: epath.Path,
    pytrees: Mapping[str, Pytree],
    *,
    form: storage_form.StorageForm,
    before_commit: Callable[[epath.Path], Any],
) -> Any:
  """Saves a step of one or more pytrees, or a pytree by itself, in one commit.

  Args:
    path: where to, which is free.
    pytrees: the pytrees by item name; "" for one by itself.
    form: how the arrays are stored.
    before_commit: called with the checkpoint's temporary folder when all is written. Raising prevents the commit.

  Returns:
    What `before_commit` returned; None in other processes than the first.
  """
  seen = []
  look = lambda folder: seen.append(before_commit(folder))
  options = {name: _handler_options(pytree.content, form) for name, pytree in pytrees.items()}
  files = {"ocdbt_target_data_file_size": form.data_file_size}
  trees = {name: abstract_state.unflatten(pytree.leaves) for name, pytree in pytrees.items()}
  if "" in pytrees:
    handler, arguments = _PyTreeHandler(look, **options[""]), _PyTreeSave(trees[""], **files)
  else:
    # Orbax recreates an item's folder if it exists, which must not happen while handlers write there.
    asynchronous = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    items: dict[str, Any] = {name: ocp.PyTreeCheckpointHandler(**options[name]) for name in pytrees}
    handler = _StepHandler(look, composite_options=ocp.CompositeOptions(async_options=asynchronous), **items)
    arguments = _StepSave(**{name: ocp.args.PyTreeSave(tree, **files) for name, tree in trees.items()})
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=arguments)
  return seen[0] if seen else None


def _handler_options(content, form) -> dict[str, Any]:
  """The options of Orbax's handler of a pytree, with handlers of ours for its leaves."""
  writes = _Writes(content)
  array_handler = _ArrayHandler(writes)
  registry = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, array_handler),  # Without this, Orbax writes no array metadata.
      (target_leaf.ArrayLeaf, array_handler),
      (target_leaf.NumpyLeaf, _NumpyHandler(writes)),
      (target_leaf.ScalarLeaf, _ScalarHandler(writes)),
      *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, bool, np.number)),
      (str, ocp.type_handlers.StringHandler()),
  )
  return {
      "use_ocdbt": form.use_ocdbt,
      "use_zarr3": form.use_zarr3,
      "use_compression": form.compression != "none",
      "type_handler_registry": registry,
  }


async def merge_stores(directory: epath.Path, context: ts.Context, *, use_zarr3: bool):
  """Merges all processes' OCDBT stores into one, as Orbax does before it commits; the data files stay."""
  await ocdbt_utils.merge_ocdbt_per_process_files(directory, context, use_zarr3, enable_validation=False)


class _Watched(ocp.CheckpointHandler):
  """Lets `before_commit` see what a handler saved; Orbax commits when `finalize` returns."""

  def __init__(self, before_commit: Callable[[epath.Path], Any], **options):
    super().__init__(**options)
    self._before_commit = before_commit

  def finalize(self, directory):
    super().finalize(directory)
    self._before_commit(epath.Path(directory))


class _PyTreeHandler(_Watched, ocp.PyTreeCheckpointHandler):
  """For a pytree by itself."""

  def finalize(self, directory):
    super().finalize(directory)
    _record_handler(epath.Path(directory), ocp.PyTreeCheckpointHandler.typestr())


class _StepHandler(_Watched, ocp.CompositeCheckpointHandler):
  """For a step."""


# Orbax wants arguments of their own for every handler.
@ocp.args.register_with_handler(_PyTreeHandler, for_save=True, for_restore=True)
class _PyTreeSave(ocp.args.PyTreeSave):
  pass


@ocp.args.register_with_handler(_StepHandler, for_save=True, for_restore=True)
class _StepSave(ocp.args.Composite):
  pass


def _record_handler(folder, name):
  """Replaces our handler's name in the metadata by the one that readers look up.

  Two handlers cannot be registered under one name.
  """
  path = folder / locations.STEP_METADATA
  path.write_text(json.dumps(json.loads(path.read_text()) | {"item_handlers": name}))


class _Writes:
  """Writes the bytes. The handlers share it, because encoded chunks are written once, before anything is streamed.

  If that fails, no handler has begun to stream. Orbax would not wait for it, and files would be opened after their event
  loop is closed. The handlers stream in turn, for each takes the whole memory budget; after a failure, none begins.
  """

  def __init__(self, content: Content):
    self._content, self._turn, self._has_failed = content, asyncio.Lock(), False
    self._put: asyncio.Future[None] | None = None

  async def stream(self, stores: Mapping[Path, ts.TensorStore], items: epath.Path):
    async with self._turn:
      if not self._has_failed:
        self._has_failed = True
        await self._content.stream(stores, items)
        self._has_failed = False

  async def put_encoded(self, items: epath.Path):
    if self._put is None:  # Orbax runs all handlers in one loop.
      self._put = asyncio.ensure_future(self._content.put_encoded(items))
    await self._put


class _WritingHandler:
  """What the handlers of the three value types share."""

  def __init__(self, writes: _Writes, **kwargs):
    super().__init__(**kwargs)
    self._writes = writes

  async def serialize(self, values, infos, args=None):
    """Writes the arrays of `values`, completely when it returns."""
    args = args or [ocp.SaveArgs()] * len(values)
    for info in infos:
      await info.await_path_creation()
    await self._writes.put_encoded(infos[0].parent_dir)
    streamed = [each for each in zip(values, infos, args) if each[0].is_streamed]
    specs = {value.path: write_specs.orbax_spec(value, info, arg) for value, info, arg in streamed}
    stores = {}
    for i in range(0, len(streamed), _OPENS_AT_ONCE):
      batch = streamed[i : i + _OPENS_AT_ONCE]
      transaction = ts.Transaction()
      opened = await asyncio.gather(
          *(
              ts.open(
                  ts.Spec(write_specs.tensorstore_spec(specs[value.path])),
                  create=True,
                  open=True,
                  context=info.ts_context,
                  transaction=transaction,
              )
              for value, info, _ in batch
          )
      )
      await transaction.commit_async()
      stores |= {value.path: store.with_transaction(None) for (value, _, _), store in zip(batch, opened)}
    if stores:
      await self._writes.stream(stores, infos[0].parent_dir)
    await self._write_metadata(values, infos, specs)
    return []

  def memory_size(self, values):
    """The bytes written and read of each value, for Orbax 0.11."""
    return [(value.nbytes, value.nbytes) for value in values]

  async def _write_metadata(self, values, infos, specs):
    """Does nothing: only `jax.Array` leaves have more metadata."""


class _NumpyHandler(_WritingHandler, ocp.type_handlers.NumpyHandler):
  pass


class _ScalarHandler(_WritingHandler, ocp.type_handlers.ScalarHandler):
  pass


class _ArrayHandler(_WritingHandler, ocp.type_handlers.ArrayHandler):
  """For `jax.Array` leaves, which also have shardings and array metadata."""

  def __init__(self, writes: _Writes):
    self._metadatas = array_metadata_store.Store()
    super().__init__(writes, array_metadata_store=self._metadatas)

  async def _write_metadata(self, values, infos, specs):
    folder = infos[0].parent_dir
    shardings = {info.name: value.sharding for value, info in zip(values, infos) if value.sharding is not None}
    if shardings and jax.process_index() == 0:
      names = {base64.urlsafe_b64encode(name.encode()).decode(): text for name, text in shardings.items()}
      await asyncio.to_thread((folder / "_sharding").write_text, json.dumps(names))
    await self._metadatas.write(
        checkpoint_dir=folder,
        array_metadatas=[write_specs.array_metadata_of(v, i, specs.get(v.path)) for v, i in zip(values, infos)],
        process_index=jax.process_index(),
    )
