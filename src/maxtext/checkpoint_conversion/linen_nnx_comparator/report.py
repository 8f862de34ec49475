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
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
import dataclasses
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference

Pair = alignment.Pair

# The colour of a leaf on a terminal, by its `grade`.
COLORS = {"equal": "32", "near": "33", "far": "31", "structure": "35"}
_AGREES = (alignment.EQUAL, alignment.ALIKE)
_NEAR_ULP = 4  # Up to here, rounding may explain the distance.


@dataclasses.dataclass(frozen=True)
class Comparison:
  """What was found of two checkpoints.

  Attributes:
    trees: the canonical trees of A and of B.
    leaves: every leaf of either, in A's order.
    tolerance: by how much values were allowed to differ; None if every bit counts.
    notes: notes on how they were compared.
    seconds: how long it took.
  """

  trees: Sequence[alignment.Tree]
  leaves: Sequence[Pair]
  tolerance: difference.Tolerance | None = None
  notes: Sequence[str] = ()
  seconds: float = 0.0

  @property
  def is_accepted(self) -> bool:
    """Whether structure and, if compared, values agree: to the bit, or within the tolerance if there is one."""
    return self.counts().keys() <= {*_AGREES, alignment.WITHIN}

  @property
  def is_of_structure(self) -> bool:
    """Whether no values were compared."""
    return any(pair.is_of_structure for pair in self.leaves)

  @property
  def grade(self) -> str:
    """`equal` to the bit, `near` if it is accepted, or `far`."""
    return "far" if not self.is_accepted else "near" if self.worst_first() else "equal"

  def ranked(self) -> list[Pair]:
    """All leaves, the worst first, otherwise in order."""
    return sorted(self.leaves, key=lambda pair: pair.badness, reverse=True)

  def worst_first(self) -> list[Pair]:
    """The leaves that are not equal, the worst first."""
    return [pair for pair in self.ranked() if pair.status not in _AGREES]

  def by_part(self) -> dict[str, list[Pair]]:
    """The leaves of each part of the state that has any."""
    of = {part: [pair for pair in self.leaves if pair.part == part] for part in alignment.PARTS}
    return {part: pairs for part, pairs in of.items() if pairs}

  def counts(self, part: str | None = None) -> dict[str, int]:
    """How many leaves have each status, of one part of the state or of all."""
    return count(self.by_part().get(part, []) if part else self.leaves)

  def elements(self) -> tuple[int, int]:
    """How many elements differ, and how many were compared."""
    return sum(pair.values.differing for pair in self.leaves), sum(pair.values.elements for pair in self.leaves)


def count(pairs: Iterable[Pair]) -> dict[str, int]:
  """How many leaves have each status, in a fixed order."""
  found = collections.Counter(pair.status for pair in pairs)
  return {status: found[status] for status in alignment.STATUSES if found[status]}


def grade(pair: Pair) -> str:
  """`equal`; `near`, within the tolerance or a few units in the last place; `far`; or `structure`."""
  if pair.status not in (alignment.WITHIN, alignment.DIFFERENT):
    return "equal" if pair.status in _AGREES else "structure"
  found = pair.values
  is_rounding = found.largest_ulp is not None and found.largest_ulp.value <= _NEAR_ULP and not found.not_finite
  return "near" if pair.status == alignment.WITHIN or is_rounding else "far"


def branches(pairs: Iterable[Pair], depth: int) -> list[tuple[str, bool, list[Pair]]]:
  """The tree of names at this depth of the paths: each name, whether it is a leaf, and the leaves at or below it.

  Both the branches and the leaves of each have the order of `pairs`.
  """
  found = {}
  for pair in pairs:
    found.setdefault((pair.keys[depth], len(pair.keys) == depth + 1), []).append(pair)
  return [(*name, below) for name, below in found.items()]


def sections(comparison: Comparison) -> Iterator[tuple[str, list[Pair]]]:
  """The leaves whose structure differs, and those whose values do, by title, so that neither hides the other."""
  for title, is_wanted in (("structure", True), ("values", False)):
    if some := [pair for pair in comparison.worst_first() if (grade(pair) == "structure") == is_wanted]:
      yield title, some


def hints(comparison: Comparison) -> Iterator[str]:
  """What by itself makes most leaves differ: another model, another step."""
  params = comparison.by_part().get(alignment.PARAMS, [])
  unlike = [pair for pair in params if pair.structure in (alignment.ONLY_A, alignment.ONLY_B, alignment.SHAPE)]
  if unlike:
    yield f"Not of one model: {len(unlike):,} of {len(params):,} params are on one side only, or of another shape."
  for pair in comparison.by_part().get(alignment.STEP, []):
    if pair.has_values and (first := pair.values.first):
      yield f"Not of one step: A is of step {first.a}, B of step {first.b}."


def head(comparison: Comparison) -> Iterator[tuple[str, str]]:
  """What was compared, and how, by title."""
  yield from (("note", hint) for hint in hints(comparison))
  for side, tree in zip("AB", comparison.trees):
    yield side, f"{tree.path}  ({tree.layout}, {'scanned' if tree.is_scanned else 'not scanned'})"
  yield from (("note", note) for note in comparison.notes)
  for side, tree in zip("AB", comparison.trees):
    if tree.left_out:
      yield f"left out of {side}", f"{len(tree.left_out):,} leaves ({', '.join(sorted(set(tree.left_out.values())))})"
  if comparison.tolerance:
    yield "tolerance", f"|a - b| <= {comparison.tolerance.atol:g} + {comparison.tolerance.rtol:g} * |b|"


def counted(pairs: Iterable[Pair]) -> str:
  """How many of these leaves have each status, as text."""
  return ", ".join(f"{number:,} {status}" for status, number in count(pairs).items())


def summary(comparison: Comparison) -> str:
  """One line for a person."""
  verdict = {"equal": "equal to the bit", "near": "equal within the tolerance", "far": "different"}[comparison.grade]
  differing, elements = comparison.elements()
  leaves = f"{len(comparison.leaves):,} leaves ({counted(comparison.leaves)})"
  if comparison.is_of_structure:
    verdict = "of one structure" if comparison.is_accepted else "different"
    return f"{verdict}: {leaves}, no values compared, in {comparison.seconds:.1f} s"
  return f"{verdict}: {leaves}, {differing:,} of {elements:,} elements differ, in {comparison.seconds:.1f} s"


def detail(pair: Pair) -> str:
  """What was found of a leaf, in one line."""
  if pair.a is None or pair.b is None or pair.failure:
    return f"{pair.status}: {pair.failure or pair.a or pair.b}"
  head = f"{pair.a}" if pair.structure is None else f"{pair.status}: {pair.a} in A, {pair.b} in B"
  return f"{head}  {_values(pair.values)}" if pair.has_values else head


def short(pair: Pair) -> str:
  """What was found of a leaf, in a few words."""
  if pair.status not in (alignment.WITHIN, alignment.DIFFERENT):
    return pair.status
  found = pair.values
  return ", ".join((f"{found.differing:,} of {found.elements:,}", *(said for said, _ in _largest(found))))


def lines(comparison: Comparison, *, color: bool, most_leaves: int) -> Iterator[str]:
  """The report for a person: both checkpoints, the worst leaves, the tree, a line for each part, and the summary.

  Args:
    comparison: what was found.
    color: whether to colour it with ANSI escapes.
    most_leaves: how many leaves to show of those whose structure, and of those whose values, differ; others are counted.
  """
  paint = (lambda text, kind: f"\033[{COLORS[kind]}m{text}\033[0m") if color else (lambda text, _: text)
  yield from (f"{title}  {said}" for title, said in head(comparison))
  shown = set()
  for title, pairs in sections(comparison):
    yield ""
    yield f"{title}, worst first" + (f", {most_leaves} of {len(pairs):,}" if len(pairs) > most_leaves else "")
    for pair in pairs[:most_leaves]:
      shown.add(pair.keys)
      yield "  " + paint(f"{pair.path}  {detail(pair)}", grade(pair))
  yield from ("", *_tree_lines(comparison.ranked(), 0, shown, paint), "")
  yield from (f"{part:<10} {counted(pairs)}" for part, pairs in comparison.by_part().items())
  yield paint(summary(comparison), comparison.grade)


def as_json(comparison: Comparison) -> dict[str, Any]:
  """The report as a JSON document, which also has the equal leaves with their number of elements."""
  differing, elements = comparison.elements()
  side = lambda tree: {"path": tree.path, "layout": tree.layout, "is_scanned": tree.is_scanned}
  tolerance = comparison.tolerance
  return {
      "accepted": comparison.is_accepted,
      "summary": summary(comparison),
      "a": side(comparison.trees[0]),
      "b": side(comparison.trees[1]),
      "tolerance": dataclasses.asdict(tolerance) if tolerance else None,
      "notes": [*hints(comparison), *comparison.notes],
      "left_out": [{"/".join(path): reason for path, reason in tree.left_out.items()} for tree in comparison.trees],
      "leaves": len(comparison.leaves),
      "values_compared": not comparison.is_of_structure,
      "elements": elements,
      "differing": differing,
      "by_part": {part: count(pairs) for part, pairs in comparison.by_part().items()},
      "worst_first": [_json_leaf(pair) for pair in comparison.worst_first()],
      "equal": {pair.path: pair.values.elements for pair in comparison.leaves if pair.status == alignment.EQUAL},
      "seconds": round(comparison.seconds, 3),
  }


def _tree_lines(
    pairs: Iterable[Pair], depth: int, shown: Set[alignment.Path], paint: Callable[[str, str], str]
) -> Iterator[str]:
  """The tree of names down to the leaves that are shown; the rest is counted where it branches off."""
  indent, hidden = "  " * depth, []
  for name, is_leaf, below in branches(pairs, depth):
    is_shown = any(pair.keys in shown for pair in below)
    if is_leaf and not is_shown:
      hidden += below
    elif is_leaf or not is_shown:
      yield indent + paint(f"{name}  {short(below[0]) if is_leaf else counted(below)}", grade(below[0]))
    else:
      yield indent + paint(name, grade(below[0]))
      yield from _tree_lines(below, depth + 1, shown, paint)
  if hidden:
    yield indent + paint(f"… {counted(hidden)}", grade(hidden[0]))


def _values(found: difference.Difference) -> str:
  """How the values of a leaf differ, in one line."""
  if not found.differing:
    return "equal to the bit" if found.elements else "no elements"
  outside = f", {found.outside:,} outside the tolerance" if found.outside < found.differing else ""
  said = [f"{found.differing:,} of {found.elements:,} differ{outside}"]
  said += [f"{largest} at {list(element.index)}" for largest, element in _largest(found)]
  if first := found.first:
    bits = f" ({first.a_bits} and {first.b_bits})" if first.a == first.b else ""
    said.append((f"first at {list(first.index)}: " if first.index else "") + f"{first.a} and {first.b}{bits}")
  if odd := found.first_not_finite:
    said.append(f"{found.not_finite:,} NaN or infinite on one side, first at {list(odd.index)}: {odd.a} and {odd.b}")
  if found.nan_bits:
    said.append(f"{found.nan_bits:,} NaNs with other bits")
  if found.zero_signs:
    said.append(f"{found.zero_signs:,} zeros with other signs")
  return "; ".join(said)


def _largest(found: difference.Difference) -> Iterator[tuple[str, difference.Element]]:
  """The largest differences, as text, and where they are."""
  for name, largest in zip(("abs", "rel", "ulp"), (found.largest_absolute, found.largest_relative, found.largest_ulp)):
    if largest is not None:
      yield f"{name} {largest.value:{',' if isinstance(largest.value, int) else '.4g'}}", largest.element


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
  is_array = leaf.shape is not None
  return {
      "source": leaf.place,
      "shape": leaf.shape,
      "dtype": leaf.dtype,
      "value": None if is_array else repr(leaf.stored),
      "key": leaf.key,
  }


def _finite(value: Any) -> Any:
  """JSON has no infinity: what overflows float64 is a string."""
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
