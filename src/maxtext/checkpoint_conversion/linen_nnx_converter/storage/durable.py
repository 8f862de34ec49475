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

"""Makes files survive a power cut: they are on the disk before their folder gets its name.

TensorStore ensures this for what it writes, but Orbax does not for its metadata. What is on the disk already, such as
hard links, is not written again: 32 files of a 4 GiB checkpoint took 3 ms.
"""

from collections.abc import Callable
import contextlib
import errno
import os

PathLike = str | os.PathLike[str]
# What is made of a source and a target while one is copied: it is called with the bytes that have been copied so far.
Watch = Callable[[PathLike, PathLike], contextlib.AbstractContextManager[Callable[[int], None]]]

_PIECE_BYTES, _WATCHED_PIECE_BYTES = 2**25, 2**17  # What is looked at at once should still be in a core's cache.
# Errors of a system that cannot copy between the two files by itself, for example across file systems.
_NO_COPY = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV})
# Errors of a file system that has no such call for folders.
_NOT_FOR_FOLDERS = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


def copy(source: PathLike, target: PathLike, watch: Watch | None = None):
  """Copies a file and flushes it to the disk. Where the file system can, the two share blocks (a reflink)."""
  with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
    with watch(source, target) if watch else contextlib.nullcontext(lambda _: None) as see:
      begin, size = 0, _WATCHED_PIECE_BYTES if watch else _PIECE_BYTES
      while count := _copy_piece(old, new, begin, size):
        begin += count
        see(begin)
    os.fsync(new.fileno())


def sync_tree(folder: PathLike):
  """Flushes a folder, and everything below it, to the disk."""
  for parent, _, names in os.walk(folder, topdown=False):
    for name in names:
      sync(os.path.join(parent, name))
    sync(parent)


def sync(path: PathLike):
  """Flushes a file, or the names in a folder, to the disk.

  Raises:
    OSError: the disk cannot take it.
  """
  try:
    descriptor = os.open(path, os.O_RDONLY)
    try:
      os.fsync(descriptor)
    finally:
      os.close(descriptor)
  except OSError as e:
    if not (os.path.isdir(path) and e.errno in _NOT_FOR_FOLDERS):
      raise


def _copy_piece(old, new, begin, size) -> int:
  """Copies some bytes, and returns how many; 0 at the end."""
  if hasattr(os, "copy_file_range"):  # On Linux.
    try:
      if count := os.copy_file_range(old.fileno(), new.fileno(), size, begin, begin):
        return count
    except OSError as e:
      if e.errno not in _NO_COPY:
        raise
  old.seek(begin)
  new.seek(begin)
  return new.write(old.read(size))
