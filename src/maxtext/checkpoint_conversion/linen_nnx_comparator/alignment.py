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

"""Canonical trees, and two of them side by side: what is on one side only, and what can be compared. No I/O.

In the canonical tree a leaf has one path, whatever the checkpoint's layout and arrangement. It is the target of the
converter's plan to a plain `TrainStateNNX` with one module per layer: the layout without collections, boxes, lists and
empty nodes, and the arrangement that every other can be taken apart into from the tree alone.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path

PARTS = PARAMS, OPTIMIZER, STEP, AUXILIARY = "params", "optimizer", "step", "auxiliary"

# What can be found of a leaf: of its values, of its structure, or that it cannot be read.
ALIKE = "alike in structure"  # All that is known if no values are compared.
EQUAL, WITHIN, DIFFERENT, UNREADABLE = "equal", "within tolerance", "different", "unreadable"
ONLY_A, ONLY_B, SHAPE, DTYPE, KEY, KIND = "only in A", "only in B", "shape", "dtype", "key type", "kind"
STATUSES = ALIKE, EQUAL, WITHIN, DIFFERENT, ONLY_A, ONLY_B, SHAPE, DTYPE, KEY, KIND, UNREADABLE


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the canonical tree.

  Attributes:
    move: how it is made of a leaf of the checkpoint: it is that leaf, or one index along its layer axes.
    part: `params`, `optimizer`, `step` or `auxiliary`.
    stored: that leaf: its shape and dtype, or what it is if it is no array.
    key: the implementation of the typed PRNG key whose data this is, or None.
  """

  move: leaf_moves.Move
  part: str
  stored: Any
  key: str | None = None

  @property
  def source(self) -> Path:
    """The path of the checkpoint's leaf."""
    return self.move.sources[0]

  @property
  def place(self) -> str:
    """Where it is in the checkpoint, for a person."""
    where = (f"[{index} of axis {axis}]" for axis, index in zip(self.move.taken, self.move.pieces[0][1]))
    return "/".join(self.source) + "".join(where)

  @property
  def shape(self) -> tuple[int, ...] | None:
    """Its shape; None if it is not an array."""
    return self.move.shape(self.stored.shape) if abstract_state.is_array(self.stored) else None

  @property
  def dtype(self) -> str | None:
    """The dtype that is stored; None if it is not an array."""
    return str(self.stored.dtype) if abstract_state.is_array(self.stored) else None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.stored.dtype.itemsize if self.shape is not None else 0

  def __str__(self) -> str:
    if self.shape is None:
      return repr(self.stored)
    return f"{self.dtype} {self.shape}" + (f" {self.key} key" if self.key else "")


@dataclasses.dataclass(frozen=True)
class Tree:
  """A checkpoint's canonical tree, by path; the leaves left out, with the reason; its layout and its folder."""

  leaves: Mapping[Path, Leaf]
  left_out: Mapping[Path, str]
  layout: str
  is_scanned: bool
  path: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
  """A leaf of A's and B's canonical trees, or of one of them, and what was found of it.

  Attributes:
    keys: its path in the canonical tree.
    structure: how the structures of `a` and `b` differ, or that one is unreadable; otherwise None.
    values: how the values differ, if it `has_values`.
    failure: why it could not be read, or None.
    is_of_structure: whether only its structure is compared.
  """

  keys: Path
  a: Leaf | None
  b: Leaf | None
  structure: str | None = None
  values: difference.Difference = difference.Difference()
  failure: str | None = None
  is_of_structure: bool = False

  @property
  def path(self) -> str:
    return "/".join(self.keys)

  @property
  def sides(self) -> tuple[Leaf, Leaf]:
    """Both leaves, if both sides have the path."""
    assert self.a and self.b, self.path
    return self.a, self.b

  @property
  def part(self) -> str:
    return next(leaf.part for leaf in (self.a, self.b) if leaf)

  @property
  def has_values(self) -> bool:
    """Whether values can be compared; of different dtypes, as numbers."""
    return not self.is_of_structure and self.structure in (None, DTYPE, KEY)

  @property
  def is_array(self) -> bool:
    """Whether both are arrays of one shape."""
    return self.has_values and self.sides[0].shape is not None

  @property
  def status(self) -> str:
    """`equal`, `within tolerance`, `different`, `unreadable`, how the structure differs, or that it is alike."""
    if self.structure or self.is_of_structure:
      return self.structure or ALIKE
    return DIFFERENT if self.values.outside else WITHIN if self.values.differing else EQUAL

  @functools.cached_property
  def badness(self) -> tuple[float, ...]:
    """A key that sorts leaves from the best to the worst.

    Missing, structurally different or unreadable leaves are worse than values that differ. Among the latter, NaNs or
    infinities on one side only are worst, then the largest relative difference counts, then the share of its elements.
    """
    if not self.has_values:
      return (4.0 if self.structure else 0.0,)
    rank = 3.0 if self.structure else float((EQUAL, WITHIN, DIFFERENT).index(self.status))
    found = self.values
    relative = found.largest_relative.value if found.largest_relative else 0.0
    return (rank, float(found.not_finite > 0), relative, found.differing / max(1, found.elements))


def by_plan(
    state: abstract_state.AbstractState, keys: Mapping[Path, str], options: options_lib.PlanOptions, scan_layers: bool
) -> Tree:
  """The canonical tree of a checkpoint.

  Args:
    state: its abstract state.
    keys: the implementation of each typed PRNG key, by path.
    options: param_scan_axis, nnx_aux and params_only are used.
    scan_layers: False takes all layers apart; True leaves scanned layers as they are, in case their order is unknown.

  Raises:
    ConversionError: the converter has no plan for it.
  """
  options = dataclasses.replace(
      options,
      direction="linen_to_nnx" if layouts.detect(state).framework == "linen" else "nnx_to_nnx",
      scan_layers=None if scan_layers else False,  # None keeps pipelines too.
      layer_naming="flat",
      nnx_values="all_boxed",  # Otherwise no leaf may be named `value`.
  )
  plan = planner.plan_conversion(state, options, planner.Run())
  roles = leaf_roles.read(state, plan.source_layout).by_path
  leaves = {}
  for path, move in plan.moves.items():
    source = move.sources[0]
    if move.stacked:
      raise layer_stacks.unlike(
          source, "layers that are all scanned, or all known by their order", "some that are neither"
      )
    leaf = Leaf(move, _part(roles[source]), state.leaves[source], keys.get(source))
    leaves[_below_model(path, plan.target_layout)] = leaf
  is_scanned = bool(plan.source_scan_layers) or any(move.taken for move in plan.moves.values())
  return Tree(leaves, plan.dropped, str(plan.source_layout), is_scanned)


def as_it_stands(state: abstract_state.AbstractState, keys: Mapping[Path, str]) -> Tree:
  """The checkpoint's own tree instead of the canonical one, for two checkpoints of one layout."""
  part = lambda path: OPTIMIZER if {"opt_state", "optimizer"} & set(path[:2]) else PARAMS
  leaves = {
      path: Leaf(leaf_moves.copy(path), STEP if path[-1] == "step" else part(path), leaf, keys.get(path))
      for path, leaf in state.leaves.items()
      if not abstract_state.is_empty(leaf)
  }
  return Tree(leaves, {}, str(layouts.detect(state)), False)


def without_rngs(tree: Tree) -> Tree:
  """The tree without the keys and counts of its RNG streams."""
  boxed = lambda path: path[:-1] if path[-1] == layouts.VALUE else path
  rngs = {path for path, leaf in tree.leaves.items() if variable_kinds.is_rng_state(boxed(path), leaf.stored)}
  leaves = {path: leaf for path, leaf in tree.leaves.items() if path not in rngs}
  left_out = {tree.leaves[path].source: "--ignore_rngs" for path in rngs}
  return dataclasses.replace(tree, leaves=leaves, left_out={**tree.left_out, **left_out})


def align(a: Tree, b: Tree, *, structure_only: bool = False) -> list[Pair]:
  """All paths of both trees: A's in order, then those only in B."""
  paths = dict.fromkeys((*a.leaves, *b.leaves))
  return [_pair(path, a.leaves.get(path), b.leaves.get(path), structure_only) for path in paths]


def _pair(path: Path, a: Leaf | None, b: Leaf | None, structure_only: bool) -> Pair:
  """A pair, as far as metadata say, which is everything for leaves that are not arrays."""
  pair = Pair(path, a, b, _structure(a, b), is_of_structure=structure_only)
  if pair.structure is not None or pair.is_array or structure_only:
    return pair
  return dataclasses.replace(pair, values=difference.of_objects(*(leaf.stored for leaf in pair.sides)))


def _structure(a: Leaf | None, b: Leaf | None) -> str | None:
  """How two leaves' structure differs."""
  if a is None or b is None:
    return ONLY_B if a is None else ONLY_A
  if (a.shape is None) != (b.shape is None):
    return KIND
  if a.shape != b.shape:
    return SHAPE
  # The converter casts the step among these; Orbax keeps a Python integer as an int64.
  is_step = a.part == b.part == STEP and {a.dtype, b.dtype} <= plan_lib.STEP_DTYPES
  if a.dtype != b.dtype and not is_step:
    return DTYPE
  return KEY if a.key != b.key else None


def _part(role) -> str:
  if isinstance(role, leaf_roles.Step):
    return STEP
  if isinstance(role, leaf_roles.OptimizerLeaf) or role.subtree is not None:
    return OPTIMIZER
  return PARAMS if role.collection == layouts.PARAMS else AUXILIARY


def _below_model(path, layout) -> Path:
  """The path in a plain train state, also for layouts of params alone."""
  path = path[:-1] if leaf_roles.in_boxed_part(path, layout) else path
  if layout.opt_state is not None or path[0] == layouts.LINEN_AUX:
    return path
  return (*layouts.NNX_PLAIN.variables, *path[len(layout.variables) :])
