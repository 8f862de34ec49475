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

"""Files that may be in remote storage: which are, and what their store can do by itself."""

from concurrent import futures
import errno
import functools
import os
import re
import socket
import threading
from typing import Any
from urllib import parse
from urllib import request

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

# gcsfs looks for credentials and retries for a minute where there is no network, and TensorStore for longer.
_SECONDS_TO_CONNECT = 10.0


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, such as `gs://…`."""
  return re.match("[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def children(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder. `iterdir` of etils leaves out local names that end in `~`."""
  return list(folder.iterdir()) if is_remote(folder) else [folder / name for name in os.listdir(folder)]


def check_answers(path: str | os.PathLike[str]):
  """Checks, before anything else, that the store of a URL takes connections.

  Raises:
    AccessError: it does not.
  """
  if "https" in request.getproxies():  # Then the proxy leads there, or nothing does.
    return
  endpoint = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
  url = parse.urlsplit(endpoint if "://" in endpoint else f"http://{endpoint}")
  try:
    _connect(url.hostname, url.port or (443 if url.scheme == "https" else 80))
  except OSError as e:
    errors.check_access(path, OSError(e.errno, f"no connection to {url.hostname}, {e.strerror or e}"))


@functools.cache
def _connect(host: str, port: int) -> None:
  """Connects once, in a thread that nothing waits for at the end: looking up a name has no time-out."""
  connected: futures.Future[None] = futures.Future()

  def connect():
    try:
      socket.create_connection((host, port), _SECONDS_TO_CONNECT).close()
      connected.set_result(None)
    except OSError as e:
      connected.set_exception(e)

  threading.Thread(target=connect, daemon=True).start()
  try:
    connected.result(_SECONDS_TO_CONNECT)
  except futures.TimeoutError as e:
    raise TimeoutError(errno.ETIMEDOUT, f"none within {_SECONDS_TO_CONNECT:.0f} s") from e


def read_range(file: epath.Path, offset: int, nbytes: int) -> bytes:
  """Reads a range of a local file, or of one in remote storage; less, if the file is shorter."""
  if is_remote(file):
    system, name = _located(file)
    return system.cat_file(name, offset, offset + nbytes)
  with open(file, "rb") as data:
    data.seek(offset)
    return data.read(nbytes)


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
