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

"""Moves encoded chunks from one store to another, under new keys. Only this and `orbax_writer` write array bytes."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from concurrent import futures
import errno
import os
from typing import Any

from etils import epath
import tensorstore as ts

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import durable
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files

_FILES_AT_ONCE = 4
# `os.link`'s errors if a file cannot be linked: another file system, one without links, or too many links.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})

Pairs = Iterable[tuple[str, str]]


async def bring(
    source: epath.Path,
    target: epath.Path,
    files: Pairs,
    *,
    copy_mode: str,
    on_brought: Callable[[str], None],
    watch: durable.Watch | None = None,
):
  """Links or copies files.

  Args:
    source: the folder that they are in.
    target: the folder to bring them to.
    files: the name of each in `source`, and in `target`.
    copy_mode: `link`, `copy`, or `auto`: a link where the file system can, otherwise a copy. Only files that nobody
      writes to may be linked, because a file that is rewritten in place changes under all its names.
    on_brought: called with the name in `source` of each when it is there.
    watch: sees each file that is copied, except in remote storage.

  Raises:
    TargetError: `copy_mode` is `link`, and a file cannot be linked.
  """
  files, loop = list(files), asyncio.get_running_loop()
  remote = [remote_files.is_remote(folder) for folder in (source, target)]
  for folder in {(target / new).parent for _, new in files} if not remote[1] else ():
    folder.mkdir(parents=True, exist_ok=True)
  with futures.ThreadPoolExecutor(remote_files.REQUESTS_AT_ONCE if all(remote) else _FILES_AT_ONCE) as threads:

    async def bring_one(old, new):
      await loop.run_in_executor(threads, _bring_file, source / old, target / new, copy_mode, watch)
      on_brought(old)

    await coroutines.settle(bring_one(old, new) for old, new in files)


async def rename(
    source: Any,
    target: epath.Path,
    ranges: Iterable[tuple[str, str, bool]],
    documents: Mapping[str, bytes],
):
  """Makes the target's OCDBT store refer to the source's values, in one transaction.

  The data files, including those with nodes of the tree, must be in the target at the same relative paths. TensorStore
  copies ranges of keys only into a store whose base is the source's or above it; so each of the source's stores is opened
  with its folder in the target as the base, and with its own manifest.

  Args:
    source: the source, with a `directory` and a TensorStore `context`.
    target: the folder of the target's pytree.
    ranges: old and new keys or prefixes, as `chunk_keys.ranges` gives them.
    documents: other values to write.
  """
  old_stores = {folder: await _open_moved(source, folder, target) for folder in source.stores}
  new_store = await ts.KvStore.open(ocdbt_index.writable_spec(target), context=source.context)
  transaction = ts.Transaction(atomic=True)
  new_store = new_store.with_transaction(transaction)
  single = ts.KvStore.KeyRange("", "\0")  # Only the empty key, relative to a store that is opened at a key.
  everything = ts.KvStore.KeyRange()
  operations = [
      (old_stores[folder] / old.removeprefix(folder)).experimental_copy_range_to(
          new_store / new, source_range=everything if is_prefix else single
      )
      for old, new, is_prefix in ranges
      for folder in source.stores
      if old.startswith(folder)
  ]
  await coroutines.settle([*operations, *(new_store.write(key, value) for key, value in documents.items())])
  await transaction.commit_async()


async def copy_values(
    source: reader.Checkpoint,
    store: Mapping[str, Any],
    pairs: Pairs,
    documents: Mapping[str, bytes],
    *,
    memory_budget: memory.Budget,
    on_copied: Callable[[str], None],
):
  """Copies encoded values into a process's own OCDBT store, which Orbax will merge.

  Args:
    source: the source.
    store: TensorStore's spec of that store.
    pairs: old and new keys.
    documents: other values to write.
    memory_budget: what the data in flight may take.
    on_copied: called with the old key of each value when it is there.
  """
  new_store = await ts.KvStore.open(store, context=ocdbt_index.new_context())

  async def copy(old, new, transaction):
    await new_store.with_transaction(transaction).write(new, await source.read_value(old))

  async def copy_batch(batch):
    transaction = ts.Transaction(atomic=True)
    await coroutines.settle(copy(old, new, transaction) for old, new in batch)
    await transaction.commit_async()
    for old, _ in batch:
      on_copied(old)

  await streaming.in_batches(
      pairs, copy_batch, nbytes_of=lambda pair: source.index.values[pair[0]].nbytes, memory_budget=memory_budget
  )
  transaction = ts.Transaction(atomic=True)
  await coroutines.settle(new_store.with_transaction(transaction).write(key, value) for key, value in documents.items())
  await transaction.commit_async()


async def _open_moved(source, folder, target) -> ts.KvStore:
  """Opens one of the source's stores, whose data files are in the target."""
  manifest = ocdbt_index.spec(source.directory / folder, use_ocdbt=True)["base"]
  spec = ocdbt_index.spec(target / folder, use_ocdbt=True) | {"manifest": manifest}
  return await ts.KvStore.open(spec, context=source.context)


def _bring_file(source: epath.Path, target: epath.Path, copy_mode: str, watch: durable.Watch | None):
  """Links or copies one file, unless another leaf has brought it already."""
  if remote_files.is_remote(source) or remote_files.is_remote(target):
    if copy_mode == "link":
      raise _no_link(source, target, "remote storage, which has no links")
    remote_files.copy(source, target)
    return
  if copy_mode != "copy":
    try:
      os.link(os.path.realpath(source), target)
      return
    except FileExistsError:
      return
    except OSError as e:
      if e.errno not in _NO_LINK:
        raise
      if copy_mode == "link":
        raise _no_link(source, target, os.strerror(e.errno or 0)) from e
  durable.copy(source, target, watch)


def _no_link(source, target, found) -> errors.TargetError:
  return errors.TargetError(
      target,
      f"a file system on which {source} can be linked",
      found,
      "Choose a --target_path beside the source, or pass --copy_mode=auto.",
  )
