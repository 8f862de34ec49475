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

Orbax makes the temporary folder, writes the metadata, merges and commits. What this module adds are the handlers of
our own leaf type, `TargetLeaf`, which let the arrays be written block by block instead of whole.
"""

import asyncio
import base64
from collections.abc import Awaitable, Callable, Mapping
import dataclasses
import fnmatch
import json
import os
import threading
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.serialization import ocdbt_utils
from orbax.checkpoint._src.serialization import tensorstore_utils
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf

Path = abstract_state.Path

_OPENS_AT_ONCE = 1000

# Writes the arrays of these target leaves into these open stores.
Stream = Callable[[Mapping[Path, ts.TensorStore]], Awaitable[None]]
# Puts the other arrays, chunks and zarr metadata, into the folder of the pytree.
PutEncoded = Callable[[epath.Path], Awaitable[None]]


def new_transaction() -> ts.Transaction:
  """A transaction for `Stream` to write in."""
  return ts.Transaction()


def check_target(folder: epath.Path, *, use_ocdbt: bool):
  """Checks that Orbax will find what it writes below a folder: it looks for the files of processes by `glob`.

  Raises:
    PathNameError: it will not, for its path does not match itself. Orbax would commit a checkpoint that cannot be read.
  """
  if "**" in os.fspath(folder) or (use_ocdbt and not all(fnmatch.fnmatchcase(name, name) for name in folder.parts)):
    raise errors.PathNameError(
        folder,
        "a path without ** and [...]: Orbax takes it for a pattern, and would not find what it has written",
        repr(os.fspath(folder)),
        "Choose another --target_path.",
    )


def save(
    target: locations.Location,
    leaves: abstract_state.AbstractState,
    stream: Stream,
    put_encoded: PutEncoded,
    *,
    use_ocdbt: bool,
    use_zarr3: bool,
    before_commit: Callable[[epath.Path, epath.Path], Any],
    check_free: Callable[[], None],
    announce: Callable[[atomic_target.Place], None],
) -> Any:
  """Saves a pytree of `TargetLeaf`s and others: whole, or not at all.

  Args:
    target: where to.
    leaves: the leaves and lists of the pytree.
    stream: writes the arrays that are streamed; called with stores that are open for writing.
    put_encoded: puts the others into the folder of the pytree; called once, before Orbax merges the stores.
    use_ocdbt: whether the arrays go into an OCDBT store.
    use_zarr3: whether to write zarr 3.
    before_commit: called with the temporary folder of the checkpoint and that of the pytree when all is written. What
      it raises prevents the commit.
    check_free: refuses what stands at the target unless it may be replaced; called again just before it is.
    announce: called with the place of the target before anything is made there.

  Returns:
    What `before_commit` returned; None in other processes than the first.

  Raises:
    TargetError: the target cannot be written.
  """
  writes = _Writes(stream, put_encoded)
  array_handler = _ArrayHandler(writes)
  registry = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, array_handler),  # Orbax writes array metadata only where it finds this one.
      (target_leaf.ArrayLeaf, array_handler),
      (target_leaf.NumpyLeaf, _NumpyHandler(writes)),
      (target_leaf.ScalarLeaf, _ScalarHandler(writes)),
      *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, bool, np.number)),
      (str, ocp.type_handlers.StringHandler()),
  )
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3, type_handler_registry=registry)
  handler = pytree = _with_last_look(
      handler, lambda items: before_commit(items if target.step_folder is None else items.parent, items)
  )
  arguments = ocp.args.PyTreeSave(abstract_state.unflatten(leaves))
  if target.step_folder is not None:
    # Orbax makes an item's folder anew if it exists: it must not do so beside the handlers that write there.
    options = ocp.CompositeOptions(async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False))
    items: dict[str, Any] = {target.items.name: pytree}
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **items)
    arguments = ocp.args.Composite(**{target.items.name: arguments})
  is_primary = jax.process_index() == 0
  with (
      atomic_target.staged(target.final, check_free=check_free, is_primary=is_primary, announce=announce) as path,
      ocp.Checkpointer(handler) as checkpointer,
  ):
    checkpointer.save(path, args=arguments)
  return pytree.seen


async def merge_stores(directory: epath.Path, context: ts.Context, *, use_zarr3: bool):
  """Makes one OCDBT store of those of all processes, as Orbax does before it commits; the data files stay."""
  await ocdbt_utils.merge_ocdbt_per_process_files(directory, context, use_zarr3, enable_validation=False)


def _with_last_look(handler: Any, before_commit: Callable[[epath.Path], Any]) -> Any:
  """Lets `before_commit` see the merged pytree; Orbax commits when `finalize` returns. `seen` is what it returned.

  Set on the instance. A subclass can be recorded under the name of Orbax's handler, which readers look up, by its
  `typestr`; but Orbax knows no arguments to save it with where the pytree stands alone, for these go by the very class.
  """
  finalize = handler.finalize

  def finalize_and_look(directory):
    finalize(directory)
    handler.seen = before_commit(epath.Path(directory))

  handler.finalize, handler.seen = finalize_and_look, None
  return handler


class _Writes:
  """What writes the bytes. The handlers share it, for what is encoded is put down once, by the first of them."""

  def __init__(self, stream: Stream, put_encoded: PutEncoded):
    self.stream, self._put_encoded = stream, put_encoded
    self._is_put, self._lock = False, threading.Lock()

  async def put_encoded(self, items: epath.Path):
    with self._lock:
      is_first, self._is_put = not self._is_put, True
    if is_first:
      await self._put_encoded(items)


class _WritingHandler:
  """The part that the handlers of the three value types share."""

  def __init__(self, writes: _Writes, **kwargs):
    super().__init__(**kwargs)
    self._writes = writes

  async def serialize(self, values, infos, args=None):
    """Writes the arrays of `values`; when it returns, all is written."""
    args = args or [ocp.SaveArgs()] * len(values)
    for info in infos:
      await info.await_path_creation()
    await self._writes.put_encoded(infos[0].parent_dir)
    streamed = [each for each in zip(values, infos, args) if each[0].is_streamed]
    specs = {value.path: _write_spec(value, info, arg) for value, info, arg in streamed}
    stores = {}
    for i in range(0, len(streamed), _OPENS_AT_ONCE):
      batch = streamed[i : i + _OPENS_AT_ONCE]
      transaction = ts.Transaction()
      opened = await asyncio.gather(
          *(
              ts.open(
                  ts.Spec(specs[value.path].json),
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
      await self._writes.stream(stores)
    await self._write_metadata(values, infos, specs)
    return []

  def memory_size(self, values):
    """The bytes that will be written and read of each value, which Orbax 0.11 asks for."""
    return [(value.nbytes, value.nbytes) for value in values]

  async def _write_metadata(self, values, infos, specs):
    """Only `jax.Array` leaves have more metadata."""


class _NumpyHandler(_WritingHandler, ocp.type_handlers.NumpyHandler):
  pass


class _ScalarHandler(_WritingHandler, ocp.type_handlers.ScalarHandler):
  pass


class _ArrayHandler(_WritingHandler, ocp.type_handlers.ArrayHandler):
  """For `jax.Array` leaves, which have shardings and array metadata besides."""

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
        array_metadatas=[_array_metadata(v, i, specs.get(v.path)) for v, i in zip(values, infos)],
        process_index=jax.process_index(),
    )


def _array_metadata(value, info, spec) -> array_metadata.ArrayMetadata:
  """Orbax's array metadata, as it made it for what is streamed."""
  if spec is not None:
    return dataclasses.replace(spec.metadata, ext_metadata=value.ext_metadata)
  return array_metadata.ArrayMetadata(
      param_name=info.name,
      shape=value.shape,
      dtype=value.dtype,
      write_shape=value.write_shape,
      chunk_shape=value.chunk_shape,
      use_ocdbt=info.is_ocdbt_checkpoint,
      use_zarr3=info.use_zarr3,
      ext_metadata=value.ext_metadata,
      **value.compression,
  )


def _write_spec(value, info, args):
  """Orbax's spec of the array, with the chunks that `value` asks for."""
  return tensorstore_utils.build_array_write_spec(
      info=info,
      arg=args,
      global_shape=value.shape,
      local_shape=value.chunk_shape,
      dtype=value.dtype,
      use_ocdbt=info.is_ocdbt_checkpoint,
      process_index=jax.process_index() if info.is_ocdbt_checkpoint else None,
  )
