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

"""What was found, as one self-contained HTML page without scripts."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
import dataclasses
import html
import re

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_inspector import inspection
from maxtext.checkpoint_conversion.linen_nnx_inspector import text

_WIDTH, _HEIGHT = 1000.0, 420.0  # Of the map, in units of its own.
_SMALLEST = 90.0  # Smaller boxes of the map are not divided.
_LABEL = 7.0  # The width of a letter.
_OPEN_LEVELS = 2
_NUMBERED = re.compile(r"(.*?)(0|[1-9]\d*)")

_STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.2rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
td { padding: .1rem .8rem .1rem 0; vertical-align: top; } td:first-child { white-space: nowrap; }
td + td, .tree { overflow-wrap: anywhere; }
td + td, .tree, svg { font-family: ui-monospace, monospace; font-size: 13px; }
.tree details, .tree .leaf { margin-left: 1.2rem; } summary { cursor: pointer; } .note { opacity: .75; }
svg { width: 100%; height: auto; } svg rect { stroke: Canvas; }
svg text { font-size: 11px; fill: #000; pointer-events: none; }
.c0 { fill: #8ab4f8; } .c1 { fill: #f6b26b; } .c2 { fill: #93c47d; } .c3 { fill: #d5a6bd; } .c4 { fill: #c0c0c0; }
"""


@dataclasses.dataclass(frozen=True)
class Node:
  """A name in the tree, or several that differ only in their numbers.

  Attributes:
    name: the name; `layers_0…31` for several.
    said: what the leaf is; "" for an inner node.
    nbytes: the bytes of all that it stands for.
    leaves: how many leaves these are.
    children: what is below it, or below each of several.
  """

  name: str
  said: str
  nbytes: int
  leaves: int
  children: tuple["Node", ...] = ()


def page(found: Iterable[inspection.Inspection]) -> str:
  """The whole document."""
  found = list(found)
  titles = ", ".join(each.path for each in found)
  return "\n".join(
      (
          "<!DOCTYPE html>",
          '<html lang="en"><head><meta charset="utf-8">',
          """<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">""",
          '<meta name="viewport" content="width=device-width, initial-scale=1">',
          f"<title>{_text(titles)}</title><style>{_STYLE}</style></head><body>",
          *(line for each in found for line in _section(each)),
          "</body></html>\n",
      )
  )


def tree(leaves: Mapping[str, str], sizes: Mapping[str, int]) -> tuple[Node, ...]:
  """The tree of these leaves, given by path, with like layers folded into one node."""
  root = {}
  for path in leaves:
    node = root
    *above, name = path.split("/")
    for key in above:
      node = node.setdefault(key, {})
    node[name] = path

  def nodes(below: Mapping[str, dict | str]) -> tuple[Node, ...]:
    made = []
    for name, child in below.items():
      if isinstance(child, str):
        made.append(Node(name, leaves[child], sizes[child], 1))
      else:
        children = nodes(child)
        made.append(Node(name, "", sum(it.nbytes for it in children), sum(it.leaves for it in children), children))
    return tuple(_folded(made))

  return nodes(root)


def _folded(nodes: Iterable[Node]) -> Iterator[Node]:
  """The nodes, folding those that differ only in their numbers, if these are consecutive."""
  alike = {}
  for node in nodes:
    match = _NUMBERED.fullmatch(node.name)
    key = (match[1], node.said, node.children) if match else node.name
    alike.setdefault(key, []).append((int(match[2]) if match else 0, node))
  for some in alike.values():
    some.sort(key=lambda numbered: numbered[0])
    (first, node), (last, _) = some[0], some[-1]
    if len(some) == 1 or last - first + 1 != len(some):
      yield from (node for _, node in some)
      continue
    sums = {"nbytes": node.nbytes * len(some), "leaves": node.leaves * len(some)}
    yield dataclasses.replace(node, name=f"{node.name}…{last}", **sums)


def _section(found) -> Iterator[str]:
  """What was found of one checkpoint."""
  yield f"<h1>{_text(found.path)}</h1><table>"
  yield from (f"<tr><td>{title}</td><td>{_text(said)}</td></tr>" for title, said in text.facts(found))
  yield "</table>"
  if nodes := tree(found.leaves, found.sizes):
    yield f'<h2>Sizes</h2><svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="sizes of the leaves">'
    for number, (node, box) in enumerate(_boxes(nodes, (0.0, 0.0, _WIDTH, _HEIGHT))):
      yield from _map(node, "", box, f"c{min(number, 4)}")
    yield '</svg><h2>Leaves</h2><div class="tree">'
    yield from (line for node in nodes for line in _branch(node, 0))
    yield "</div>"


Box = tuple[float, float, float, float]  # Left, top, width and height.


def _boxes(nodes: Sequence[Node], box: Box) -> Iterator[tuple[Node, Box]]:
  """Divides a box among nodes by size, the largest first, always across its longer side."""
  nodes = sorted((node for node in nodes if node.nbytes), key=lambda node: -node.nbytes)
  todo = [(nodes, box)] if nodes else []
  while todo:
    some, (left, top, width, height) = todo.pop()
    if len(some) == 1:
      yield some[0], (left, top, width, height)
      continue
    total, taken, count = sum(node.nbytes for node in some), 0, 0
    while count < len(some) - 1 and 2 * taken < total:
      taken, count = taken + some[count].nbytes, count + 1
    share = taken / total
    if width >= height:
      halves = (left, top, width * share, height), (left + width * share, top, width * (1 - share), height)
    else:
      halves = (left, top, width, height * share), (left, top + height * share, width, height * (1 - share))
    todo += [(some[count:], halves[1]), (some[:count], halves[0])]


def _map(node: Node, above: str, box: Box, color: str) -> Iterator[str]:
  """The boxes of a node in the map; the pointer shows what each is."""
  left, top, width, height = box
  path = f"{above}{node.name}"
  if node.children and width * height > _SMALLEST:
    for child, inner in _boxes(node.children, box):
      yield from _map(child, f"{path}/", inner, color)
    return
  place = f'x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}"'
  yield f'<rect class="{color}" {place}><title>{_text(f"{path}  {node.said or _counted(node)}")}</title></rect>'
  label = "/".join(path.split("/")[-2:])
  if height > 14 and width > _LABEL * len(label):
    yield f'<text x="{left + 3:.1f}" y="{top + 12:.1f}">{_text(label)}</text>'


def _branch(node: Node, depth: int) -> Iterator[str]:
  """A node of the tree, with what is below it."""
  if not node.children:
    said = node.said if node.leaves == 1 else f"{node.said}; {_counted(node)}"
    yield f'<div class="leaf">{_text(node.name)} <span class="note">{_text(said)}</span></div>'
    return
  opened = " open" if depth < _OPEN_LEVELS else ""
  yield f'<details{opened}><summary>{_text(node.name)} <span class="note">{_text(_counted(node))}</span></summary>'
  yield from (line for child in node.children for line in _branch(child, depth + 1))
  yield "</details>"


def _counted(node) -> str:
  return f"{folding.count(node.leaves, 'leaf', 'leaves')}, {folding.size(node.nbytes)}"


def _text(value: object) -> str:
  return html.escape(errors.escaped(str(value)))
