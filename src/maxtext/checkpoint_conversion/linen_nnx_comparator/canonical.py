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

"""The canonical tree: one path for each leaf, whatever layout and arrangement a checkpoint has. No I/O.

It is the target of the converter's plan to a plain `TrainStateNNX` with a module for each layer: of all layouts the one
without collections, boxes, lists and empty nodes, and the one that every arrangement of layers can be taken apart into
from the tree alone.
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path

PARAMS, OPTIMIZER, STEP, AUXILIARY = "params", "optimizer", "step", "auxiliary"
PARTS = (PARAMS, OPTIMIZER, STEP, AUXILIARY)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a canonical leaf stands in a checkpoint: a leaf, or one index along some axes of it.

  Attributes:
    source: the path of the checkpoint's leaf.
    axes: the layer axes of that leaf, ascending; () where it is taken whole.
    index: the index along each.
  """

  source: Path
  axes: tuple[int, ...] = ()
  index: tuple[int, ...] = ()

  def __str__(self) -> str:
    where = "".join(f"[{index} of axis {axis}]" for axis, index in zip(self.axes, self.index))
    return "/".join(self.source) + where


@dataclasses.dataclass(frozen=True)
class Leaf:
  """A leaf of the canonical tree.

  Attributes:
    place: where it stands in the checkpoint.
    part: `params`, `optimizer`, `step` or `auxiliary`.
    shape: its shape; None for what is no array.
    dtype: the dtype that is stored; None for what is no array.
    value: the leaf itself, if it is no array.
    key: the implementation of the typed PRNG key whose data this is, or None.
  """

  place: Place
  part: str
  shape: tuple[int, ...] | None
  dtype: np.dtype | None
  value: Any = None
  key: str | None = None

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize if self.shape is not None and self.dtype is not None else 0

  def __str__(self) -> str:
    if self.shape is None:
      return repr(self.value)
    return f"{self.dtype} {self.shape}" + (f" {self.key} key" if self.key else "")


@dataclasses.dataclass(frozen=True)
class Tree:
  """A checkpoint's canonical tree.

  Attributes:
    leaves: its leaves by canonical path.
    layout: what the converter calls the checkpoint's layout.
    left_out: the checkpoint's leaves that were not asked for, with the reason.
  """

  leaves: Mapping[Path, Leaf]
  layout: str
  left_out: Mapping[Path, str] = dataclasses.field(default_factory=dict)

  @property
  def is_scanned(self) -> bool:
    """Whether a leaf of the checkpoint holds several layers."""
    return any(leaf.place.axes for leaf in self.leaves.values())


def by_plan(
    state: abstract_state.AbstractState, keys: Mapping[Path, str], options: options_lib.PlanOptions, *, apart: bool
) -> Tree:
  """The canonical tree of a checkpoint.

  Args:
    state: its abstract state.
    keys: the implementation of each typed PRNG key, by path.
    options: of these, param_scan_axis, nnx_aux and params_only count.
    apart: whether to take all layers apart; if not, scanned layers stay as they are, for those whose order is unknown.

  Raises:
    ConversionError: the converter has no plan for it.
  """
  options = dataclasses.replace(
      options,
      direction="linen_to_nnx" if layouts.detect(state).framework == "linen" else "nnx_to_nnx",
      scan_layers=False if apart else None,
      layer_naming="flat",
      nnx_values="all_boxed",  # In which alone a leaf may have the name `value`.
  )
  plan = planner.plan_conversion(state, options, planner.Run())
  by_path = leaf_roles.read(state, plan.source_layout).by_path
  leaves = {}
  for path, move in plan.moves.items():
    place = _place(move)
    leaf = _leaf(state, keys, place, _part(by_path[place.source]))
    if leaf.shape is not None:
      leaf = dataclasses.replace(leaf, shape=tuple(plan.target.leaves[path].shape))
    leaves[_below_model(path, plan.target_layout)] = leaf
  return Tree(leaves, str(plan.source_layout), plan.dropped)


def as_it_stands(state: abstract_state.AbstractState, keys: Mapping[Path, str]) -> Tree:
  """The checkpoint's own tree in place of the canonical one, for two checkpoints of one layout."""
  part = lambda path: OPTIMIZER if {"opt_state", "optimizer"} & set(path[:2]) else PARAMS
  leaves = {
      path: _leaf(state, keys, Place(path), STEP if path[-1] == "step" else part(path))
      for path, leaf in state.leaves.items()
      if not abstract_state.is_empty(leaf)
  }
  return Tree(leaves, str(layouts.detect(state)))


def _place(move) -> Place:
  ((source, index),) = move.pieces
  return Place(source, move.taken, index)


def _leaf(state, keys, place, part) -> Leaf:
  leaf = state.leaves[place.source]
  if not abstract_state.is_array(leaf):
    return Leaf(place, part, None, None, leaf)
  return Leaf(place, part, tuple(leaf.shape), np.dtype(leaf.dtype), key=keys.get(place.source))


def _part(role) -> str:
  if isinstance(role, leaf_roles.Step):
    return STEP
  if isinstance(role, leaf_roles.OptimizerLeaf) or role.subtree is not None:
    return OPTIMIZER
  return PARAMS if role.collection == layouts.PARAMS else AUXILIARY


def _below_model(path, layout) -> Path:
  """The path in a plain train state, for layouts that hold the params alone too."""
  path = path[:-1] if leaf_roles.in_boxed_part(path, layout) else path
  if layout.opt_state is not None or path[0] == layouts.LINEN_AUX:
    return path
  return (*layouts.NNX_PLAIN.variables, *path[len(layout.variables) :])
