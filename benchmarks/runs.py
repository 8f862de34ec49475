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

"""Runs things in processes of their own, and tells what they took. Needs Linux's `/proc`."""

from collections.abc import Iterator, Sequence
import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import time
from typing import Any

MIB, GIB = 2**20, 2**30

_PROCESS = pathlib.Path(__file__).with_name("measured_process.py")
_SECONDS_BETWEEN_LOOKS = 0.05
_MEMORY_TO_LEAVE = GIB  # To whatever else runs on the machine.


@dataclasses.dataclass(frozen=True)
class Run:
  """What one process took.

  Attributes:
    seconds: from its start to its end.
    start: seconds from its start until all was imported.
    work: seconds after that, its end left out.
    cpu: seconds of all its threads, imports included.
    rss: the peak of its resident memory, in bytes.
    read: bytes that it read, from the page cache or from the disk.
    disk_read: those of them that came from the disk.
    written: bytes that it wrote.
    new: bytes of the target's files that the source does not have by hard links.
    said: the converter's summary.
    failure: why it came to no end.
  """

  seconds: float
  start: float | None = None
  work: float | None = None
  cpu: float | None = None
  rss: int | None = None
  read: int | None = None
  disk_read: int | None = None
  written: int | None = None
  new: int | None = None
  said: str = ""
  failure: str = ""


class NoCheckpointError(Exception):
  """A checkpoint to measure with could not be made."""


class Scratch:
  """A folder in which one thing runs at a time, on checkpoints that are removed as soon as nothing needs them.

  Attributes:
    folder: the folder.
    memory_limit: bytes of resident memory at which a process is ended.
  """

  def __init__(self, folder: pathlib.Path, memory_limit: float):
    self.folder, self.memory_limit = folder, memory_limit

  @contextlib.contextmanager
  def source(self, module: str = "checkpoint_data", **options) -> Iterator[pathlib.Path]:
    """A checkpoint, made as the module's `save` is told to."""
    with self._kept("source", "make", module, json.dumps(options)) as folder:
      yield folder

  @contextlib.contextmanager
  def converted(self, source: pathlib.Path, *arguments: str) -> Iterator[pathlib.Path]:
    """A conversion of a checkpoint."""
    folder = self.folder / "converted"
    with self._kept(folder.name, "convert", *_paths(source, folder), *arguments, has_target=False):
      yield folder

  def start(self) -> Run:
    """A process that only imports what a conversion needs."""
    return self._measure([sys.executable, _PROCESS, "start"])

  def run(self, job: str, *arguments: str | pathlib.Path) -> Run:
    """Any job of `measured_process.py`, of which nothing is removed."""
    return self._measure([sys.executable, _PROCESS, job, *arguments])

  def convert(self, source: pathlib.Path, *arguments: str) -> Run:
    """This converter."""
    target = self.folder / "target"
    return self._to_target(source, target, converter(source, target, *arguments))

  def inspect(self, source: pathlib.Path) -> Run:
    """The inspector."""
    _warm(source)
    return self._measure([sys.executable, _PROCESS, "inspect", source])

  def compare(self, first: pathlib.Path, second: pathlib.Path) -> Run:
    """The comparator, on params alone; it fails where they differ in a bit."""
    return self._measure([sys.executable, _PROCESS, "compare", first, second, "--params_only"])

  def straightforward(self, source: pathlib.Path, **options) -> Run:
    """Restore all, transform with NumPy, save all."""
    target = self.folder / "target"
    command = [sys.executable, _PROCESS, "straightforward", source, target, json.dumps(options)]
    return self._to_target(source, target, command)

  def decode(self, source: pathlib.Path) -> Run:
    """TensorStore reading all arrays."""
    _warm(source)
    return self._measure([sys.executable, _PROCESS, "decode", source])

  def encode(self, source: pathlib.Path) -> Run:
    """TensorStore writing as many layers as the source has."""
    target = self.folder / "target"
    return self._to_target(source, target, [sys.executable, _PROCESS, "encode", source, target])

  def copy(self, source: pathlib.Path, option: str) -> Run:
    """`cp`."""
    target = self.folder / "target"
    return self._to_target(source, target, ["cp", option, source, target])

  def copy_to_disk(self, source: pathlib.Path) -> Run:
    """`cp -r`, and `sync`: the disk has it all then."""
    target = self.folder / "target"
    return self._to_target(source, target, ["sh", "-c", 'cp -r "$0" "$1" && sync', source, target])

  @contextlib.contextmanager
  def made(self, name: str, command: Sequence[Any], source: pathlib.Path | None = None) -> Iterator[Run]:
    """What a command takes to make the folder of this name, which is removed in the end."""
    if source:
      _warm(source)
    try:
      yield self._measure(command)
    finally:
      self._remove(name)

  @contextlib.contextmanager
  def _kept(self, name, *arguments, has_target=True):
    folder = self.folder / name
    first, *others = arguments
    with self.made(name, [sys.executable, _PROCESS, first, *([folder] if has_target else []), *others]) as run:
      if run.failure:
        raise NoCheckpointError(f"{name}: {run.failure}")
      yield folder

  def _to_target(self, source, target, command) -> Run:
    """Runs a command that makes the target, which is removed, finished or not."""
    _warm(source)
    try:
      run = self._measure(command)
      return dataclasses.replace(run, new=_new_bytes(source, target) if target.exists() else None)
    finally:
      self._remove(target.name)

  def _remove(self, name):
    """Removes a checkpoint, with what Orbax leaves of one that came to no end."""
    for path in self.folder.glob(f"{name}*"):
      shutil.rmtree(path)

  def _measure(self, command) -> Run:
    """Runs a command when what was written before has reached the disk, and ends it if it takes too much memory."""
    os.sync()
    log = self.folder / "output"
    with log.open("w") as output:
      begin = time.monotonic()
      process = subprocess.Popen([*map(str, command)], stdout=output, stderr=subprocess.STDOUT)
      guard = _Guard(process, self.memory_limit)
      os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
      seconds = time.monotonic() - begin
    guard.join()
    counts = _counts(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    lines = log.read_text().splitlines()
    if guard.rss:
      return Run(seconds, rss=guard.rss, failure=f"ended at {guard.rss / GIB:.1f} GiB")
    if process.returncode:
      return Run(seconds, failure=f"failed: {lines[-1] if lines else process.returncode}")
    if _PROCESS not in command:
      io = {"read": counts["rchar"], "disk_read": counts["read_bytes"], "written": counts["wchar"]}
      return Run(seconds, work=seconds, cpu=usage.ru_utime + usage.ru_stime, rss=usage.ru_maxrss * 1024, **io)
    told = json.loads(lines[-1])
    start = told.pop("began") - begin
    return Run(seconds, start, **told, said=lines[-2] if len(lines) > 1 else "")


def converter(
    source: pathlib.Path, target: pathlib.Path, *arguments: str, job: Sequence[str] = ("convert",)
) -> list[Any]:
  """The command of this converter, in one process or as another job of `measured_process` has it."""
  return [sys.executable, _PROCESS, *job, *_paths(source, target), *arguments]


class _Guard(threading.Thread):
  """Ends a process before it takes the machine down.

  Attributes:
    rss: what the process had when it was ended; 0 if it ended by itself.
  """

  def __init__(self, process, limit):
    super().__init__(daemon=True)
    self.rss = 0
    self._process, self._limit = process, limit
    self.start()

  def run(self):
    while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
      rss = _kib(f"/proc/{self._process.pid}/status", "VmRSS")
      if rss > self._limit or (rss > GIB and _kib("/proc/meminfo", "MemAvailable") < _MEMORY_TO_LEAVE):
        self._process.kill()
        self.rss = rss
        return
      time.sleep(_SECONDS_BETWEEN_LOOKS)


def _warm(source):
  """Reads all of a checkpoint, so that every run finds it in the page cache, as far as that holds it."""
  files = {path.stat().st_ino: path for path in source.rglob("*") if path.is_file()}
  for path in files.values():
    with path.open("rb", buffering=0) as file:
      while file.read(MIB):
        pass


def _kib(path, name) -> int:
  """A figure of kB that Linux gives, in bytes; 0 where it gives none any more."""
  found = re.search(rf"^{name}:\s+(\d+) kB", pathlib.Path(path).read_text(), re.MULTILINE)
  return int(found[1]) * 1024 if found else 0


def _counts(pid) -> dict[str, int]:
  """The input and output of a process that has ended and was not waited for."""
  lines = pathlib.Path(f"/proc/{pid}/io").read_text().splitlines()
  return {name: int(count) for name, count in (line.split(": ") for line in lines)}


def _new_bytes(source, target) -> int:
  files = lambda folder: (path.stat() for path in folder.rglob("*") if path.is_file())
  old = {(file.st_dev, file.st_ino) for file in files(source)}
  return sum(file.st_size for file in files(target) if (file.st_dev, file.st_ino) not in old)


def _paths(source, target) -> list[str]:
  return [f"--source_path={source}", f"--target_path={target}"]
