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

from collections.abc import Iterable, Iterator, Mapping
import html

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import report

Anchors = Mapping[alignment.Path, str]  # The id of what was found of each leaf that is not equal.

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
.note { opacity: .75; }
"""

_MEANING = {
    "equal": "equal to the bit",
    "near": "within the tolerance, or at most 4 units in the last place apart",
    "far": "further apart",
    "structure": "on one side only, of another shape, dtype or key type, or unreadable",
}


def page(comparison: report.Comparison) -> str:
  """The whole document."""
  worst, summary = comparison.worst_first(), _text(report.summary(comparison))
  anchors = {pair.keys: f"leaf-{i}" for i, pair in enumerate(worst)}
  legend = " · ".join(f'<span class="{name}">{_MEANING[name]}</span>' for name in report.GRADES)
  return "\n".join(
      (
          "<!DOCTYPE html>",
          '<html lang="en"><head><meta charset="utf-8">',
          """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
          '<meta name="viewport" content="width=device-width, initial-scale=1">',
          f"<title>Checkpoints: {summary}</title><style>{_STYLE}</style></head><body>",
          f'<h1 class="{comparison.grade}" id="summary">{summary}</h1>',
          _table(_sides(comparison)),
          "<h2>Parts</h2>",
          _table(((part, report.counted(counts)) for part, counts in comparison.by_part().items()), "parts"),
          *_worst(comparison, anchors),
          "<h2>All leaves</h2>",
          f"<p>{legend}</p>",
          f'<div class="tree">{_branches(comparison.leaves, 0, anchors, len(worst) <= _MOST_OPEN)}</div></body></html>\n',
      )
  )


def _text(value: object) -> str:
  return html.escape(str(value))


def _table(rows: Iterable[tuple[object, object]], name: str = "sides") -> str:
  cells = (f"<tr><th>{_text(head)}</th><td>{_text(value)}</td></tr>" for head, value in rows)
  return f'<table id="{name}">{"".join(cells)}</table>'


def _sides(comparison) -> list[tuple[str, object]]:
  """What was compared, and how."""
  sides = (("A", comparison.a), ("B", comparison.b))
  left_out = [(f"left out of {name}", f"{len(tree.left_out):,} leaves") for name, tree in sides if tree.left_out]
  rows = [*sides, *left_out, *(("note", note) for note in comparison.notes)]
  if comparison.tolerance:
    rows.append(("tolerance", f"|a − b| ≤ {comparison.tolerance.atol:g} + {comparison.tolerance.rtol:g} · |b|"))
  return rows


def _worst(comparison, anchors: Anchors) -> Iterator[str]:
  """The worst leaves. A link to what a closed `<details>` holds opens it, and all around it."""
  for title, pairs in report.of_structure_and_values(comparison):
    rows = []
    for pair in pairs[:_MOST_LISTED]:
      link = f'<a class="{report.grade(pair)}" href="#{anchors[pair.keys]}">{_text(pair.path)}</a>'
      rows.append(f"<tr><td><code>{link}</code></td><td>{_text(report.short(pair))}</td></tr>")
    more = f"<p class=note>{_MOST_LISTED} of {len(pairs):,}</p>" if len(pairs) > _MOST_LISTED else ""
    yield f'<h2>{title.capitalize()}, worst first</h2>{more}<table id="{title}">{"".join(rows)}</table>'


def _branches(pairs: Iterable[alignment.Pair], depth: int, anchors: Anchors, is_open: bool) -> str:
  """The tree of names at and below this depth of the paths."""
  written = []
  for name, below in report.branches(pairs, depth):
    if report.is_leaf(below, depth):
      written.append(_leaf(below[0], anchors))
      continue
    grade = report.grade(report.worst(below))
    opened = " open" if is_open and grade != "equal" else ""
    note = f'<span class="note">{_text(report.counted(report.count(below)))}</span>'
    written.append(f'<details{opened}><summary class="{grade}">{_text(name)} {note}</summary>')
    written.append(f"{_branches(below, depth + 1, anchors, is_open)}</details>")
  return "\n".join(written)


def _leaf(pair: alignment.Pair, anchors: Anchors) -> str:
  """A leaf; one that is not equal opens on what was found."""
  grade, name = report.grade(pair), _text(pair.keys[-1])
  if pair.keys not in anchors:
    return f'<div class="leaf {grade}">{name} <span class="note">{_text(pair.a)}</span></div>'
  places = [
      f"<p class=note>{side}: <code>{_text(leaf.place)}</code></p>"
      for side, leaf in zip("AB", (pair.a, pair.b))
      if leaf is not None
  ]
  return (
      f'<details class="leaf {grade}"><summary>{name} <span class="note">{_text(report.short(pair))}</span></summary>'
      f'<div class="found" id="{anchors[pair.keys]}"><p>{_text(report.detail(pair))}</p>{"".join(places)}</div></details>'
  )
