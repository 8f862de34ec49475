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

"""The report as one HTML page: no script, and nothing fetched from anywhere."""

from collections.abc import Mapping
import html
import math

from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_comparator import report
from maxtext.checkpoint_conversion.linen_nnx_comparator import result
from maxtext.checkpoint_conversion.linen_nnx_comparator import tree

# With more leaves than this that are not equal, the tree starts closed.
_MOST_OPEN = 200
_MOST_LISTED = 100

_STYLE = """
:root { color-scheme: light dark; --equal: #1a7f37; --near: #9a6700; --far: #cf222e; --structure: #8250df; }
@media (prefers-color-scheme: dark) {
  :root { --equal: #3fb950; --near: #d29922; --far: #ff7b72; --structure: #bc8cff; }
}
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, .tree { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
table { border-collapse: collapse; } td, th { padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
.equal { color: var(--equal); } .near { color: var(--near); } .far { color: var(--far); }
.structure { color: var(--structure); }
.tree details, .tree .leaf { margin-left: 1.2rem; } .tree > details { margin-left: 0; }
.found:target { border-left-color: currentColor; }
.found { margin: .3rem 0 .8rem 1.2rem; padding-left: .8rem; border-left: 2px solid #8885; }
.found p { margin: .2rem 0; } summary { cursor: pointer; }
figure { display: inline-block; margin: .4rem 2rem .2rem 0; } figcaption, .note { opacity: .75; }
svg { display: block; overflow: visible; } svg path, svg text { fill: currentColor; } svg text { font-size: 10px; }
"""

_MEANING = {
    "equal": "equal to the bit",
    "near": "within the tolerance, or at most 4 units in the last place apart",
    "far": "further apart",
    "structure": "on one side only, of another shape, dtype or key type, or unreadable",
}


def page(comparison: result.Comparison) -> str:
  """The whole document."""
  worst = comparison.worst_first()
  anchors = {outcome.aligned.path: f"leaf-{i}" for i, outcome in enumerate(worst)}
  kind = "far" if not comparison.is_accepted else "near" if worst else "equal"
  nodes = tree.build(comparison.leaves)
  is_open = len(worst) <= _MOST_OPEN
  return "\n".join(
      (
          "<!DOCTYPE html>",
          '<html lang="en"><head><meta charset="utf-8">',
          """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
          '<meta name="viewport" content="width=device-width, initial-scale=1">',
          f"<title>Checkpoints: {_text(report.summary(comparison))}</title><style>{_STYLE}</style></head><body>",
          f'<h1 class="{kind}" id="summary">{_text(report.summary(comparison))}</h1>',
          _sides(comparison),
          _parts(comparison),
          _worst(worst, anchors),
          "<h2>All leaves</h2>",
          "<p>" + " · ".join(f'<span class="{name}">{_MEANING[name]}</span>' for name in report.GRADES) + "</p>",
          '<div class="tree">',
          *(_node(node, anchors, is_open) for node in nodes),
          "</div></body></html>\n",
      )
  )


def _text(value: object) -> str:
  return html.escape(str(value))


def _sides(comparison) -> str:
  rows = [
      f"<tr><th>{name}</th><td><code>{_text(side)}</code></td></tr>"
      for name, side in zip("AB", (comparison.a, comparison.b))
  ]
  for name, left_out in zip("AB", comparison.left_out):
    if left_out:
      rows.append(f"<tr><th>left out of {name}</th><td>{len(left_out):,} leaves</td></tr>")
  rows += [f"<tr><th>note</th><td>{_text(note)}</td></tr>" for note in comparison.notes]
  if comparison.tolerance:
    said = f"|a − b| ≤ {comparison.tolerance.atol:g} + {comparison.tolerance.rtol:g} · |b|"
    rows.append(f"<tr><th>tolerance</th><td>{_text(said)}</td></tr>")
  return f"<table>{''.join(rows)}</table>"


def _parts(comparison) -> str:
  """How many leaves of each part have which status."""
  rows = []
  for part in canonical.PARTS:
    if counts := comparison.counts(part):
      rows.append(f"<tr><th>{part}</th><td>{_text(report.counted(counts))}</td></tr>")
  return f'<h2>Parts</h2><table id="parts">{"".join(rows)}</table>'


def _worst(worst, anchors) -> str:
  """The worst leaves. A link to what a closed `<details>` holds opens it, and all around it."""
  sections = []
  for title, outcomes in report.of_structure_and_values(worst):
    rows = []
    for outcome in outcomes[:_MOST_LISTED]:
      link = f'<a class="{report.grade(outcome)}" href="#{anchors[outcome.aligned.path]}">{_text(outcome.path)}</a>'
      rows.append(f"<tr><td><code>{link}</code></td><td>{_text(report.short(outcome))}</td></tr>")
    more = f"<p class=note>{_MOST_LISTED} of {len(outcomes):,}</p>" if len(outcomes) > _MOST_LISTED else ""
    sections.append(f'<h2>{title.capitalize()}, worst first</h2>{more}<table id="{title}">{"".join(rows)}</table>')
  return "".join(sections)


def _node(node: tree.Node, anchors, is_open: bool) -> str:
  """A name in the tree, with all that is below it."""
  if not node.children:
    return _leaf(node, anchors)
  leaves = list(node.leaves())
  grade = report.grade(node.worst)
  opened = " open" if is_open and grade != "equal" else ""
  own = _leaf(node, anchors) if node.outcome else ""
  below = "".join(_node(child, anchors, is_open) for child in node.children)
  count = f'<span class="note">{_text(report.count_of(leaves))}</span>'
  return f'<details{opened}><summary class="{grade}">{_text(node.name)} {count}</summary>{own}{below}</details>'


def _leaf(node, anchors) -> str:
  """A leaf; one that is not equal opens on what was found."""
  outcome = node.outcome
  grade, name = report.grade(outcome), _text(node.name)
  if outcome.status == result.EQUAL:
    return f'<div class="leaf {grade}">{name} <span class="note">{_text(outcome.aligned.a)}</span></div>'
  found = outcome.found if not outcome.failure else None
  places = [
      f"<p class=note>{side}: <code>{_text(leaf.place)}</code></p>"
      for side, leaf in zip("AB", (outcome.aligned.a, outcome.aligned.b))
      if leaf is not None
  ]
  figures = ""
  if found is not None and found.differing:
    figures = _histogram("absolute difference", found.absolute_histogram) + _histogram(
        "units in the last place", found.ulp_histogram
    )
  return (
      f'<details class="leaf {grade}"><summary>{name} '
      f'<span class="note">{_text(report.short(outcome))}</span></summary>'
      f'<div class="found" id="{anchors[outcome.aligned.path]}"><p>{_text(report.detail(outcome))}</p>'
      f"{''.join(places)}{figures}</div></details>"
  )


def _histogram(caption: str, counts: Mapping[int, int]) -> str:
  """Bars for the number of elements by power of two, their heights on a logarithmic scale."""
  if not counts:
    return ""
  low, high = min(counts), max(counts)
  bar, height = 8, 60
  top = math.log10(max(counts.values()) + 1)
  sizes = {exponent: math.ceil(height * math.log10(count + 1) / top) for exponent, count in counts.items()}
  bars = "".join(f"M{bar * (e - low)} {height}v{-size}h{bar - 1}v{size}z" for e, size in sizes.items())
  width = max(bar * (high - low + 1), 90)
  listed = ", ".join(f"2^{exponent}: {count:,}" for exponent, count in counts.items())
  ends = f'<text x="0" y="{height + 12}">2^{low}</text>'
  if high - low > 7:  # There is room for it.
    ends += f'<text x="{bar * (high - low + 1)}" y="{height + 12}" text-anchor="end">2^{high}</text>'
  peak = max(counts, key=lambda exponent: counts[exponent])
  return (
      f'<figure><svg role="img" width="{width}" height="{height + 16}"><title>{listed}</title>'
      f'<path d="{bars}"/>{ends}</svg><figcaption>{caption}: most at 2^{peak} ({_near(peak)}), {counts[peak]:,} elements'
      "; heights are logarithmic</figcaption></figure>"
  )


def _near(exponent: int) -> str:
  """A power of two in decimal digits."""
  return f"{2.0**exponent:.2g}" if exponent < 0 else f"{2**exponent:,}" if exponent < 64 else f"{2.0**exponent:.2g}"
