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

"""Roles: what a leaf is, independent of its path.

A leaf is a variable of the model, the same variable's entry in a params-like optimizer subtree, another optimizer leaf,
or the step. `read` gives each leaf of a layout its role; `write` says where a layout keeps a role. So a conversion
between any two layouts is `path -> role -> path`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
from typing import NamedTuple

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path
StateLayout = layouts.StateLayout

PARAMS, NNX_AUX, LINEN_AUX, VALUE = layouts.PARAMS, layouts.NNX_AUX, layouts.LINEN_AUX, layouts.VALUE

# Variables of these names are `nnx.Param` in every MaxText model, so they are Params even without moments.
_PARAM_NAMES = frozenset({"kernel", "embedding", "scale"})


class Variable(NamedTuple):  # A NamedTuple, because it is hashed and compared many times per leaf.
  """A variable of the model, or its entry in a params-like subtree of the optimizer.

  Attributes:
    collection: `params`, `nnx_aux` for NNX state that is not a Param, or the name of another Linen collection.
    path: its path inside the model, `W` in LAYOUTS tables: `decoder/layers/mlp/wi_0/kernel`.
    subtree: the path, below `opt_state`, of the params-like subtree; None for the model's own variable.
  """

  collection: str
  path: Path
  subtree: Path | None = None


@dataclasses.dataclass(frozen=True)
class OptimizerLeaf:
  """An optimizer leaf outside params-like subtrees, by its path below `opt_state`."""

  path: Path


@dataclasses.dataclass(frozen=True)
class Step:
  """The step."""


@dataclasses.dataclass(frozen=True)
class Apart:
  """A leaf that belongs to no single train state, by its path."""

  path: Path


Role = Variable | OptimizerLeaf | Step | Apart


@dataclasses.dataclass(frozen=True)
class Roles:
  """What `read` found.

  Attributes:
    by_path: the role of every leaf, including the empty nodes of model and optimizer.
    bare_subtrees: the params-like subtrees without a collection level: in NNX all of them; in the Linen layout nested
      ones, by a defect of MaxText 0.2.3 to 0.2.5.
    masked_subtrees: those that cover only part of the params, on purpose, because they are below `optax.masked`.
  """

  by_path: Mapping[Path, Role]
  bare_subtrees: frozenset[Path]
  masked_subtrees: frozenset[Path]


def read(state: abstract_state.AbstractState, layout: StateLayout) -> Roles:
  """Gives every leaf of `state` its role.

  Whether the optimizer's state follows the weights is checked by `moments.check`.

  Raises:
    UnaccountedLeafError: a leaf is where the layout has no place for it.
  """
  by_path, opt_paths = {}, {}
  for path in state.leaves:
    is_boxed_step = layout.framework == "nnx" and path == (*(layout.step or ()), VALUE)
    inner = path[:-1] if is_boxed_step or (path[-1] == VALUE and in_boxed_part(path, layout)) else path
    role = _role_outside_optimizer(inner, layout)
    if role is not None:
      by_path[path] = role
    elif layout.opt_state is not None and (inner == layout.opt_state or layouts.below(inner, layout.opt_state)):
      opt_paths[path] = inner[len(layout.opt_state) :]
    elif not abstract_state.is_empty(state.leaves[path]):
      raise _unaccounted(path, layout)
  variables = {role for role in by_path.values() if isinstance(role, Variable)}
  subtrees = _params_like_subtrees(opt_paths.values(), variables)
  for path, opt_path in opt_paths.items():
    by_path[path] = _optimizer_role(opt_path, subtrees, variables)
  masked = frozenset(node for node in subtrees if _is_masked(node, opt_paths.values()))
  if layout.framework == "nnx" or layout.aux_among_params:
    by_path = _separate_aux(by_path, state.leaves, masked)
  return Roles(by_path, frozenset(node for node, level in subtrees.items() if not level), masked)


def write(role: Role, layout: StateLayout, bare_subtrees: frozenset[Path] = frozenset()) -> Path:
  """The path at which `layout` keeps the leaf of this role.

  Args:
    role: what the leaf is.
    layout: the layout to write.
    bare_subtrees: in Linen, the params-like subtrees to write without a collection level.
  """
  if isinstance(role, Variable):
    return _write_linen(role, layout, bare_subtrees) if layout.framework == "linen" else _write_nnx(role, layout)
  assert layout.opt_state is not None and layout.step is not None, f"{layout} has no place for {role}"
  path = layout.step if isinstance(role, Step) else (*layout.opt_state, *role.path)
  return (*path, VALUE) if layout.boxed_optimizer else path


def in_boxed_part(path: Path, layout: StateLayout) -> bool:
  """Whether leaves are boxed in the part of the layout that `path` belongs to."""
  if path[0] == LINEN_AUX:
    return False
  if layout.boxed_variables and layouts.below(path, layout.variables) and not _is_step_or_optimizer(path, layout):
    return True
  return layout.boxed_optimizer and _is_step_or_optimizer(path, layout)


def _is_step_or_optimizer(path, layout) -> bool:
  return any(part is not None and layouts.below(path, part) for part in (layout.opt_state, layout.step))


def _role_outside_optimizer(path, layout) -> Role | None:
  """The role of a leaf outside the optimizer's state, or None."""
  if path == layout.step:
    return Step()
  if path[0] in layout.apart:
    return Apart(path)
  if layout.framework == "linen":
    if layouts.below(path, layout.variables) and len(path) > 2:
      return Variable(path[1], path[2:])
    if layouts.below(path, (NNX_AUX, "model")):
      return Variable(NNX_AUX, path[2:])
    return None
  if layouts.below(path, (LINEN_AUX, "params")) and len(path) > 3:
    return Variable(path[2], path[3:])
  if layout.opt_state is not None and layouts.below(path, (LINEN_AUX, "opt_state")):
    return _linen_aux_moment(path[2:])
  if not _is_step_or_optimizer(path, layout) and layouts.below(path, layout.variables):
    return Variable(PARAMS, path[len(layout.variables) :])
  return None


def _linen_aux_moment(path) -> Variable | None:
  """The moment at `<subtree>/collections/<collection>/W` below `linen_aux/opt_state`, where `_write_nnx` puts it."""
  if "collections" not in path[:-2]:
    return None
  i = path.index("collections")
  return Variable(path[i + 1], path[i + 2 :], path[:i])


def _write_linen(role, layout, bare_subtrees) -> Path:
  if role.collection == NNX_AUX:
    is_param_like = layout.aux_among_params and not variable_kinds.is_stripped(role.path)
    return (*layout.variables, PARAMS, *role.path) if is_param_like else (NNX_AUX, "model", *role.path)
  if role.subtree is None:
    return (*layout.variables, role.collection, *role.path)
  level = () if role.subtree in bare_subtrees else (role.collection,)
  return (*layout.opt_state, *role.subtree, *level, *role.path)


def _write_nnx(role, layout) -> Path:
  if role.collection not in (PARAMS, NNX_AUX):
    if role.subtree is None:
      return (LINEN_AUX, "params", role.collection, *role.path)
    return (LINEN_AUX, "opt_state", *role.subtree, "collections", role.collection, *role.path)
  if role.subtree is None:
    path, boxed = (*layout.variables, *role.path), layout.boxed_variables
  else:
    path, boxed = (*layout.opt_state, *role.subtree, *role.path), layout.boxed_optimizer
  return (*path, VALUE) if boxed else path


def _params_like_subtrees(opt_paths: Iterable[Path], variables: Iterable[Variable]) -> dict[Path, bool]:
  """The params-like subtrees of the optimizer: for each, whether a collection level (`mu/params/W`) stands above W.

  They are recognised by the weights' paths below them, never by a name such as `mu`.
  """
  weights = {variable.path for variable in variables if variable.collection != NNX_AUX}
  levelled = {(variable.collection, *variable.path) for variable in variables if variable.collection != NNX_AUX}
  subtrees = {}
  for path in opt_paths:
    for i in range(1, len(path)):
      if path[i:] in levelled or path[i:] in weights:
        subtrees.setdefault(path[:i], path[i:] in levelled)
        break
  return subtrees


def _optimizer_role(opt_path, subtrees, variables) -> Role:
  """The role of an optimizer leaf: a weight's entry in a params-like subtree, or a leaf by itself."""
  for i in range(1, len(opt_path)):
    if opt_path[:i] in subtrees:
      below = opt_path[i:]
      variable = Variable(below[0], below[1:]) if subtrees[opt_path[:i]] else Variable(PARAMS, below)
      return variable._replace(subtree=opt_path[:i]) if variable in variables else OptimizerLeaf(opt_path)
  return OptimizerLeaf(opt_path)


def _is_masked(node: Path, opt_paths: Iterable[Path]) -> bool:
  """Whether `node` is below `optax.masked` (a lone `inner_state`) or `optax.multi_transform` (`inner_states`)."""
  if "inner_states" in node:
    return True
  lone = lambda above: all(path[len(above)] == "inner_state" for path in opt_paths if layouts.below(path, above))
  return any(key == "inner_state" and lone(node[:i]) for i, key in enumerate(node))


def _separate_aux(by_path, leaves, masked) -> dict[Path, Role]:
  """Tells NNX's Params from its other Variables, which are side by side below `model`.

  Moments prove a Param, whatever its name, because `nnx.Optimizer` keeps them for `nnx.Param` alone. Without moments,
  RNG state, batch statistics and fp8 state are known by name; anything else is a Param only if a mask may have left it
  out.
  """
  moments = [role for role in by_path.values() if isinstance(role, Variable) and role.subtree is not None]
  covered = {role.path for role in moments if role.collection == PARAMS}
  everywhere = any(role.subtree not in masked for role in moments)

  def is_aux(path, role):
    if role != Variable(PARAMS, getattr(role, "path", ())) or role.path in covered:
      return False
    if variable_kinds.is_rng_state(role.path, leaves[path]) or variable_kinds.is_batch_statistic(role.path):
      return True
    is_known = variable_kinds.linen_collection(role.path) is not None
    return is_known or (everywhere and role.path[-1] not in _PARAM_NAMES)

  return {path: role._replace(collection=NNX_AUX) if is_aux(path, role) else role for path, role in by_path.items()}


def _unaccounted(path, layout) -> errors.UnaccountedLeafError:
  return errors.UnaccountedLeafError(
      path, f"a place in the layout {layout}", "none", "Remove the leaf from the checkpoint, or report the layout."
  )
