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

"""The state that a plan writes: its leaves' paths, its lists and its empty nodes."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import arrangement
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import goal as goal_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles as roles_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import optimizer_tree
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path
Variable = roles_lib.Variable


@dataclasses.dataclass(frozen=True)
class Source:
  """What the source is.

  Attributes:
    state: its abstract state.
    layout: its layout.
    roles: the role of each leaf.
    dropped: the leaves without a role, each with the reason.
  """

  state: abstract_state.AbstractState
  layout: layouts.StateLayout
  roles: roles_lib.Roles
  dropped: Mapping[Path, str]


@dataclasses.dataclass(frozen=True)
class Selected:
  """What is kept of the source.

  Attributes:
    paths: the path of each role's leaf in the source.
    collections: the collection of each variable in the target.
    dropped: the leaves that are left out, each with the reason.
  """

  paths: Mapping[roles_lib.Role, Path]
  collections: Mapping[Variable, str]
  dropped: Mapping[Path, str]

  @property
  def subtrees(self) -> frozenset[Path]:
    """The optimizer's params-like subtrees."""
    of = (role.subtree for role in self.paths if isinstance(role, Variable))
    return frozenset(subtree for subtree in of if subtree is not None)


def build(
    source: Source,
    selected: Selected,
    goal: goal_lib.Goal,
    arranged: Sequence[arrangement.Arranged],
    known_nodes: Mapping[Path, Any],
) -> tuple[abstract_state.AbstractState, dict[Path, leaf_moves.Move], Mapping[Path, Any]]:
  """The target's abstract state, its moves, and the empty optimizer nodes to record.

  Args:
    source: the source.
    selected: what is kept of it.
    goal: the goal.
    arranged: the target's variables.
    known_nodes: the optimizer's empty nodes that an earlier conversion recorded, by Linen path below `opt_state`.

  Raises:
    PathCollisionError: two leaves would land on one path.
    LayoutError: a leaf would be mistaken for a box.
    StepError: the step is not an integer scalar.
  """
  is_linen, bare_subtrees = source.layout.framework == "linen", _bare_subtrees(source, selected, goal, arranged)
  leaves, moves = _target_leaves(source.state, goal.layout, bare_subtrees, selected.paths, arranged)
  if goal.keeps_form:
    lists = _with_children(source.state.lists, leaves) if is_linen else frozenset()
    target = abstract_state.AbstractState(leaves, lists)
  else:
    nodes = known_nodes or (optimizer_tree.decay_mask(selected.subtrees) if goal.adamw_mask else {})
    target = _structured(leaves, source, selected, goal.layout, bare_subtrees, nodes)
  _refuse_ambiguous(target, moves, goal.layout)
  return target, moves, _empty_optimizer_nodes(source, selected) if is_linen else known_nodes


def _bare_subtrees(source, selected, goal, arranged) -> frozenset[Path]:
  """The params-like subtrees that have no collection level in the target."""
  if goal.keeps_form:
    return source.roles.bare_subtrees if source.layout.framework == "linen" else frozenset()
  if goal.layout.nnx_optimizer:
    return optimizer_tree.bare_subtrees(selected.subtrees)
  # With fp8 state, Flax's `TrainState.create` hands optax the params collection itself.
  fp8 = [item.variable for item in arranged if variable_kinds.linen_collection(item.variable.path) == variable_kinds.FP8]
  is_bare = fp8 and all(variable.collection == variable_kinds.FP8 and variable.subtree is None for variable in fp8)
  return selected.subtrees if is_bare else frozenset()


def _target_leaves(state, target_layout, bare_subtrees, source_paths, arranged):
  """The target's leaves and moves, before empty nodes are put back."""
  leaves, moves = {}, {}
  for item in arranged:
    path = roles_lib.write(item.variable, target_layout, bare_subtrees)
    _put(leaves, path, item.leaf)
    if item.move is not None:
      moves[path] = _located(item.move, source_paths)
  for role, source_path in source_paths.items():
    if isinstance(role, Variable):
      continue
    leaf, path = state.leaves[source_path], roles_lib.write(role, target_layout)
    _put(leaves, path, _cast_step(source_path, leaf, target_layout) if isinstance(role, roles_lib.Step) else leaf)
    if not abstract_state.is_empty(leaf):
      moves[path] = leaf_moves.copy(source_path)
  return leaves, moves


def _put(leaves, path, leaf):
  if path in leaves:
    raise errors.PathCollisionError(path, "one leaf to land here", "two", "Remove one of them from the source.")
  leaves[path] = leaf


def _located(move, source_paths) -> leaf_moves.Move:
  """The move with source paths in place of roles."""
  pieces, other_axes = (tuple((source_paths[source], of) for source, of in it) for it in (move.pieces, move.other_axes))
  return leaf_moves.Move(pieces, move.taken, move.order, move.stacked, move.sizes, other_axes)


def _cast_step(path, leaf, layout):
  """The step's leaf in the target: an integer scalar of the layout's dtype, or a Python integer as it is."""
  if not abstract_state.is_array(leaf):
    if isinstance(leaf, int) and not isinstance(leaf, bool):
      return leaf
  elif tuple(leaf.shape) == () and str(leaf.dtype) in plan_lib.STEP_DTYPES:
    return jax.ShapeDtypeStruct((), np.dtype(layout.step_dtype))
  found = f"shape {tuple(leaf.shape)} {leaf.dtype}" if abstract_state.is_array(leaf) else repr(leaf)
  raise errors.StepError(
      path, "an integer scalar", found, "The checkpoint is damaged, or its step is of an unknown kind."
  )


def _refuse_ambiguous(target, moves, layout):
  """Refuses plain leaves that look boxed: a reader would take `gate/value` for the box of `gate`.

  Raises:
    LayoutError: naming the source of the first leaf whose own name is `value`.
  """
  if layout.framework != "nnx":
    return
  is_plain = lambda path: path[0] != layouts.LINEN_AUX and not roles_lib.in_boxed_part(path, layout)
  for path in sorted(layouts.boxes({path: leaf for path, leaf in target.leaves.items() if is_plain(path)})):
    raise errors.LayoutError(
        moves[path].sources[0],
        "boxes around all leaves, in a state that has a leaf whose own name is value",
        f"the layout {layout}, where {'/'.join(path)} would be taken for a box",
        "Pass --nnx_values=all_boxed.",
    )


def _empty_optimizer_nodes(source, selected) -> dict[Path, Any]:
  """The optimizer's empty nodes outside params-like subtrees, by their path below `opt_state`."""
  of = {role.path: path for role, path in selected.paths.items() if isinstance(role, roles_lib.OptimizerLeaf)}
  leaves = {opt_path: source.state.leaves[path] for opt_path, path in of.items()}
  return {opt_path: leaf for opt_path, leaf in leaves.items() if abstract_state.is_empty(leaf)}


def _structured(leaves, source, selected, target_layout, bare_subtrees, empty_nodes):
  """The target state, with the lists and the empty nodes that its layout has."""
  if target_layout.opt_state is None:
    return abstract_state.AbstractState(leaves)
  if target_layout.framework == "nnx" or target_layout.nnx_optimizer:
    # Except a wholly empty opt_state, which MaxText writes into checkpoints for decoding.
    nodes = filter(None, _empty_optimizer_nodes(source, selected))
    absent = {roles_lib.write(roles_lib.OptimizerLeaf(path), target_layout) for path in nodes}
    leaves = {path: leaf for path, leaf in leaves.items() if path not in absent}
  prefix = target_layout.opt_state
  # In the Linen layout of the NNX trainer, a node is itself empty if it is recorded to have had empty children.
  parents = {(*prefix, *path[:i]) for path in empty_nodes for i in range(len(path))}
  leaves = {path: leaf for path, leaf in leaves.items() if path not in parents or not abstract_state.is_empty(leaf)}
  opt_paths = {path[len(prefix) :] for path in leaves if path[: len(prefix)] == prefix}
  has_optimizer = any(isinstance(role, (roles_lib.OptimizerLeaf, roles_lib.Step)) for role in selected.paths)
  if target_layout.framework == "nnx" or not has_optimizer:
    return abstract_state.AbstractState(leaves)
  if target_layout.nnx_optimizer:
    empties, lists = optimizer_tree.nnx_trainer_structure(opt_paths)
  else:
    empties, lists = optimizer_tree.linen_structure(opt_paths, selected.subtrees, empty_nodes)
  holes = _mask_holes(leaves, target_layout, source.roles.masked_subtrees, bare_subtrees)
  leaves = leaves | holes | {(*prefix, *path): leaf for path, leaf in empties.items()}
  return abstract_state.AbstractState(leaves, frozenset((*prefix, *path) for path in lists))


def _mask_holes(leaves, layout, masked_subtrees, bare_subtrees) -> dict[Path, None]:
  """The `MaskedNode`s, None on disk, that stand for the params that a masked params-like subtree leaves out."""
  prefix = (*layout.variables, layouts.PARAMS)
  params = [path[len(prefix) :] for path in leaves if path[: len(prefix)] == prefix]
  holes = (Variable(layouts.PARAMS, path, subtree) for subtree in masked_subtrees for path in params)
  paths = (roles_lib.write(hole, layout, bare_subtrees) for hole in holes)
  return {path: None for path in paths if path not in leaves}


def _with_children(lists, leaves) -> frozenset[Path]:
  return lists & abstract_state.inner_nodes(leaves)
