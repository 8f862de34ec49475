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

"""The outcomes as a tree of names, for the report and the page."""

from collections.abc import Iterable, Iterator
import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_comparator import result


@dataclasses.dataclass
class Node:
  """A name in the tree, with what is below it.

  Attributes:
    name: the last key of its path.
    outcome: what was found, if it is a leaf.
    children: what is below, the worst first.
  """

  name: str
  outcome: result.Outcome | None = None
  children: list["Node"] = dataclasses.field(default_factory=list)

  def leaves(self) -> Iterator[result.Outcome]:
    """All leaves at and below the node."""
    if self.outcome is not None:
      yield self.outcome
    for child in self.children:
      yield from child.leaves()

  @property
  def worst(self) -> result.Outcome:
    """The worst of them."""
    return max(self.leaves(), key=lambda outcome: outcome.badness)


def build(outcomes: Iterable[result.Outcome]) -> list[Node]:
  """The trees at the top; beside each other, the worst comes first and equal ones keep their order."""
  top, nodes = [], {}
  for outcome in outcomes:
    siblings, path = top, outcome.aligned.path
    for i, name in enumerate(path, 1):
      if path[:i] not in nodes:
        nodes[path[:i]] = Node(name)
        siblings.append(nodes[path[:i]])
      siblings = nodes[path[:i]].children
    nodes[path].outcome = outcome
  _sort(top)
  return top


def _sort(nodes: list[Node]) -> tuple[float, ...]:
  """Sorts the worst first, all the way down; returns how bad the worst is."""
  badness = {id(node): max(_sort(node.children), node.outcome.badness if node.outcome else ()) for node in nodes}
  nodes.sort(key=lambda node: badness[id(node)], reverse=True)
  return max(badness.values(), default=())
