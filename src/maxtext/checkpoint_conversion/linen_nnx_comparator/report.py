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

"""What a comparison found of two checkpoints, and the report of it: for a person, and as JSON."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
import dataclasses
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference

Path = alignment.Path
Pair = alignment.Pair

# How a leaf is shown, by what `grade` says of it.
GRADES = ("equal", "near", "far", "structure")
_COLORS = {"equal": "32", "near": "33", "far": "31", "structure": "35"}
_NEAR_ULP = 4  # Up to here values are apart as rounding sets them apart.


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What was found of two checkpoints.

  Attributes:
    a: the canonical tree of the first checkpoint.
    b: that of the second.
    leaves: every leaf of either, in the order of A's.
    tolerance: what values were allowed to differ by; None where any bit counts.
    notes: what is to be known about how they were compared.
    seconds: how long it took.
  """

  a: alignment.Tree
  b: alignment.Tree
  leaves: Sequence[Pair]
  tolerance: difference.Tolerance | None = None
  notes: Sequence[str] = ()
  seconds: float = 0.0

  @property
  def is_accepted(self) -> bool:
    """Whether structure and values agree: to the bit, or within the tolerance if there is one."""
    return all(pair.status in (alignment.EQUAL, alignment.WITHIN) for pair in self.leaves)

  @property
  def grade(self) -> str:
    """The grade of all: `equal`, `near` or `far`."""
    return "far" if not self.is_accepted else "near" if self.worst_first() else "equal"

  def worst_first(self) -> list[Pair]:
    """The leaves that are not equal, the worst first."""
    unequal = [pair for pair in self.leaves if pair.status != alignment.EQUAL]
    return sorted(unequal, key=lambda pair: pair.badness, reverse=True)

  def counts(self, part: str | None = None) -> dict[str, int]:
    """How many leaves have each status, of one part of the state or of all."""
    return count(pair for pair in self.leaves if part in (None, pair.part))

  def by_part(self) -> dict[str, dict[str, int]]:
    """The same of each part that has leaves."""
    return {part: counts for part in alignment.PARTS if (counts := self.counts(part))}

  def elements(self) -> tuple[int, int]:
    """How many elements differ, and how many were compared."""
    return sum(pair.values.differing for pair in self.leaves), sum(pair.values.elements for pair in self.leaves)


def count(pairs: Iterable[Pair]) -> dict[str, int]:
  """How many leaves have each status, in a fixed order."""
  found = collections.Counter(pair.status for pair in pairs)
  return {status: found[status] for status in alignment.STATUSES if found[status]}


def grade(pair: Pair) -> str:
  """`equal`; `near`, within the tolerance or a few units in the last place; `far`; or `structure`."""
  if pair.status == alignment.EQUAL:
    return "equal"
  if pair.status not in (alignment.WITHIN, alignment.DIFFERENT):
    return "structure"
  found = pair.values
  is_rounding = found.largest_ulp is not None and found.largest_ulp.value <= _NEAR_ULP and not found.not_finite
  return "near" if pair.status == alignment.WITHIN or is_rounding else "far"


def worst(pairs: Iterable[Pair]) -> Pair:
  """The worst of these leaves."""
  return max(pairs, key=lambda pair: pair.badness)


def branches(pairs: Iterable[Pair], depth: int) -> list[tuple[str, list[Pair]]]:
  """The tree of names at this depth of the paths: each name with the leaves that it leads to, the worst first.

  A leaf has a branch of its own, which `is_leaf`. Equal branches keep their order.
  """
  found = {}
  for pair in pairs:
    found.setdefault((pair.keys[depth], is_leaf([pair], depth)), []).append(pair)
  named = [(name, below) for (name, _), below in found.items()]
  return sorted(named, key=lambda branch: worst(branch[1]).badness, reverse=True)


def is_leaf(below: Sequence[Pair], depth: int) -> bool:
  """Whether a branch at this depth is a leaf."""
  return len(below[0].keys) == depth + 1


def lines(comparison: Comparison, *, color: bool, most_leaves: int) -> Iterator[str]:
  """The report for a person: both checkpoints, the worst leaves, the tree, a line for each part, and the summary.

  Args:
    comparison: what was found.
    color: whether to colour it with ANSI escapes.
    most_leaves: how many leaves to show whose structure differs, and how many whose values do; the others are counted.
  """
  paint = (lambda text, kind: f"\033[{_COLORS[kind]}m{text}\033[0m") if color else (lambda text, _: text)
  yield f"A  {comparison.a}"
  yield f"B  {comparison.b}"
  yield from (f"note: {note}" for note in comparison.notes)
  for side, tree in (("A", comparison.a), ("B", comparison.b)):
    if tree.left_out:
      yield f"left out of {side}: {len(tree.left_out)} leaves ({', '.join(sorted(set(tree.left_out.values())))})"
  shown = set()
  for title, pairs in of_structure_and_values(comparison):
    yield ""
    yield f"{title}, worst first" + (f", {most_leaves} of {len(pairs):,}" if len(pairs) > most_leaves else "")
    for pair in pairs[:most_leaves]:
      shown.add(pair.keys)
      yield "  " + paint(f"{pair.path}  {detail(pair)}", grade(pair))
  yield ""
  yield from _tree_lines(comparison.leaves, 0, shown, paint)
  yield ""
  yield from (f"{part:<10} {counted(counts)}" for part, counts in comparison.by_part().items())
  yield paint(summary(comparison), comparison.grade)


def of_structure_and_values(comparison: Comparison) -> Iterator[tuple[str, list[Pair]]]:
  """The leaves whose structure differs and those whose values do, under these titles, so that neither hides the other."""
  unequal = comparison.worst_first()
  for title, is_wanted in (("structure", True), ("values", False)):
    if some := [pair for pair in unequal if (grade(pair) == "structure") == is_wanted]:
      yield title, some


def detail(pair: Pair) -> str:
  """What was found of a leaf, in one line."""
  if pair.a is None or pair.b is None:
    return f"{pair.status}: {pair.a or pair.b}"
  if pair.failure:
    return f"{pair.status}: {pair.failure}"
  head = f"{pair.a}" if pair.structure is None else f"{pair.status}: {pair.a} in A, {pair.b} in B"
  return f"{head}  {_values_line(pair.values)}" if pair.has_values else head


def short(pair: Pair) -> str:
  """What was found of a leaf, in a few words."""
  if pair.status not in (alignment.WITHIN, alignment.DIFFERENT):
    return pair.status
  found = pair.values
  largest = [f"{name} {_number(it.value)}" for name, it in _largest(found)]
  return ", ".join((f"{found.differing:,} of {found.elements:,}", *largest))


def summary(comparison: Comparison) -> str:
  """One line for a person."""
  differing, elements = comparison.elements()
  counts = comparison.counts()
  verdict = "equal to the bit" if set(counts) <= {alignment.EQUAL} else "equal within the tolerance"
  if not comparison.is_accepted:
    verdict = "different"
  return (
      f"{verdict}: {len(comparison.leaves):,} leaves ({counted(counts)}), {differing:,} of {elements:,} elements differ, "
      f"in {comparison.seconds:.1f} s"
  )


def counted(counts: Mapping[str, int]) -> str:
  """Numbers of leaves by status, as text."""
  return ", ".join(f"{count:,} {status}" for status, count in counts.items())


def as_json(comparison: Comparison) -> dict[str, Any]:
  """The report as a JSON document. Leaves that are equal are in it too, with their number of elements."""
  differing, elements = comparison.elements()
  sides = (("a", comparison.a), ("b", comparison.b))
  equal = [pair for pair in comparison.leaves if pair.status == alignment.EQUAL]
  return {
      "accepted": comparison.is_accepted,
      "summary": summary(comparison),
      **{name: {field: getattr(tree, field) for field in ("path", "layout", "is_scanned")} for name, tree in sides},
      "tolerance": dataclasses.asdict(comparison.tolerance) if comparison.tolerance else None,
      "notes": list(comparison.notes),
      "left_out": [{"/".join(path): reason for path, reason in tree.left_out.items()} for _, tree in sides],
      "leaves": len(comparison.leaves),
      "elements": elements,
      "differing": differing,
      "by_part": comparison.by_part(),
      "worst_first": [_json_leaf(pair) for pair in comparison.worst_first()],
      "equal": {pair.path: pair.values.elements for pair in equal},
      "seconds": round(comparison.seconds, 3),
  }


def _tree_lines(pairs: Iterable[Pair], depth: int, shown: Set[Path], paint: Callable[[str, str], str]) -> Iterator[str]:
  """The tree of names, down to the leaves that are shown; the rest is counted where it branches off."""
  indent, hidden = "  " * depth, []
  for name, below in branches(pairs, depth):
    mark = grade(worst(below))
    if not any(pair.keys in shown for pair in below):
      if is_leaf(below, depth):
        hidden += below
      else:
        yield indent + paint(f"{name}  {counted(count(below))}", mark)
    elif is_leaf(below, depth):
      yield indent + paint(f"{name}  {short(below[0])}", mark)
    else:
      yield indent + paint(name, mark)
      yield from _tree_lines(below, depth + 1, shown, paint)
  if hidden:
    yield indent + paint(f"… {counted(count(hidden))}", grade(worst(hidden)))


def _values_line(found: difference.Difference) -> str:
  """How the values of a leaf differ, in one line."""
  if not found.differing:
    return "equal to the bit" if found.elements else "no elements"
  said = [f"{found.differing:,} of {found.elements:,} differ"]
  if found.outside < found.differing:
    said[0] += f", {found.outside:,} outside of the tolerance"
  said += [f"{name} {_number(largest.value)} at {_index(largest.element)}" for name, largest in _largest(found)]
  if first := found.first:
    said.append((f"first at {_index(first)}: " if first.index else "") + f"{first.a} and {first.b}")
    said[-1] += f" ({first.a_bits} and {first.b_bits})" if first.a == first.b else ""
  if odd := found.first_not_finite:
    said.append(f"{found.not_finite:,} NaN or infinite on one side, first at {_index(odd)}: {odd.a} and {odd.b}")
  if found.nan_bits:
    said.append(f"{found.nan_bits:,} NaNs with other bits")
  if found.zero_signs:
    said.append(f"{found.zero_signs:,} zeros with other signs")
  return "; ".join(said)


def _largest(found: difference.Difference) -> Iterator[tuple[str, difference.Largest]]:
  kinds = (("abs", found.largest_absolute), ("rel", found.largest_relative), ("ulp", found.largest_ulp))
  yield from ((name, largest) for name, largest in kinds if largest is not None)


def _number(value: float | int) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _index(element: difference.Element) -> str:
  """An index as NumPy takes it."""
  return "[" + ", ".join(map(str, element.index)) + "]"


def _json_leaf(pair: Pair) -> dict[str, Any]:
  return {
      "path": pair.path,
      "part": pair.part,
      "status": pair.status,
      "a": _json_side(pair.a),
      "b": _json_side(pair.b),
      "failure": pair.failure,
      "difference": _finite(dataclasses.asdict(pair.values)) if pair.has_values else None,
  }


def _json_side(leaf: alignment.Leaf | None) -> dict[str, Any] | None:
  if leaf is None:
    return None
  return {
      "source": leaf.place,
      "shape": None if leaf.shape is None else list(leaf.shape),
      "dtype": None if leaf.dtype is None else str(leaf.dtype),
      "value": None if leaf.shape is not None else repr(leaf.stored),
      "key": leaf.key,
  }


def _finite(value: Any) -> Any:
  """JSON has no infinity: what overflows float64 is a string."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
