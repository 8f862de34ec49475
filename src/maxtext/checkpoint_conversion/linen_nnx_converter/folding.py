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

"""Long lists and large numbers for a person: lines that differ only in numbers become one, as `layers_0…31`."""

from collections.abc import Iterable, Iterator
import re

# Alone between slashes, brackets or spaces, or after an underscore; with leading zeros it is a name.
_NUMBER = re.compile(r"(?:(?<![\w.])|(?<=_))(?:0|[1-9]\d*)(?![\w.])")


def fold(lines: Iterable[str]) -> Iterator[str]:
  """The lines, in the order of the first of each kind.

  Lines become one if they differ in one number only, or in several at constant distances, such as a layer's number in a
  path and its index, and if these numbers are consecutive. So `0…3` is four lines.
  """
  kinds = {}
  for line in lines:
    kinds.setdefault(tuple(_NUMBER.split(line)), []).append(tuple(map(int, _NUMBER.findall(line))))
  for texts, rows in kinds.items():
    for numbers in _ranges(rows):
      yield "".join(part for pair in zip(texts, [*numbers, ""]) for part in pair)


def _ranges(rows: list[tuple[int, ...]]) -> Iterator[list[str]]:
  """The numbers of lines that differ only in numbers, with those that rise together as `first…last`."""
  columns = list(zip(*rows))
  at = next((number for number, column in enumerate(columns) if len(set(column)) > 1), None)
  if at is None:
    yield from ([str(number) for number in row] for row in rows)
    return
  together = [len({number - of for number, of in zip(column, columns[at])}) == 1 for column in columns]
  groups = {}
  for row in rows:
    groups.setdefault(tuple(number for number, moves in zip(row, together) if not moves), []).append(row)
  for group in map(sorted, groups.values()):  # Trees have `10` before `2`.
    first, last = group[0], group[-1]
    steps = [row[at] - first[at] for row in group]
    if len(group) == 1 or steps != list(range(len(group))):
      yield from ([str(number) for number in row] for row in group)
    else:
      yield [f"{a}…{b}" if moves else str(a) for a, b, moves in zip(first, last, together)]


def size(nbytes: float) -> str:
  """A number of bytes."""
  for unit, power in (("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)):
    if nbytes >= 2**power:
      return f"{nbytes / 2**power:,.1f} {unit}"
  return count(int(nbytes), "byte")


def count(number: int, one: str, more: str = "") -> str:
  """A number of things."""
  return f"{number:,} {one if number == 1 else more or one + 's'}"
