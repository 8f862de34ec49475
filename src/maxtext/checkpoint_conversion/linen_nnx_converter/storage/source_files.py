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

"""The files of a source: only files and folders of its own, which must not change meanwhile."""

from collections.abc import Iterator, Mapping
import errno
import json
import os
import stat
from typing import Any

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files

_MOST_METADATA_BYTES = 2**28  # JSON takes ten times its size in memory. Orbax writes 9 MiB for 20,000 leaves.

# A file's inode, size in bytes, and modification time in ns, none of which hard links change; in remote storage its
# generation, which every save changes, and size.
Stamp = tuple[int, ...]


def read_json(path: epath.Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
  """The JSON object in a file; `default`, if given, where there is no file.

  Raises:
    ValueError: there is no JSON object, or it is too large.
  """
  if default is not None and not path.exists():
    return default
  check_file(path)
  try:
    document = json.loads(path.read_text())
  except RecursionError as e:
    raise ValueError(f"{path.name} is nested too deep") from e
  if not isinstance(document, dict):
    raise ValueError(f"{path.name} holds no JSON object")
  return document


def check_readable(path: str | os.PathLike[str]):
  """Checks that this process may read a file, or list and enter a folder, or that a URL's store answers.

  Raises:
    AccessError: it may not, or the store does not. Absent files pass.
  """
  if remote_files.is_remote(path):
    remote_files.check_answers(path)
    return
  try:
    is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    if not os.access(path, os.R_OK | (os.X_OK if is_folder else 0)):
      raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), os.fspath(path))
  except PermissionError as e:
    errors.check_access(path, e)
  except (OSError, ValueError):
    return


def check_file(path: epath.Path):
  """Checks that a metadata file can be read to its end, which a pipe may not have, and is not too large.

  Raises:
    ValueError: it is no file, or too large.
  """
  if not remote_files.is_remote(path) and not stat.S_ISREG(mode := os.stat(path).st_mode):
    raise ValueError(f"{path.name} is {_kind(mode)}, not a file")
  if (nbytes := path.stat().length) > _MOST_METADATA_BYTES:
    raise ValueError(f"{path.name} has {nbytes} bytes; {_MOST_METADATA_BYTES} are the most")


def survey(folder: epath.Path) -> dict[str, Stamp]:
  """The stamps of all files below a folder, by relative path.

  Raises:
    ForeignFileError: there is a link, a pipe or a device, which would lead out of the checkpoint.
    AccessError: one of them cannot be read, though it could still be linked.
  """
  if remote_files.is_remote(folder):
    return remote_files.look_below(folder)
  root = os.fspath(folder)
  return {os.path.relpath(entry.path, root): _stamp(entry.stat(follow_symlinks=False)) for entry in _files(root)}


def check_unchanged(folder: epath.Path, stamps: Mapping[str, Stamp]):
  """Checks that every surveyed file is still the same.

  Raises:
    SourceChangedError: naming one that is not.
  """
  now = remote_files.look_below(folder) if remote_files.is_remote(folder) else None
  for name, stamp in stamps.items():
    path = os.path.join(folder, name)
    try:
      found = _stamp(os.stat(path, follow_symlinks=False)) if now is None else now[name]
    except KeyError:
      found, reason = None, "none"
    except OSError as e:
      found, reason = None, (e.strerror or str(e)).lower()
    else:
      reason = "another one"
    if found != stamp:
      raise errors.SourceChangedError(
          path,
          "the file that stood there when the conversion began",
          reason,
          "Convert again when nothing writes to the source.",
      )


def _files(root: str) -> Iterator[os.DirEntry]:
  """Every file below a folder."""
  folders = [root]
  while folders:
    folder = folders.pop()
    check_readable(folder)
    with os.scandir(folder) as entries:
      for entry in entries:
        if entry.is_dir(follow_symlinks=False):
          folders.append(entry.path)
        elif entry.is_file(follow_symlinks=False):
          check_readable(entry.path)
          yield entry
        else:
          raise _foreign(entry)


def _foreign(entry) -> errors.ForeignFileError:
  is_link = entry.is_symlink()
  return errors.ForeignFileError(
      entry.path,
      "a file or folder of the checkpoint's own",
      f"a symbolic link to {os.readlink(entry.path)}" if is_link else _kind(entry.stat().st_mode),
      "Copy the checkpoint with `cp -rL` and convert the copy." if is_link else "Remove it from the checkpoint.",
  )


def _kind(mode: int) -> str:
  kinds = (
      (stat.S_ISDIR, "a folder"),
      (stat.S_ISFIFO, "a pipe"),
      (stat.S_ISSOCK, "a socket"),
      (stat.S_ISBLK, "a device"),
      (stat.S_ISCHR, "a device"),
  )
  return next((name for is_kind, name in kinds if is_kind(mode)), "something else")


def _stamp(status: os.stat_result) -> Stamp:
  return status.st_ino, status.st_size, status.st_mtime_ns
