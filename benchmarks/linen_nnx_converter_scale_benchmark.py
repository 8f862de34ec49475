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


"""Measures what the other benchmark has no room for, each job's processes one at a time, and prints a table for each.

- `hosts`: DeepSeek-V3 671B with adamw, as 512 hosts write it, is inspected, planned, and converted by reference.

`--docs` has the tables put into performance.md.

usage: uv run benchmarks/linen_nnx_converter_scale_benchmark.py [--jobs=hosts] [--docs=docs]

Data is made in a temporary folder below `--scratch`, of which 8 GiB must be free. A process that takes more than
`--memory_limit_gib`, or nearly all that the machine has left, is ended, and its row says so.
"""

from collections.abc import Iterator
import pathlib
import tempfile

from absl import app
from absl import flags
import page
import report
import runs

_DOCS = flags.DEFINE_string("docs", None, "A folder whose performance.md gets the results.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Where to make data; unset, the system's temporary folder.")
_LIMIT = flags.DEFINE_float("memory_limit_gib", 20.0, "GiB of resident memory at which a process is ended.")

_HEADINGS = ("Job", "Way", *report.FIGURES)

Rows = Iterator[tuple[str, str, runs.Run]]


def hosts(scratch: runs.Scratch) -> Rows:
  """DeepSeek-V3 671B with adamw, of 512 hosts."""
  with scratch.source("deepseek3_data") as source:
    yield "inspect", "", scratch.inspect(source)
    yield "Linen -> NNX", "`--dry_run`", scratch.convert(source, "--dry_run")
    yield "Linen -> NNX", "by reference, not verified", scratch.convert(source, "--noverify")
    yield "Linen -> NNX", "by reference, verified", scratch.convert(source)
    yield "scanned -> unscanned", "`--dry_run`", scratch.convert(source, "--dry_run", "--scan_layers=False")


_JOBS = {"hosts": (hosts, ("Job", "Way", "Beyond start", "CPU s", "Peak RSS, MiB", "New, MiB"))}
_CHOSEN = flags.DEFINE_multi_enum("jobs", list(_JOBS), list(_JOBS), "Which to measure.")


def _measured(rows: Rows, columns) -> str:
  """The table of what rows take, and what the last dry run estimates."""
  machine, said = report.machine(), []

  def lines():
    for job, way, run in rows:
      said.append(run.said)
      yield job, way, *report.cells(run)

  measured, why = report.printed(_HEADINGS, lines())
  chosen = [[dict(zip(_HEADINGS, cells))[name] for name in columns] for cells in measured]
  costs = [text for text in said if text.startswith("cost: ")]
  return f"{machine}.\n\n{page.table([columns, *chosen])}{why}" + "".join(
      f"\n\nThe last one's {cost}" for cost in costs[-1:]
  )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown: {argv[1:]}")
  for name in dict.fromkeys(_CHOSEN.value):
    rows, columns = _JOBS[name]
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
      text = _measured(rows(runs.Scratch(pathlib.Path(folder), _LIMIT.value * runs.GIB)), columns)
    if _DOCS.value:
      report.write(pathlib.Path(_DOCS.value), name, text)


if __name__ == "__main__":
  app.run(main)
