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

"""Measures conversions beside the straightforward way and `cp`, each in a process of its own, and prints one table.

`--docs` has the figures that are compared put beside each other in performance.md.

usage: uv run --group bench benchmarks/linen_nnx_converter_benchmark.py [--gib=4] [--plot] [--docs=docs]

Data is made in a temporary folder below `--scratch` and removed as soon as no row needs it: three times the size of the
largest checkpoint must be free there. A process that takes more than `--memory_limit_gib`, or nearly all that the machine
has left, is ended, and its row says so.
"""

from collections.abc import Iterator, Sequence
import pathlib
import shutil
import tempfile
import time

from absl import app
from absl import flags
import page
import report
import runs

_GIB = flags.DEFINE_float("gib", 4.0, "GiB of the arrays of the large checkpoints.")
_SMALL_GIB = flags.DEFINE_float("small_gib", 1.0, "GiB of the arrays of the checkpoint of 20,000 leaves.")
_TABLE = flags.DEFINE_boolean("table", True, "Measure the table.")
_PLOT = flags.DEFINE_boolean("plot", False, "Measure and draw seconds and memory against size.")
_SIZES = flags.DEFINE_list("sizes", ["0.25", "1", "4", "16"], "GiB of the checkpoints of the plot.")
_DOCS = flags.DEFINE_string("docs", None, "A folder whose performance.md and performance.svg get the results.")
_SCRATCH = flags.DEFINE_string("scratch", None, "Where to make data; unset, the system's temporary folder.")
_LIMIT = flags.DEFINE_float("memory_limit_gib", 20.0, "GiB of resident memory at which a process is ended.")

# MiB of a scanned leaf, which is one chunk: as a device's shard may be, and as one host writes a whole leaf.
_CHUNK, _LARGE_CHUNK = 128, 512
_PIECE = 16  # MiB of the chunks that these are split into.
_SMALL = 1 / 64  # GiB of the checkpoint that Orbax opens and commits.
_COPIES = 3.0  # Of a checkpoint, that are on the disk at a time.

_HEADINGS = ("Job", "Way", *report.FIGURES, "Bound")
_UNSCANNED = "--scan_layers=False"
# What the converter is asked for, and the straightforward way.
_LAYERS = _UNSCANNED, {"scan_layers": False}
_PIECES = f"--chunk_byte_size={_PIECE * 2**20}", {"chunk_byte_size": _PIECE * 2**20}

Row = tuple[str, str, runs.Run, str]


def rows(scratch: runs.Scratch, gib: float, small_gib: float) -> Iterator[Row]:
  """The table: job, way, what it took, the bound that is to be reached."""
  yield "process start", "imports", scratch.start(), "2 s of start"
  leaves, commits = {"leaf_mib": _CHUNK * _SMALL / gib, "is_normal": False}, {}
  for is_scanned in (True, False):
    with scratch.source(gib=_SMALL, is_scanned=is_scanned, **leaves) as source:
      commits[is_scanned] = scratch.straightforward(source)
      kind = "scanned" if is_scanned else "unscanned"
      yield f"{_SMALL * 1024:g} MiB in as many leaves, {kind}: open and commit", "Orbax", commits[is_scanned], ""
  yield from _large_rows(scratch, gib, commits, is_normal=False)
  yield from _large_rows(scratch, gib, commits, is_normal=True)
  size = f"{gib:g} GiB random"
  with scratch.source(gib=gib, is_scanned=True, leaf_mib=_LARGE_CHUNK, is_normal=False) as source:
    yield from _streamed(scratch, source, f"{size}: scanned in {_LARGE_CHUNK} MiB chunks -> unscanned", *_LAYERS)
  with scratch.source(gib=small_gib, is_scanned=False, leaf_mib=0, is_normal=False) as source:
    yield from _small_rows(scratch, source, f"{small_gib:g} GiB in 20,000 leaves")


def _large_rows(scratch, gib, commits, *, is_normal) -> Iterator[Row]:
  """The jobs of checkpoints of few large leaves."""
  size = f"{gib:g} GiB {'normal' if is_normal else 'random'}"
  with scratch.source(gib=gib, is_scanned=True, leaf_mib=_CHUNK, is_normal=is_normal) as source:
    job = f"{size}: Linen -> NNX, scanned"
    yield from _by_reference(scratch, source, job, commits[True])
    yield job, "link, --verify=full", scratch.convert(source, "--verify=full"), ""
    if not is_normal:
      with scratch.converted(source) as nnx:
        yield from _by_reference(scratch, nnx, f"{size}: NNX -> Linen, scanned", commits[True])
    yield from _params_only(scratch, source, size)
    job = f"{size}: scanned in {_CHUNK} MiB chunks -> unscanned"
    yield from _streamed(scratch, source, job, *_LAYERS)
    yield job, "decoding alone", scratch.decode(source), ""
    yield job, "encoding alone", scratch.encode(source), ""
    yield from _streamed(scratch, source, f"{size}: {_CHUNK} MiB chunks -> {_PIECE} MiB chunks", *_PIECES)
  with scratch.source(gib=gib, is_scanned=False, leaf_mib=_CHUNK, is_normal=is_normal) as source:
    yield from _by_reference(scratch, source, f"{size}: unscanned -> scanned", commits[False])
    with scratch.converted(source) as stacked:
      job = f"{size}: scanned in chunks of one layer -> unscanned"
      back = (_UNSCANNED, "--direction=nnx_to_linen")
      yield from _by_reference(scratch, stacked, job, commits[False], *back, scan_layers=False)


def _by_reference(scratch, source, job, commit, *arguments, **options) -> Iterator[Row]:
  """What only names change for: linked and copied, each beside what `cp` takes for it."""
  yield job, "straightforward", scratch.straightforward(source, **options), ""
  links = scratch.copy(source, "-al")
  yield job, "cp -al", links, ""
  bound = f"{min(1.0, 1.5 * links.seconds + commit.work):.2f} s beyond start, 300 MiB" if commit.work else ""
  yield job, "link, verified", scratch.convert(source, *arguments), bound
  yield job, "link, not verified", scratch.convert(source, *arguments, "--noverify"), bound
  copies = scratch.copy(source, "-r")
  yield job, "cp -r", copies, ""
  yield job, "cp -r, sync", scratch.copy_to_disk(source), ""
  bound = f"{1.3 * copies.seconds:.2f} s beyond start"
  yield job, "copy, verified", scratch.convert(source, *arguments, "--copy_mode=copy"), ""
  yield job, "copy, not verified", scratch.convert(source, *arguments, "--copy_mode=copy", "--noverify"), bound


def _params_only(scratch, source, size) -> Iterator[Row]:
  """A third of the bytes. The target is not to bring along the optimizer's, which are in the same data files."""
  job = f"{size}: params alone"
  streamed = scratch.convert(source, "--params_only", _UNSCANNED)
  yield f"{job}, scanned -> unscanned", "streamed, verified", streamed, ""
  raw = scratch.convert(source, "--params_only")
  way = "raw" if "iB raw" in raw.said else "link"  # Which data files hold what is not the same in each run.
  yield job, f"{way}, verified", raw, f"{streamed.work / 2:.2f} s, half of streamed" if streamed.work else ""


def _streamed(scratch, source, job, argument, options) -> Iterator[Row]:
  """What must be decoded. There is nothing to link: link and copy are one."""
  straight = scratch.straightforward(source, **options)
  yield job, "straightforward", straight, ""
  bound = f"{straight.seconds:.1f} s, {straight.rss / runs.MIB / 10:,.0f} MiB" if straight.rss else ""
  yield job, "streamed, not verified", scratch.convert(source, argument, "--noverify"), bound
  yield job, "streamed, verified", scratch.convert(source, argument), ""


def _small_rows(scratch, source, size) -> Iterator[Row]:
  yield size, "cp -al", scratch.copy(source, "-al"), ""
  yield size, "cp -r", scratch.copy(source, "-r"), ""
  job = f"{size}: Linen -> NNX, unscanned"
  yield job, "straightforward", scratch.straightforward(source, scan_layers=False), ""
  yield job, "link, verified", scratch.convert(source, _UNSCANNED), "20 s"
  yield job, "copy, verified", scratch.convert(source, _UNSCANNED, "--copy_mode=copy"), "20 s"
  yield f"{size}: unscanned -> scanned", "link, verified", scratch.convert(source), "20 s"


def sizes(scratch: runs.Scratch, gibs: Sequence[float]) -> Iterator[tuple[str, float, runs.Run]]:
  """The plot: way, GiB, what it took."""
  for gib in gibs:
    with scratch.source(gib=gib, is_scanned=True, leaf_mib=_CHUNK, is_normal=False) as source:
      yield "by reference: Linen -> NNX, scanned", gib, scratch.convert(source)
      yield "straightforward: Linen -> NNX, scanned", gib, scratch.straightforward(source)
      yield "streamed: scanned -> unscanned", gib, scratch.convert(source, _UNSCANNED)
      yield "straightforward: scanned -> unscanned", gib, scratch.straightforward(source, scan_layers=False)


def _measured_table(scratch) -> str:
  machine, begin = report.machine(), time.monotonic()
  lines = ((job, way, *report.cells(run), bound) for job, way, run, bound in rows(scratch, _GIB.value, _SMALL_GIB.value))
  measured, why = report.printed(_HEADINGS, lines)
  minutes = f"{(time.monotonic() - begin) / 60:.0f} minutes"
  return f"{machine}; all rows in one run of {minutes}.\n\n{page.tables(_HEADINGS, measured)}{why}"


def _measured_plot(scratch, path: pathlib.Path) -> str:
  import plot  # pylint: disable=import-outside-toplevel  # It needs the dependency group `bench`.

  machine, gibs, curves = report.machine(), [float(size) for size in _SIZES.value], {}

  def lines():
    for way, gib, run in sizes(scratch, gibs):
      curves.setdefault(way, []).append(run)
      yield f"{gib:g} GiB", way, *report.cells(run)

  headings = ("Size", *_HEADINGS[1:-1])
  measured, why = report.printed(headings, lines())
  plot.draw(path, gibs, curves)
  return f"![Seconds and memory against size]({path.name})\n\n{machine}.\n\n{page.by_size(headings, measured)}{why}"


def _check_room(folder: str):
  needed = _COPIES * max([_GIB.value * _TABLE.value, *(float(size) for size in _SIZES.value if _PLOT.value)]) * runs.GIB
  free = shutil.disk_usage(folder).free
  if free < needed:
    raise app.UsageError(
        f"{folder} has {free / runs.GIB:.0f} GiB free, {needed / runs.GIB:.0f} are needed: see --scratch."
    )


def main(argv):
  if len(argv) > 1:
    raise app.UsageError(f"unknown: {argv[1:]}")
  docs = pathlib.Path(_DOCS.value) if _DOCS.value else None
  with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
    _check_room(folder)
    scratch = runs.Scratch(pathlib.Path(folder), _LIMIT.value * runs.GIB)
    if _TABLE.value:
      text = _measured_table(scratch)
      if docs:
        report.write(docs, "table", text)
    if _PLOT.value:
      text = _measured_plot(scratch, (docs or pathlib.Path.cwd()) / "performance.svg")
      if docs:
        report.write(docs, "plot", text)


if __name__ == "__main__":
  app.run(main)
