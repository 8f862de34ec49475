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

"""The report as one self-contained HTML page without scripts."""

from collections.abc import Iterable, Iterator, Mapping
import html

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import report

Anchors = Mapping[alignment.Path, str]  # The ids of the findings on leaves that are not equal.

# With more unequal leaves than this, the tree starts closed.
_MOST_OPEN = 200
_MOST_LISTED = 100

_STYLE = """
:root { color-scheme: light dark; --equal: #1a7f37; --near: #9a6700; --far: #cf222e; --structure: #8250df; }
@media (prefers-color-scheme: dark) {
  :root { --equal: #3fb950; --near: #d29922; --far: #ff7b72; --structure: #bc8cff; }
}
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
code, .found, .tree { font-family: ui-monospace, monospace; font-size: 13px; overflow-wrap: anywhere; }
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
  legend = " · ".join(f'<span class="{grade}">{meaning}</span>' for grade, meaning in _MEANING.items())
  return "\n".join(
      (
          "<!DOCTYPE html>",
          '<html lang="en"><head><meta charset="utf-8">',
          """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
          '<meta name="viewport" content="width=device-width, initial-scale=1">',
          f"<title>Checkpoints: {summary}</title><style>{_STYLE}</style></head><body>",
          f'<h1 class="{comparison.grade}" id="summary">{summary}</h1>',
          _table("sides", report.head(comparison)),
          "<h2>Parts</h2>",
          _table("parts", ((part, report.counted(pairs)) for part, pairs in comparison.by_part().items())),
          *_worst(comparison, anchors),
          f'<h2>All leaves</h2><p>{legend}</p><div class="tree">',
          *_branches(comparison.ranked(), 0, anchors, len(worst) <= _MOST_OPEN),
          "</div></body></html>\n",
      )
  )


def _text(value: object) -> str:
  return html.escape(str(value))


def _note(value: object) -> str:
  return f'<span class="note">{_text(value)}</span>'


def _table(name: str, rows: Iterable[tuple[str, str]]) -> str:
  cells = (f"<tr><td>{title}</td><td>{_text(said)}</td></tr>" for title, said in rows)
  return f'<table id="{name}">{"".join(cells)}</table>'


def _worst(comparison, anchors: Anchors) -> Iterator[str]:
  """The worst leaves. A link into a closed `<details>` opens it and all around it."""
  for title, pairs in report.sections(comparison):
    more = f", {_MOST_LISTED} of {len(pairs):,}" if len(pairs) > _MOST_LISTED else ""
    yield f"<h2>{title.capitalize()}, worst first{more}</h2>"
    links = (
        f'<code><a class="{report.grade(pair)}" href="#{anchors[pair.keys]}">{_text(pair.path)}</a></code>'
        for pair in pairs
    )
    yield _table(title, zip(links, map(report.short, pairs[:_MOST_LISTED])))


def _branches(pairs: Iterable[alignment.Pair], depth: int, anchors: Anchors, is_open: bool) -> Iterator[str]:
  """The tree of names at and below this depth of the paths."""
  for name, is_leaf, below in report.branches(pairs, depth):
    if is_leaf:
      yield _leaf(below[0], anchors)
      continue
    grade, note = report.grade(below[0]), _note(report.counted(below))
    opened = " open" if is_open and grade != "equal" else ""
    yield f'<details{opened}><summary class="{grade}">{_text(name)} {note}</summary>'
    yield from _branches(below, depth + 1, anchors, is_open)
    yield "</details>"


def _leaf(pair: alignment.Pair, anchors: Anchors) -> str:
  """A leaf; one that is not equal opens to show what was found."""
  grade, name = report.grade(pair), _text(pair.keys[-1])
  if pair.keys not in anchors:
    return f'<div class="leaf {grade}">{name} {_note(pair.a)}</div>'
  places = (f"{side}: {leaf.place}" for side, leaf in zip("AB", (pair.a, pair.b)) if leaf)
  found = (f"<p>{_text(said)}</p>" for said in (report.detail(pair), *places))
  return (
      f'<details class="leaf {grade}"><summary>{name} {_note(report.short(pair))}</summary>'
      f'<div class="found" id="{anchors[pair.keys]}">{"".join(found)}</div></details>'
  )
