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

"""Files in remote storage: which are, and what their store can do by itself."""

import os
import re
from typing import Any

from etils import epath


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, such as `gs://…`."""
  return re.match("[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def children(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder. `iterdir` of etils leaves out local names that end in `~`."""
  return list(folder.iterdir()) if is_remote(folder) else [folder / name for name in os.listdir(folder)]


def copy(source: epath.Path, target: epath.Path):
  """Copies a file from or to remote storage: on the server, where both are on one."""
  (source_system, old), (target_system, new) = _located(source), _located(target)
  if source_system is target_system:
    source_system.cp_file(old, new)
  else:
    source.copy(target)


def have_one_checksum(ours: epath.Path, theirs: epath.Path) -> bool:
  """Whether the store says that two files are equal: by their size and its own checksum of their content."""
  checksums = [_checksum(path) for path in (ours, theirs)]
  return None not in checksums and checksums[0] == checksums[1]


def _checksum(path) -> tuple[int, str] | None:
  system, name = _located(path)
  info = system.info(name)
  return (info["size"], info["crc32c"]) if info.get("crc32c") else None


def _located(path) -> tuple[Any, str]:
  """A file's system, and its name there."""
  import fsspec  # It takes a while, and local files need none.  pylint: disable=import-outside-toplevel

  return fsspec.core.url_to_fs(os.fspath(path))
