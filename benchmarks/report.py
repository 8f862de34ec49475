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


"""What the benchmarks print, and write into performance.md: the figures of runs, and what they were measured on."""

from collections.abc import Iterable, Iterator, Sequence
import datetime
import importlib.metadata
import os
import pathlib
import platform
import re

import page
import runs

FIGURES = (
    "Seconds",
    "Start",
    "Beyond start",
    "CPU s",
    "Peak RSS, MiB",
    "Read, MiB",
    "From disk, MiB",
    "Written, MiB",
    "New, MiB",
)


def cells(run: runs.Run) -> Iterator[str]:
  """The figures of a row."""
  number = lambda value, digits, unit=1: "" if value is None else f"{value / unit:,.{digits}f}"
  yield f"{run.seconds:.2f}: {run.failure}" if run.failure else f"{run.seconds:.2f}"
  yield number(run.start, 2)
  yield number(run.work, 2)
  yield number(run.cpu, 1)
  yield number(run.rss, 0, runs.MIB)
  yield number(run.read, 0, runs.MIB)
  yield number(run.disk_read, 0, runs.MIB)
  yield number(run.written, 0, runs.MIB)
  yield number(run.new, 2, runs.MIB)


def printed(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> tuple[list[Sequence[str]], str]:
  """The lines, each printed as soon as it is there, and why there are no more if a checkpoint cannot be made."""
  print(page.table([headings]), flush=True)
  measured = []
  try:
    for cells in lines:
      measured.append(cells)
      print(f"| {' | '.join(cells)} |", flush=True)
  except runs.NoCheckpointError as e:
    print(why := f"\n\nNothing more was measured: {e}.", flush=True)
    return measured, why
  return measured, ""


def machine() -> str:
  """What it was measured on."""
  cpu = re.search(r"model name\s*: (.*)", pathlib.Path("/proc/cpuinfo").read_text())
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / runs.GIB
  versions = [f"{name} {importlib.metadata.version(name)}" for name in ("orbax-checkpoint", "tensorstore", "jax")]
  return (
      f"{datetime.date.today()}, {os.cpu_count()} cores ({cpu[1] if cpu else platform.machine()}), "
      f"{memory:.0f} GiB of memory, load {os.getloadavg()[0]:.1f} before,\n"
      f"Python {platform.python_version()}, {', '.join(versions)}"
  )


def write(docs: pathlib.Path, mark: str, text: str):
  """Puts text between two marks of performance.md."""
  path = docs / "performance.md"
  begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
  before, _, rest = path.read_text().partition(begin)
  path.write_text(f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")
