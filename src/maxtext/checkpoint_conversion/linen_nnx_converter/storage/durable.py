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

"""Makes files outlast a power cut: the disk has them before the folder that they are in gets its name.

TensorStore sees to that for what it writes; Orbax does not for its metadata. Of what is on the disk already, such as hard
links, nothing is written again: 32 files of a 4 GiB checkpoint took 3 ms.
"""

from collections.abc import Callable
import contextlib
import errno
import os

PathLike = str | os.PathLike[str]
# What is made of a source and a target while one is copied: it is called with the bytes that have been copied so far.
Watch = Callable[[PathLike, PathLike], contextlib.AbstractContextManager[Callable[[int], None]]]

_PIECE_BYTES, _WATCHED_PIECE_BYTES = 2**25, 2**17  # What is looked at at once should still be in a core's cache.
# What a system says that cannot copy from one file to another by itself: between two file systems, for one.
_NO_COPY = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV})
# What a file system says of a folder if it has no such call for folders.
_NOT_FOR_FOLDERS = frozenset({errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES})


def copy(source: PathLike, target: PathLike, watch: Watch | None = None):
  """Copies a file, which the disk has in the end. Where the file system can, the two share its blocks (a reflink)."""
  with open(source, "rb", buffering=0) as old, open(target, "wb", buffering=0) as new:
    with watch(source, target) if watch else contextlib.nullcontext(lambda _: None) as see:
      begin, size = 0, _WATCHED_PIECE_BYTES if watch else _PIECE_BYTES
      while count := _copy_piece(old, new, begin, size):
        begin += count
        see(begin)
    os.fsync(new.fileno())


def sync_tree(folder: PathLike):
  """Writes all files and folders below a folder, and itself, to the disk."""
  for parent, _, names in os.walk(folder, topdown=False):
    for name in names:
      sync(os.path.join(parent, name))
    sync(parent)


def sync(path: PathLike):
  """Writes a file, or the names that a folder holds, to the disk.

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
