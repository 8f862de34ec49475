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

Orbax makes the temporary folder, writes the metadata, merges and commits. What this module adds is a leaf type,
`TargetLeaf`, whose handlers let the arrays be written block by block instead of whole.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
import dataclasses
import time
from typing import Any
import uuid

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint._src.multihost import multihost
from orbax.checkpoint._src.serialization import tensorstore_utils
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import locations
from maxtext.checkpoint_conversion.linen_nnx_converter import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import storage

Path = abstract_state.Path

_OPENS_AT_ONCE = 1000
_REMOVALS, _CHECKS_AFTER_REMOVAL, _SECONDS_BETWEEN_REMOVALS = 200, 4, 0.1


@dataclasses.dataclass(frozen=True)
class TargetLeaf:
  """A leaf that Orbax is given to save, whose bytes are written by `save`'s `write_arrays`."""

  path: Path
  stored: storage.StoredLeaf

  @property
  def nbytes(self) -> int:
    return self.stored.nbytes

  @property
  def shape(self) -> tuple[int, ...]:
    return self.stored.shape

  @property
  def dtype(self) -> np.dtype:
    return self.stored.dtype


# One class for each value type, siblings: Orbax's registry finds a handler by `issubclass`.
class _ArrayLeaf(TargetLeaf):
  pass


class _NumpyLeaf(TargetLeaf):
  pass


class _ScalarLeaf(TargetLeaf):
  pass


_LEAF_TYPES = {storage.JAX_ARRAY: _ArrayLeaf, storage.NUMPY_ARRAY: _NumpyLeaf, storage.SCALAR: _ScalarLeaf}

# Writes the arrays of these target leaves into these open stores.
WriteArrays = Callable[[Mapping[Path, ts.TensorStore]], Awaitable[None]]


def new_transaction() -> ts.Transaction:
  """A transaction for `WriteArrays` to write in."""
  return ts.Transaction()


def target_leaves(plan: plan_lib.Plan, source: storage.Checkpoint) -> dict[Path, Any]:
  """The leaves to save: what is stored how, as the plan makes it of what the source has stored.

  A target leaf has the chunks of its source leaf: of a layer's, with one layer to a chunk, where layers are stacked. So
  each source chunk is decoded once, and no target chunk is written twice.
  """
  leaves = dict(plan.target.leaves)
  for path, move in plan.moves.items():
    origin = next(plan_lib.sources_of(move))[0]
    if origin in source.stored:
      stored = _moved(source.stored[origin], move, plan.target.leaves[path])
      leaves[path] = _LEAF_TYPES[stored.value_type](path, stored)
  return leaves


def save(
    target: locations.Location,
    leaves: abstract_state.AbstractState,
    write_arrays: WriteArrays,
    *,
    use_ocdbt: bool,
    use_zarr3: bool,
    before_commit: Callable[[epath.Path, epath.Path], None],
    overwrite: bool,
):
  """Saves a pytree of `TargetLeaf`s and others: whole, or not at all.

  Args:
    target: where to.
    leaves: the leaves and lists of the pytree.
    write_arrays: writes the arrays; called with stores that are open for writing.
    use_ocdbt: whether the arrays go into an OCDBT store.
    use_zarr3: whether to write zarr 3.
    before_commit: called with the temporary folder of the checkpoint and that of the pytree when all is written. What
      it raises prevents the commit.
    overwrite: whether to replace what stands at the target.

  Raises:
    TargetError: the target cannot be written.
  """
  final = target.final
  path = final.parent / f"{final.name}.replacement-{uuid.uuid4().hex[:8]}" if overwrite and final.exists() else final
  array_handler = _ArrayHandler(write_arrays)
  registry = ocp.type_handlers.create_type_handler_registry(
      (jax.Array, array_handler),  # Orbax writes array metadata only where it finds this one.
      (_ArrayLeaf, array_handler),
      (_NumpyLeaf, _NumpyHandler(write_arrays)),
      (_ScalarLeaf, _ScalarHandler(write_arrays)),
      *((kind, ocp.type_handlers.ScalarHandler()) for kind in (int, float, bool, np.number)),
      (str, ocp.type_handlers.StringHandler()),
  )
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3, type_handler_registry=registry)
  handler = _with_last_look(
      handler, lambda items: before_commit(items if target.step_folder is None else items.parent, items)
  )
  arguments = ocp.args.PyTreeSave(abstract_state.unflatten(leaves))
  if target.step_folder is not None:
    # Orbax makes an item's folder anew if it exists: it must not do so beside the handlers that write there.
    options = ocp.CompositeOptions(async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False))
    items: dict[str, Any] = {target.items.name: handler}
    handler = ocp.CompositeCheckpointHandler(composite_options=options, **items)
    arguments = ocp.args.Composite(**{target.items.name: arguments})
  created = _make_parents(path)
  if path.exists():  # An empty folder, for `locations.check_free` has passed it.
    path.rmdir()
  checkpointer = _Checkpointer(handler)
  try:
    with checkpointer:
      checkpointer.save(path, args=arguments)
  except BaseException:
    for leftover in filter(None, (checkpointer.temporary, *created)):
      _remove(leftover)
    raise
  if path != final:
    _replace(final, path)


class _Checkpointer(ocp.Checkpointer):
  """Remembers its temporary folder, which Orbax leaves behind when a save fails."""

  temporary: epath.Path | None = None

  def get_temporary_path(self, directory):
    temporary = super().get_temporary_path(directory)
    self.temporary = epath.Path(temporary.get())
    return temporary


def _with_last_look(handler: ocp.PyTreeCheckpointHandler, before_commit: Callable[[epath.Path], None]):
  """Lets `before_commit` see the merged pytree; Orbax commits when `finalize` returns.

  Set on the instance: a subclass could not be recorded in the checkpoint under the name of Orbax's handler, which
  readers look up.
  """
  finalize = handler.finalize

  def finalize_and_look(directory):
    finalize(directory)
    before_commit(epath.Path(directory))

  handler.finalize = finalize_and_look
  return handler


class _WritingHandler:
  """The part that the handlers of the three value types share: opening the stores, and `write_arrays`."""

  def __init__(self, write_arrays: WriteArrays, **kwargs):
    super().__init__(**kwargs)
    self._write_arrays = write_arrays

  async def serialize(self, values, infos, args=None):
    """Writes the arrays of `values`; when it returns, all is written."""
    args = args or [ocp.SaveArgs()] * len(values)
    for info in infos:
      await info.await_path_creation()
    specs = [_write_spec(*each) for each in zip(values, infos, args)]
    stores = {}
    for i in range(0, len(specs), _OPENS_AT_ONCE):
      batch = range(i, min(i + _OPENS_AT_ONCE, len(specs)))
      transaction = ts.Transaction()
      opened = await asyncio.gather(
          *(
              ts.open(
                  ts.Spec(specs[k].json), create=True, open=True, context=infos[k].ts_context, transaction=transaction
              )
              for k in batch
          )
      )
      await transaction.commit_async()
      stores |= {values[k].path: store.with_transaction(None) for k, store in zip(batch, opened)}
    await self._write_arrays(stores)
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

  def __init__(self, write_arrays: WriteArrays):
    self._metadatas = array_metadata_store.Store()
    super().__init__(write_arrays, array_metadata_store=self._metadatas)

  async def _write_metadata(self, values, infos, specs):
    transaction = ts.Transaction()
    for value, info in zip(values, infos):
      if value.stored.sharding is not None:
        spec = tensorstore_utils.get_sharding_tensorstore_spec(info.parent_dir.as_posix(), info.name)
        store = await ts.open(spec, open=True, context=info.ts_context)
        await store.with_transaction(transaction).write(value.stored.sharding.to_serialized_string())
    await transaction.commit_async()
    await self._metadatas.write(
        checkpoint_dir=infos[0].parent_dir,
        array_metadatas=[
            dataclasses.replace(s.metadata, ext_metadata=v.stored.ext_metadata) for s, v in zip(specs, values)
        ],
        process_index=multihost.process_index(),
    )


def _write_spec(value, info, args):
  """Orbax's spec of the array, with the chunks that `value` asks for."""
  return tensorstore_utils.build_array_write_spec(
      info=info,
      arg=args,
      global_shape=value.shape,
      local_shape=value.stored.chunk_shape,
      dtype=value.dtype,
      use_ocdbt=info.is_ocdbt_checkpoint,
      process_index=multihost.process_index() if info.is_ocdbt_checkpoint else None,
  )


def _moved(stored: storage.StoredLeaf, move: plan_lib.Move, leaf) -> storage.StoredLeaf:
  """How the target leaf is stored, where the source leaf, or one of those to stack, is stored as `stored`."""
  chunk_shape, sharding, value_type = stored.chunk_shape, stored.sharding, stored.value_type
  if value_type == storage.SCALAR and not isinstance(move, plan_lib.Copy):
    value_type = storage.NUMPY_ARRAY
  if isinstance(move, plan_lib.Stack):
    chunk_shape = plan_lib.insert(chunk_shape, move.axes, (1,) * len(move.axes))
  elif isinstance(move, plan_lib.Slice):
    chunk_shape = plan_lib.remove(chunk_shape, move.axes)
  elif isinstance(move, plan_lib.Transpose):
    chunk_shape = tuple(chunk_shape[axis] for axis in move.axes)
  if hasattr(sharding, "partition_spec"):
    sharding = dataclasses.replace(sharding, partition_spec=_moved_spec(sharding.partition_spec, move, len(stored.shape)))
  shape = tuple(leaf.shape)
  return dataclasses.replace(
      stored,
      value_type=value_type,
      shape=shape,
      dtype=np.dtype(leaf.dtype),
      chunk_shape=chunk_shape,
      sharding=sharding,
  )


def _moved_spec(spec, move, rank) -> tuple[Any, ...]:
  """The partition spec with the layer axis, which is not sharded, put in or taken out."""
  spec = tuple(spec)
  if isinstance(move, plan_lib.Copy):
    return spec
  spec += (None,) * (rank - len(spec))
  if isinstance(move, plan_lib.Stack):
    return plan_lib.insert(spec, move.axes, (None,) * len(move.axes))
  if isinstance(move, plan_lib.Transpose):
    return tuple(spec[axis] for axis in move.axes)
  return plan_lib.remove(spec, move.axes)


def _make_parents(path) -> list[epath.Path]:
  """Makes the parent folders, and returns the topmost that was made, in a list; empty if there was none to make."""
  missing = []
  for parent in path.parents:
    if parent.exists():
      break
    missing.append(parent)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    raise errors.TargetError(
        path, expected="a place that can be written", found=storage.first_line(e), remedy="Choose another --target_path."
    ) from e
  return missing[-1:]


def _remove(folder: epath.Path):
  """Removes a folder into which TensorStore may still be writing, since what is under way cannot be called back.

  Raises:
    TargetError: something remains.
  """
  gone = 0
  for _ in range(_REMOVALS):
    gone = 0 if folder.exists() else gone + 1
    if gone == _CHECKS_AFTER_REMOVAL:
      return
    try:
      if not gone:
        folder.rmtree()
    except OSError:  # A file appeared while the folder was being emptied.
      pass
    time.sleep(_SECONDS_BETWEEN_REMOVALS)
  raise errors.TargetError(folder, expected="to be removed", found="files that come back", remedy="Remove it by hand.")


def _replace(final, replacement):
  """Puts the finished replacement in the place of the old checkpoint, which stays whole until then."""
  old = final.parent / f"{final.name}.replaced-{uuid.uuid4().hex[:8]}"
  final.rename(old)
  try:
    replacement.rename(final)
  except BaseException:
    old.rename(final)
    replacement.rmtree()
    raise
  old.rmtree()
