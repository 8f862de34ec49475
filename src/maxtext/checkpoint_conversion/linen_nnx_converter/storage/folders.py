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

"""Makes, locks, removes and exchanges folders."""

from collections.abc import Iterable, Iterator
import contextlib
import ctypes
import errno
import fcntl
import itertools
import os
import time

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

_REMOVALS, _CHECKS_AFTER_REMOVAL, _SECONDS_BETWEEN_TRIES = 200, 4, 0.1
_SECONDS_TO_END = 3.0  # How long a killed process may take to release its locks on a busy machine.
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Of Linux's <fcntl.h> and <stdio.h>.
_NO_EXCHANGE = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def make_parents(path: epath.Path) -> list[epath.Path]:
  """Makes the parent folders; returns those that were made, the lowest first."""
  missing = list(itertools.takewhile(lambda parent: not parent.exists(), path.parents))
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as e:
    remove_empty(missing)
    raise errors.TargetError(path, "a place that can be written", f"{type(e).__name__}: {e}") from e
  return missing


@contextlib.contextmanager
def locked(folder: epath.Path, *, wait: bool) -> Iterator[bool]:
  """Holds a folder's lock; yields whether it does, for another may, or the file system may have no locks."""
  descriptor = os.open(folder, os.O_RDONLY)
  try:
    yield _lock(descriptor, wait)
  finally:
    os.close(descriptor)


def _lock(descriptor, wait) -> bool:
  """Locks a folder. Without `wait`, it still waits as long as a process that was just killed takes to end."""
  deadline = time.monotonic() + _SECONDS_TO_END
  while True:
    try:
      fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
      return True
    except BlockingIOError:
      if time.monotonic() > deadline:
        return False
      time.sleep(_SECONDS_BETWEEN_TRIES)
    except OSError:
      return False


def exchange(one: epath.Path, other: epath.Path) -> bool:
  """Exchanges two folders atomically; False if the system cannot."""
  renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  if renameat2 is None:
    return False
  if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
    return True
  number = ctypes.get_errno()
  if number in _NO_EXCHANGE:
    return False
  raise OSError(number, os.strerror(number), os.fspath(other))


def remove(folder: epath.Path):
  """Removes a folder into which TensorStore may still be writing, which cannot be cancelled.

  Raises:
    TargetError: something remains.
  """
  gone, found = 0, ""
  for _ in range(_REMOVALS):
    gone = 0 if folder.exists() else gone + 1
    if gone == _CHECKS_AFTER_REMOVAL:
      return
    try:
      if not gone:
        folder.rmtree()
    except OSError as e:  # A file appeared while the folder was being emptied, or something else is wrong.
      found = errors.named(e)
    except Exception as e:
      if not errors.is_a_stores(e):
        raise
      found = f"a store that fails, {errors.one_line(e)}"
      raise errors.TargetError(
          folder, "to be removed", found, "What lies there is not finished: remove it by hand."
      ) from e
    time.sleep(_SECONDS_BETWEEN_TRIES)
  raise errors.TargetError(folder, "to be removed", found or "files that come back", "Remove it by hand.")


def remove_empty(folders: Iterable[epath.Path]):
  """Removes empty folders, the lowest first, up to one that another conversion uses."""
  for folder in folders:
    with contextlib.suppress(OSError):
      os.rmdir(folder)
