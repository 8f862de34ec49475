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

"""Two canonical trees side by side: what stands on one side only, and what can be compared. No I/O."""

from collections.abc import Iterable, Iterator
import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_comparator import canonical
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib

Path = canonical.Path

# How the structure of a leaf differs.
ONLY_A, ONLY_B, SHAPE, DTYPE, KEY, KIND = "only in A", "only in B", "shape", "dtype", "key type", "kind"


@dataclasses.dataclass(frozen=True)
class Aligned:
  """A path of the canonical tree.

  Attributes:
    path: the path.
    a: the leaf of A, or None.
    b: the leaf of B, or None.
    structure: how the leaves' structure differs, or None.
  """

  path: Path
  a: canonical.Leaf | None
  b: canonical.Leaf | None
  structure: str | None = None

  @property
  def is_comparable(self) -> bool:
    """Whether both are arrays of one shape. Their dtypes may differ: they are compared as numbers then."""
    return self.a is not None and self.b is not None and self.a.shape is not None and self.a.shape == self.b.shape

  @property
  def sides(self) -> tuple[canonical.Leaf, canonical.Leaf]:
    """Both leaves, of a path that both sides have."""
    assert self.a is not None and self.b is not None, self.path
    return self.a, self.b

  @property
  def places(self) -> tuple[canonical.Place, canonical.Place]:
    """Where they stand."""
    return self.sides[0].place, self.sides[1].place


@dataclasses.dataclass(frozen=True)
class Batch:
  """Leaves that are compared together, so that a stored array that holds many of them is decoded once.

  Attributes:
    side: 0 or 1, the side (A or B) that the stored array belongs to.
    source: the path of the stored array.
    leaves: what is compared.
  """

  side: int
  source: Path
  leaves: tuple[Aligned, ...]


def align(a: canonical.Tree, b: canonical.Tree) -> list[Aligned]:
  """All paths of both trees, in A's order, then those of B alone."""
  paths = dict.fromkeys((*a.leaves, *b.leaves))
  pairs = ((path, a.leaves.get(path), b.leaves.get(path)) for path in paths)
  return [Aligned(path, one, other, _structure(one, other)) for path, one, other in pairs]


def batches(aligned: Iterable[Aligned]) -> Iterator[Batch]:
  """The leaves that can be compared, each in one batch: by the stored array, of either side, that holds most of them."""
  holders = {}
  for item in aligned:
    if item.is_comparable:
      for side, place in enumerate(item.places):
        holders.setdefault((side, place.source), []).append(item)
  done = set()
  for (side, source), items in sorted(holders.items(), key=lambda holder: -len(holder[1])):
    left = tuple(item for item in items if item.path not in done)
    done.update(item.path for item in left)
    if left:
      yield Batch(side, source, left)


def _structure(a: canonical.Leaf | None, b: canonical.Leaf | None) -> str | None:
  """How two leaves' structure differs."""
  if a is None or b is None:
    return ONLY_B if a is None else ONLY_A
  if (a.shape is None) != (b.shape is None):
    return KIND
  if a.shape != b.shape:
    return SHAPE
  # The converter casts the step among these; Orbax keeps a Python integer as an int64.
  is_step = a.part == b.part == canonical.STEP and {str(a.dtype), str(b.dtype)} <= plan_lib.STEP_DTYPES
  if a.dtype != b.dtype and not is_step:
    return DTYPE
  return KEY if a.key != b.key else None
