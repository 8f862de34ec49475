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

"""What is said of every model: a row for those that fare alike, and the reasons below."""

from collections.abc import Iterator, Sequence
import dataclasses
import textwrap

FACTS = ("Model", "Decoder", "Layers", "Params", "Leaves, scanned", "Unscanned")


@dataclasses.dataclass(frozen=True)
class Checked:
  """What came of a model.

  Attributes:
    facts: what it is, a cell for each of `FACTS`.
    verdicts: a cell for each check.
    notes: of each reason, which states or checks it is the reason of.
  """

  facts: tuple[str, ...]
  verdicts: tuple[str, ...]
  notes: dict[str, tuple[str, ...]]


def page(results: Sequence[Checked]) -> Iterator[str]:
  """The lines of the table, a row for the models that fare alike, and of the notes."""
  alike, notes = {("ok",): []}, {}
  for each in results:
    verdicts = each.verdicts if len(set(each.verdicts)) > 1 else each.verdicts[:1]
    alike.setdefault(verdicts, []).append(each.facts[0])
    for reason, which in each.notes.items():
      notes.setdefault((which, reason), []).append(each.facts[0])
  yield line(("Results", "Models"))
  yield "|---|---|"
  for verdicts, models in alike.items():
    yield line((", ".join(verdicts), ", ".join(models)))
  yield ""
  for (which, reason), models in notes.items():
    note = f"- {', '.join(models)} ({', '.join(which)}): {reason}"
    yield from textwrap.wrap(note, 118, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def line(cells: Sequence[str]) -> str:
  return f"| {' | '.join(cells)} |"
