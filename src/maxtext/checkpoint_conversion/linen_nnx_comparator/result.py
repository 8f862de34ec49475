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

"""What a comparison found, for every leaf."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_comparator import align
from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference

Path = canonical.Path

# What a leaf may be, beside what `align` says of its structure.
EQUAL, WITHIN, DIFFERENT, UNREADABLE = "equal", "within tolerance", "different", "unreadable"

_IN_ORDER = (EQUAL, WITHIN, DIFFERENT, align.ONLY_A, align.ONLY_B, align.SHAPE, align.DTYPE, align.KEY, align.KIND)


@dataclasses.dataclass(frozen=True)
class Side:
  """One of the two checkpoints.

  Attributes:
    path: the folder of its pytree.
    layout: what the converter calls its layout.
    is_scanned: whether it has scanned layers.
  """

  path: str
  layout: str
  is_scanned: bool

  def __str__(self) -> str:
    return f"{self.path}  ({self.layout}, {'scanned' if self.is_scanned else 'not scanned'})"


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What was found of one leaf.

  Attributes:
    aligned: the leaf on both sides, and how its structure differs.
    found: how its values differ; None where they could not be compared.
    failure: why it could not be read, or None.
  """

  aligned: align.Aligned
  found: difference.Difference | None = None
  failure: str | None = None

  @property
  def path(self) -> str:
    return "/".join(self.aligned.path)

  @property
  def values(self) -> difference.Difference:
    """How the values differ, of a leaf whose values were compared."""
    assert self.found is not None, self.path
    return self.found

  @property
  def part(self) -> str:
    leaf = self.aligned.a or self.aligned.b
    assert leaf is not None
    return leaf.part

  @property
  def status(self) -> str:
    """`equal`, `within tolerance`, `different`, `unreadable`, or how the structure differs."""
    if self.failure:
      return UNREADABLE
    if self.aligned.structure:
      return self.aligned.structure
    if not self.values.differing:
      return EQUAL
    return DIFFERENT if self.values.outside else WITHIN

  @property
  def is_accepted(self) -> bool:
    return self.status in (EQUAL, WITHIN)

  @property
  def badness(self) -> tuple[float, ...]:
    """A key that sorts leaves from the least to the worst.

    A leaf that is missing, of another structure or unreadable is worse than values that differ; among these, one that has
    NaNs or infinities on one side only; then the largest relative difference counts, then the share of its elements.
    """
    if self.status in (EQUAL, UNREADABLE) or self.found is None:
      return (0.0,) if self.status == EQUAL else (4.0,)
    found = self.found
    relative = found.largest_relative.value if found.largest_relative else 0.0
    rank = 3.0 if self.aligned.structure else 1.0 + (self.status == DIFFERENT)
    return (rank, float(found.not_finite > 0), relative, found.differing / max(1, found.elements))


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What was found of two checkpoints.

  Attributes:
    a: the first checkpoint.
    b: the second.
    leaves: every leaf of either, in the order of A's.
    left_out: of A and of B, the leaves that were not asked for, by path, with the reason.
    tolerance: what values were allowed to differ by; None where any bit counts.
    notes: what is to be known about how they were compared.
    seconds: how long it took.
  """

  a: Side
  b: Side
  leaves: Sequence[Outcome]
  left_out: Sequence[Mapping[Path, str]] = ({}, {})
  tolerance: difference.Tolerance | None = None
  notes: Sequence[str] = ()
  seconds: float = 0.0

  @property
  def is_accepted(self) -> bool:
    """Whether structure and values agree: to the bit, or within the tolerance if there is one."""
    return all(outcome.is_accepted for outcome in self.leaves)

  def worst_first(self) -> list[Outcome]:
    """The leaves that are not equal, the worst first."""
    unequal = [outcome for outcome in self.leaves if outcome.status != EQUAL]
    return sorted(unequal, key=lambda outcome: outcome.badness, reverse=True)

  def counts(self, part: str | None = None) -> dict[str, int]:
    """How many leaves have each status, of one part of the state or of all."""
    return count(outcome for outcome in self.leaves if part in (None, outcome.part))

  def elements(self) -> tuple[int, int]:
    """How many elements differ, and how many were compared."""
    found = [outcome.found for outcome in self.leaves if outcome.found is not None]
    return sum(value.differing for value in found), sum(value.elements for value in found)


def count(outcomes: Iterable[Outcome]) -> dict[str, int]:
  """How many leaves have each status, in a fixed order."""
  found = collections.Counter(outcome.status for outcome in outcomes)
  return {status: found[status] for status in (*_IN_ORDER, UNREADABLE) if found[status]}
