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

"""The tables of performance.md: a row for each job, beside each other the ways that are compared."""

from collections.abc import Iterable, Iterator, Mapping, Sequence

SECONDS, CPU, RSS, NEW = "Beyond start", "CPU s", "Peak RSS, MiB", "New, MiB"

# The heading of each column, the way that it is of, and which of its figures it has.
Columns = Sequence[tuple[str, str, str]]
_BY_REFERENCE: Columns = (
    ("Linked, s", "link, verified", SECONDS),
    ("not verified", "link, not verified", SECONDS),
    ("`--verify=full`", "link, --verify=full", SECONDS),
    ("Linked, MiB", "link, verified", RSS),
    ("New, MiB", "link, verified", NEW),
    ("Straightforward, s", "straightforward", SECONDS),
    ("MiB", "straightforward", RSS),
    ("Copied, s", "copy, verified", SECONDS),
    ("not verified", "copy, not verified", SECONDS),
    ("`cp -r`, s", "cp -r", SECONDS),
    ("with `sync`", "cp -r, sync", SECONDS),
)
_STREAMED: Columns = (
    ("Streamed, s", "streamed, verified", SECONDS),
    ("not verified", "streamed, not verified", SECONDS),
    ("its MiB", "streamed, not verified", RSS),
    ("its CPU s, all", "streamed, not verified", CPU),
    ("Straightforward, s", "straightforward", SECONDS),
    ("MiB", "straightforward", RSS),
    ("Decoding, s", "decoding alone", SECONDS),
    ("Encoding, s", "encoding alone", SECONDS),
)
_OTHERS = ("Job", "Way", "Seconds", "Start", SECONDS, RSS, "Bound")

Jobs = dict[str, dict[str, Mapping[str, str]]]


def tables(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """The tables of the benchmark's lines: of what is linked, of what is streamed, and of the rest, without `cp`."""
  jobs = _jobs(headings, lines)
  linked = {job: ways for job, ways in jobs.items() if "link, not verified" in ways}
  streamed = {job: ways for job, ways in jobs.items() if "streamed, not verified" in ways}
  others = [figures for job, ways in jobs.items() if job not in linked | streamed for figures in ways.values()]
  rest = [[figures[name] for name in _OTHERS] for figures in others if not figures["Way"].startswith("cp ")]
  return "\n\n".join((_pivoted(linked, _BY_REFERENCE), _pivoted(streamed, _STREAMED), table([_OTHERS, *rest])))


def by_size(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """The table of the plot: a row for each size, seconds and memory for each way."""
  sizes = _jobs(headings, lines)
  ways = dict.fromkeys(way for each in sizes.values() for way in each)
  columns = [column for way in ways for column in ((f"{way}, s", way, SECONDS), ("MiB", way, RSS))]
  return _pivoted(sizes, columns, headings[0])


def table(lines: Iterable[Sequence[str]]) -> str:
  """Markdown of lines of cells, of which the first are the headings."""
  first, *others = (f"| {' | '.join(cells)} |" for cells in lines)
  return "\n".join((first, "|" + "---|" * (first.count("|") - 1), *others))


def _jobs(headings, lines) -> Jobs:
  jobs: Jobs = {}
  for line in lines:
    jobs.setdefault(line[0], {})[line[1]] = dict(zip(headings, line))
  return jobs


def _pivoted(jobs: Jobs, columns: Columns, first: str = "Job") -> str:
  headings = [first, *(heading for heading, _, _ in columns)]
  return table([headings, *([job, *_cells(ways, columns)] for job, ways in jobs.items())])


def _cells(ways, columns) -> Iterator[str]:
  for _, way, name in columns:
    figures = ways.get(way, {})
    is_ended = name == SECONDS and figures and not figures[name]  # Its seconds say how.
    yield figures["Seconds"] if is_ended else figures.get(name, "")
