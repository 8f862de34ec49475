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

import base64
from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
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
REQUESTS_AT_ONCE = 32  # Of those that bring no data here; TensorStore has as many.
PIECE_BYTES = 2**25  # Of a file that is uploaded, with a request: larger ones go in several.
_ONE_UPLOAD_BYTES = 5 * 2**20
_LOCAL_PIECE_BYTES = 2**20


def is_remote(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, such as `gs://…`."""
  return re.match("[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(path)) is not None


def answered[**Arguments, Result](function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
  """Lets a function of paths say in one line that remote storage fails for good: gcsfs and TensorStore have tried again.

  Raises:
    AccessError: it does, naming the URLs.
  """

  @functools.wraps(function)
  def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
    try:
      return function(*args, **kwargs)
    except Exception as e:
      if not errors.is_a_stores(e):
        raise
      paths = (path for path in (*args, *kwargs.values()) if isinstance(path, (str, os.PathLike)) and is_remote(path))
      raise errors.AccessError(
          " -> ".join(str(os.fspath(path)) for path in paths) or "remote storage",
          "a store that answers",
          f"{errors.named(e)}, in each of several tries",
          "Check the network and the credentials, or wait, and try again.",
      ) from e

  return call


def children(folder: epath.Path) -> list[epath.Path]:
  """What is in a folder; nothing, where there is none.

  In remote storage, one request. What is then asked of its files takes none: fsspec keeps what was listed.
  """
  if not is_remote(folder):  # `iterdir` of etils leaves out names that end in `~`.
    return [folder / name for name in os.listdir(folder)] if folder.is_dir() else []
  with contextlib.suppress(FileNotFoundError):
    found = list(folder.iterdir())
    return found if folder.is_dir() else []
  return []


def look_into(folders: Iterable[epath.Path]):
  """Lists folders that may be in remote storage, many at a time, so that asking for their files takes no request."""
  with futures.ThreadPoolExecutor(REQUESTS_AT_ONCE) as threads:
    list(threads.map(children, filter(is_remote, folders)))


def look_below(folder: epath.Path) -> dict[str, tuple[int, ...]]:
  """Lists all files below a folder in remote storage, a thousand with a request, as `children` lists what is in it.

  Returns:
    Their generations and sizes, by relative path.
  """
  system, name = _located(folder)
  system.invalidate_cache(name)
  found = system.find(name, detail=True)
  return {path.removeprefix(f"{name}/"): (int(file["generation"]), file["size"]) for path, file in found.items()}


def check_answers(path: str | os.PathLike[str]):
  """Checks, before anything else, that the store of a URL takes connections. What was listed there before is forgotten.

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
  _located(path)[0].invalidate_cache()


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


def write(file: epath.Path, text: str):
  """Writes a small file to remote storage with one request, where `write_text` of etils takes two."""
  system, name = _located(file)
  system.pipe_file(name, text.encode())


def remove(file: epath.Path):
  """Removes a file from remote storage, if it is there, with one request."""
  system, name = _located(file)
  with contextlib.suppress(FileNotFoundError):
    system.rm_file(name)


def uploads(nbytes: int) -> int:
  """The requests that upload a file of this size: gcsfs begins larger ones with one of its own."""
  return 1 if nbytes < _ONE_UPLOAD_BYTES else 1 - (-nbytes // PIECE_BYTES)


def copy(source: epath.Path, target: epath.Path):
  """Copies a file from or to remote storage: on the server, where both are there."""
  if is_remote(source) and is_remote(target):
    system, name = _located(source)
    system.cp_file(name, os.fspath(target))
  elif is_remote(target):
    system, name = _located(target)
    system.put_file(os.fspath(source), name, chunksize=PIECE_BYTES)
  else:
    system, name = _located(source)
    system.get_file(name, os.fspath(target), chunk_size=PIECE_BYTES, concurrency=1)


def copy_tree(source: epath.Path, target: epath.Path):
  """Copies a file, or a folder with everything in it."""
  to_remote = is_remote(target)
  if not source.is_dir():
    if to_remote or is_remote(source):
      copy(source, target)
    else:
      source.copy(target)
    return
  if not to_remote:  # Where there are no folders.
    target.mkdir()
  for child in children(source):
    copy_tree(child, target / child.name)


def have_one_checksum(ours: epath.Path, theirs: epath.Path) -> bool:
  """Whether two files are of one size and one checksum: that which the store keeps of each, or one that is taken here."""
  checksums = [_checksum(path) for path in (ours, theirs)]
  return None not in checksums and checksums[0] == checksums[1]


def _checksum(path) -> tuple[int, str] | None:
  if is_remote(path):
    system, name = _located(path)
    info = system.info(name)
    return (info["size"], info["crc32c"]) if info.get("crc32c") else None
  import google_crc32c  # Not for `--version`.

  checksum, size = google_crc32c.Checksum(), 0
  with open(path, "rb", buffering=0) as file:
    while piece := file.read(_LOCAL_PIECE_BYTES):
      checksum.update(piece)
      size += len(piece)
  return size, base64.b64encode(checksum.digest()).decode()


def _located(path) -> tuple[Any, str]:
  """The file system of what is in remote storage, and its name there.

  It is the one by which etils, and so Orbax, writes: it forgets what it has listed where something is written.
  """
  system = epath.backend.fsspec_backend.fs(path)
  return system, str(system._strip_protocol(os.fspath(path)))  # pylint: disable=protected-access
