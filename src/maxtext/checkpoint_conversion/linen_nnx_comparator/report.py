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

"""The report of a comparison: for a person, and as JSON."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import align
from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import result
from maxtext.checkpoint_conversion.linen_nnx_comparator import tree

# How a leaf is shown, by what `grade` says of it.
GRADES = ("equal", "near", "far", "structure")
_COLORS = {"equal": "32", "near": "33", "far": "31", "structure": "35"}
_NEAR_ULP = 4  # Up to here values are apart as rounding sets them apart.


def grade(outcome: result.Outcome) -> str:
  """`equal`; `near`, within the tolerance or a few units in the last place; `far`; or `structure`."""
  if outcome.status == result.EQUAL:
    return "equal"
  if outcome.status not in (result.WITHIN, result.DIFFERENT):
    return "structure"
  found = outcome.values
  is_rounding = found.largest_ulp is not None and found.largest_ulp.value <= _NEAR_ULP and not found.not_finite
  return "near" if outcome.status == result.WITHIN or is_rounding else "far"


def lines(comparison: result.Comparison, *, color: bool, most_leaves: int) -> Iterator[str]:
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
  for side, left_out in zip("AB", comparison.left_out):
    if left_out:
      yield f"left out of {side}: {len(left_out)} leaves ({', '.join(sorted(set(left_out.values())))})"
  worst, shown = comparison.worst_first(), set()
  for title, outcomes in of_structure_and_values(worst):
    yield ""
    yield f"{title}, worst first" + (f", {most_leaves} of {len(outcomes):,}" if len(outcomes) > most_leaves else "")
    for outcome in outcomes[:most_leaves]:
      shown.add(outcome.aligned.path)
      yield "  " + paint(f"{outcome.path}  {detail(outcome)}", grade(outcome))
  yield ""
  yield from _tree_lines(tree.build(comparison.leaves), shown, paint, "")
  yield ""
  for part in canonical.PARTS:
    if counts := comparison.counts(part):
      yield f"{part:<10} {counted(counts)}"
  yield paint(summary(comparison), "far" if not comparison.is_accepted else "near" if worst else "equal")


def of_structure_and_values(worst: Sequence[result.Outcome]) -> Iterator[tuple[str, list[result.Outcome]]]:
  """The leaves whose structure differs and those whose values do, under these titles, so that neither hides the other."""
  for title, is_wanted in (("structure", True), ("values", False)):
    if some := [outcome for outcome in worst if (grade(outcome) == "structure") == is_wanted]:
      yield title, some


def detail(outcome: result.Outcome) -> str:
  """What was found of a leaf, in one line."""
  a, b = outcome.aligned.a, outcome.aligned.b
  if outcome.status in (align.ONLY_A, align.ONLY_B):
    return f"{outcome.status}: {a or b}"
  if outcome.failure:
    return f"{outcome.status}: {outcome.failure}"
  head = f"{a}" if outcome.aligned.structure is None else f"{outcome.status}: {a} in A, {b} in B"
  return f"{head}  {values_line(outcome.found)}" if outcome.found is not None else head


def values_line(found: difference.Difference) -> str:
  """How the values of a leaf differ, in one line."""
  if not found.differing:
    return "equal to the bit" if found.elements else "no elements"
  if found.outside < found.differing:
    where = f"{found.differing:,} of {found.elements:,} differ, {found.outside:,} outside of the tolerance"
  else:
    where = f"{found.differing:,} of {found.elements:,} differ"
  said = [where]
  for name, largest in _largest(found):
    said.append(f"{name} {number(largest.value)} at {index(largest.element)}")
  if first := found.first:
    said.append((f"first at {index(first)}: " if first.index else "") + f"{first.a} and {first.b}")
    said[-1] += f" ({first.a_bits} and {first.b_bits})" if first.a == first.b else ""
  if odd := found.first_not_finite:
    said.append(f"{found.not_finite:,} NaN or infinite on one side, first at {index(odd)}: {odd.a} and {odd.b}")
  if found.nan_bits:
    said.append(f"{found.nan_bits:,} NaNs with other bits")
  if found.zero_signs:
    said.append(f"{found.zero_signs:,} zeros with other signs")
  return "; ".join(said)


def summary(comparison: result.Comparison) -> str:
  """One line for a person."""
  differing, elements = comparison.elements()
  counts = comparison.counts()
  verdict = "equal to the bit" if set(counts) <= {result.EQUAL} else "equal within the tolerance"
  if not comparison.is_accepted:
    verdict = "different"
  return (
      f"{verdict}: {len(comparison.leaves):,} leaves ({counted(counts)}), {differing:,} of {elements:,} elements differ, "
      f"in {comparison.seconds:.1f} s"
  )


def as_json(comparison: result.Comparison) -> dict[str, Any]:
  """The report as a JSON document. Leaves that are equal are in it too, with their number of elements."""
  differing, elements = comparison.elements()
  tolerance = comparison.tolerance
  return {
      "accepted": comparison.is_accepted,
      "summary": summary(comparison),
      "a": dataclasses.asdict(comparison.a),
      "b": dataclasses.asdict(comparison.b),
      "tolerance": dataclasses.asdict(tolerance) if tolerance else None,
      "notes": list(comparison.notes),
      "left_out": [{"/".join(path): reason for path, reason in side.items()} for side in comparison.left_out],
      "leaves": len(comparison.leaves),
      "elements": elements,
      "differing": differing,
      "by_part": {part: counts for part in canonical.PARTS if (counts := comparison.counts(part))},
      "worst_first": [_json_leaf(outcome) for outcome in comparison.worst_first()],
      "equal": {outcome.path: _elements(outcome) for outcome in comparison.leaves if outcome.status == result.EQUAL},
      "seconds": round(comparison.seconds, 3),
  }


def number(value: float | int) -> str:
  return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def index(element: difference.Element) -> str:
  """An index as NumPy takes it."""
  return "[" + ", ".join(map(str, element.index)) + "]"


def _largest(found: difference.Difference) -> Iterator[tuple[str, difference.Largest]]:
  kinds = (("abs", found.largest_absolute), ("rel", found.largest_relative), ("ulp", found.largest_ulp))
  yield from ((name, largest) for name, largest in kinds if largest is not None)


def _elements(outcome) -> int:
  return outcome.found.elements if outcome.found else 0


def counted(counts: Mapping[str, int]) -> str:
  """Numbers of leaves by status, as text."""
  return ", ".join(f"{count:,} {status}" for status, count in counts.items())


def _tree_lines(nodes, shown, paint, indent) -> Iterator[str]:
  """The tree below `nodes`, down to the leaves that are shown; the rest is counted where it branches off."""
  for node in nodes:
    leaves = list(node.leaves())
    mark = grade(node.worst)
    if node.outcome is not None and not node.children:
      if node.outcome.aligned.path in shown:
        yield indent + paint(f"{node.name}  {short(node.outcome)}", mark)
      continue
    if any(leaf.aligned.path in shown for leaf in leaves):
      yield indent + paint(node.name, mark)
      yield from _tree_lines(node.children, shown, paint, indent + "  ")
    else:
      yield indent + paint(f"{node.name}  {count_of(leaves)}", mark)
  hidden = [node.outcome for node in nodes if node.outcome is not None and node.outcome.aligned.path not in shown]
  if hidden:
    yield indent + paint(f"… {count_of(hidden)}", grade(max(hidden, key=lambda outcome: outcome.badness)))


def count_of(outcomes: Iterable[result.Outcome]) -> str:
  """How many of these leaves have which status."""
  return counted(result.count(outcomes))


def short(outcome: result.Outcome) -> str:
  """What was found of a leaf, in a few words."""
  if outcome.status not in (result.WITHIN, result.DIFFERENT):
    return outcome.status
  found = outcome.values
  worst = [f"{name} {number(largest.value)}" for name, largest in _largest(found)]
  return ", ".join((f"{found.differing:,} of {found.elements:,}", *worst))


def _json_leaf(outcome) -> dict[str, Any]:
  aligned, found = outcome.aligned, outcome.found
  return {
      "path": outcome.path,
      "part": outcome.part,
      "status": outcome.status,
      "a": _json_side(aligned.a),
      "b": _json_side(aligned.b),
      "failure": outcome.failure,
      "difference": _finite(dataclasses.asdict(found)) if found is not None and not outcome.failure else None,
  }


def _json_side(leaf: canonical.Leaf | None) -> dict[str, Any] | None:
  if leaf is None:
    return None
  return {
      "source": str(leaf.place),
      "shape": None if leaf.shape is None else list(leaf.shape),
      "dtype": None if leaf.dtype is None else str(leaf.dtype),
      "value": None if leaf.shape is not None else repr(leaf.value),
      "key": leaf.key,
  }


def _finite(value: Any) -> Any:
  """JSON has no infinity: what overflows float64 is a string."""
  if isinstance(value, dict):
    return {str(key): _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  return str(value) if isinstance(value, float) and not math.isfinite(value) else value
