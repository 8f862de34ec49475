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

"""Checkpoints on disk. The one module that knows Orbax and TensorStore.

Orbax frames every target: it makes the temporary folder, writes the metadata, merges and commits. What this module adds
is a leaf type, `TargetLeaf`, whose handlers put the arrays down block by block instead of whole. Tried with
orbax-checkpoint 0.11.39 and 0.12.4; the private names it needs are imported from `orbax.checkpoint._src` below.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
import dataclasses
import json
import os
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

Path = abstract_state.Path

_JAX_ARRAY, _NUMPY_ARRAY, _SCALAR = "jax.Array", "np.ndarray", "scalar"  # Orbax's value types of stored arrays.
_OPENS_AT_ONCE = 1000


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
          found=_first_line(e),
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
        path: _stored_leaf(leaf, value_types.get(path, _JAX_ARRAY), ext_metadata)
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


@dataclasses.dataclass(frozen=True)
class TargetLeaf:
  """A leaf that Orbax is given to save, whose bytes are written by `save`'s `write_arrays`."""

  path: Path
  stored: StoredLeaf

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


_LEAF_TYPES = {_JAX_ARRAY: _ArrayLeaf, _NUMPY_ARRAY: _NumpyLeaf, _SCALAR: _ScalarLeaf}

# Writes the arrays of these target leaves into these open stores.
WriteArrays = Callable[[Mapping[Path, ts.TensorStore]], Awaitable[None]]


def target_leaves(plan: plan_lib.Plan, source: Checkpoint) -> dict[Path, Any]:
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
  final = target.step_folder or target.items
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
    handler = ocp.CompositeCheckpointHandler(**{target.items.name: handler})
    arguments = ocp.args.Composite(**{target.items.name: arguments})
  created = _make_parents(path)
  if path.exists():  # An empty folder, for `locations.check_free` has passed it.
    path.rmdir()
  try:
    with _Checkpointer(handler) as checkpointer:
      checkpointer.save(path, args=arguments)
  except BaseException:
    for leftover in filter(None, (checkpointer.temporary, *created)):
      if leftover.exists():
        leftover.rmtree()
    raise
  if path != final:
    _replace(final, path)


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
  return {"jax": jax.__version__, "orbax-checkpoint": ocp.__version__, "tensorstore": _tensorstore_version()}


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

  async def _write_metadata(self, values, infos, specs):
    """Only `jax.Array` leaves have more metadata."""


class _NumpyHandler(_WritingHandler, ocp.type_handlers.NumpyHandler):
  pass


class _ScalarHandler(_WritingHandler, ocp.type_handlers.ScalarHandler):
  pass


class _ArrayHandler(_WritingHandler, ocp.type_handlers.ArrayHandler):
  """For `jax.Array` leaves, which have shardings and array metadata besides."""

  def __init__(self, write_arrays: WriteArrays):
    super().__init__(write_arrays, array_metadata_store=array_metadata_store.Store())

  async def _write_metadata(self, values, infos, specs):
    transaction = ts.Transaction()
    for value, info in zip(values, infos):
      if value.stored.sharding is not None:
        spec = tensorstore_utils.get_sharding_tensorstore_spec(info.parent_dir.as_posix(), info.name)
        store = await ts.open(spec, open=True, context=info.ts_context)
        await store.with_transaction(transaction).write(value.stored.sharding.to_serialized_string())
    await transaction.commit_async()
    await self._array_metadata_store.write(
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


def _moved(stored: StoredLeaf, move: plan_lib.Move, leaf) -> StoredLeaf:
  """How the target leaf is stored, where the source leaf, or one of those to stack, is stored as `stored`."""
  chunk_shape, sharding = stored.chunk_shape, stored.sharding
  if isinstance(move, plan_lib.Stack):
    chunk_shape = (*chunk_shape[: move.axis], 1, *chunk_shape[move.axis :])
  elif isinstance(move, plan_lib.Slice):
    chunk_shape = (*chunk_shape[: move.axis], *chunk_shape[move.axis + 1 :])
  if hasattr(sharding, "partition_spec"):
    sharding = dataclasses.replace(sharding, partition_spec=_moved_spec(sharding.partition_spec, move, len(stored.shape)))
  shape = tuple(leaf.shape)
  return dataclasses.replace(stored, shape=shape, dtype=np.dtype(leaf.dtype), chunk_shape=chunk_shape, sharding=sharding)


def _moved_spec(spec, move, rank) -> tuple[Any, ...]:
  """The partition spec with the layer axis, which is not sharded, put in or taken out."""
  spec = tuple(spec)
  if isinstance(move, plan_lib.Copy):
    return spec
  spec += (None,) * (rank - len(spec))
  if isinstance(move, plan_lib.Stack):
    return (*spec[: move.axis], None, *spec[move.axis :])
  return (*spec[: move.axis], *spec[move.axis + 1 :])


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
        path, expected="a place that can be written", found=_first_line(e), remedy="Choose another --target_path."
    ) from e
  return missing[-1:]


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


def _tensorstore_version() -> str:
  from importlib import metadata  # pylint: disable=import-outside-toplevel

  return metadata.version("tensorstore")


def _first_line(e: BaseException) -> str:
  return f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else 'no message'}"[:300]
