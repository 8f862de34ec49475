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

"""Counts what conversions ask of Google Cloud Storage, beside copies of the same files, and prints one table.

An emulator on loopback stands in for it, which lets each request take a while, as a network does. What is counted is what
Google would be asked; the seconds are of that while alone, for an emulator has no bandwidth to speak of.

usage: uv run benchmarks/linen_nnx_converter_cloud_benchmark.py [--mib=256] [--milliseconds=30] [--docs=docs]
"""

from collections.abc import Iterator
import os
import pathlib
import re
import sys
import tempfile

from absl import app
from absl import flags
import checkpoint_data
import page
import report
import runs

sys.path.append(os.fspath(pathlib.Path(__file__).parents[1] / "tests" / "unit"))
import linen_nnx_converter_cloud as cloud_lib  # noqa: E402  pylint: disable=wrong-import-position

_MIB = flags.DEFINE_integer("mib", 256, "MiB of the arrays of the checkpoints.")
_MILLISECONDS = flags.DEFINE_integer("milliseconds", 30, "How long each request takes at least.")
_DOCS = flags.DEFINE_string("docs", None, "A folder whose performance.md gets the table.")

_HEADINGS = ("Job", "Way", "Requests", "`--dry_run` said", "List", "Stat", "Read", "Upload", "Copy", "Delete")
_SIZES = ("Read, MiB", "Written, MiB", "Copied, MiB", "At once", "Beyond start, s")
_LEAF_MIB = 16  # Of a scanned leaf, which is one chunk.
_PLAIN = ("--direction=nnx_to_nnx", "--nnx_values=plain")
_UNSCANNED = ("--direction=nnx_to_nnx", "--scan_layers=False")

Line = tuple[str, ...]


class Counter:
  """Runs jobs in processes of their own, each to a new place, and counts what they ask for."""

  def __init__(self, cloud: cloud_lib.Cloud, scratch: runs.Scratch):
    self._cloud, self._scratch, self._number = cloud, scratch, 0

  def run(self, job: str, way: str, source: object, target: str, *arguments: str) -> Line:
    """A line of the table. `target` is `gs://bucket/` or a folder, in which a new one is made."""
    self._number += 1
    place = f"{target}{self._number}"
    of = (
        (f"--source_path={source}", f"--target_path={place}", *arguments)
        if way == "convert"
        else (source, place, *arguments)
    )
    said = self._scratch.run(way, *of, "--dry_run").said if way == "convert" else ""
    estimate = re.search("about ([0-9,]+) requests", said)
    with self._cloud.counted() as count:
      run = self._scratch.run(way, *map(str, of))
    if run.failure:
      raise runs.NoCheckpointError(f"{job}, {way}: {run.failure}")
    kinds = (cloud_lib.LIST, cloud_lib.STAT, cloud_lib.READ, cloud_lib.UPLOAD, cloud_lib.COPY, cloud_lib.DELETE)
    sizes = (f"{count.nbytes[kind] / runs.MIB:,.1f}" for kind in (cloud_lib.READ, cloud_lib.UPLOAD, cloud_lib.COPY))
    numbers = (f"{count.requests[kind]:,}" for kind in kinds)
    total = f"{sum(count.requests.values()):,}"
    name = {"convert": "not verified" if "--noverify" in arguments else "verified", "copy": "files copied"}.get(way, way)
    seconds = f"{run.work:.1f}"
    return job, name, total, estimate[1] if estimate else "", *numbers, *sizes, str(count.most_at_once), seconds


def lines(counter: Counter, folder: pathlib.Path) -> Iterator[Line]:
  """The table."""
  local, there, nnx = folder / "linen", "gs://bucket/", "gs://bucket/4"  # What the fourth run makes.
  job = "local Linen -> NNX there, by reference"
  yield counter.run(job, "copy", local, there)
  yield counter.run(job, "straightforward", local, there, "{}")
  yield counter.run(job, "convert", local, there)
  yield counter.run(job, "convert", local, there, "--noverify")
  job = "there, boxed -> plain NNX, by reference"
  yield counter.run(job, "copy", nnx, there)
  yield counter.run(job, "convert", nnx, there, *_PLAIN)
  yield counter.run(job, "convert", nnx, there, *_PLAIN, "--noverify")
  job = "there, the same, raw"
  yield counter.run(job, "convert", nnx, there, *_PLAIN, f"--target_data_file_size={2**30}")
  job = "there, scanned -> unscanned, streamed"
  yield counter.run(job, "convert", nnx, there, *_UNSCANNED)
  yield counter.run(job, "convert", nnx, there, *_UNSCANNED, "--noverify")
  job = "NNX there -> local Linen, copied"
  yield counter.run(job, "copy", nnx, f"{folder}/")
  yield counter.run(job, "straightforward", nnx, f"{folder}/", "{}")
  yield counter.run(job, "convert", nnx, f"{folder}/")


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown: {argv[1:]}")
  # A cloud of so many milliseconds; making the checkpoint asks it for nothing.
  cloud = cloud_lib.Cloud(seconds=_MILLISECONDS.value / 1000)
  with tempfile.TemporaryDirectory() as name, cloud.serving():
    folder = pathlib.Path(name)
    checkpoint_data.save(folder / "linen", gib=_MIB.value / 1024, is_scanned=True, leaf_mib=_LEAF_MIB, is_normal=True)
    counter, found = Counter(cloud, runs.Scratch(folder, 16 * runs.GIB)), []
    print(page.table([_HEADINGS + _SIZES]), flush=True)
    for line in lines(counter, folder):
      found.append(line)
      print(f"| {' | '.join(line)} |", flush=True)
  if _DOCS.value:
    told = f"{_MIB.value} MiB in chunks of {_LEAF_MIB} MiB, at least {_MILLISECONDS.value} ms a request."
    report.write(pathlib.Path(_DOCS.value), "cloud", f"{told}\n\n{page.table([_HEADINGS + _SIZES, *found])}")


if __name__ == "__main__":
  app.run(main)
