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

"""Plans a conversion from the source's abstract state. Every refusal that metadata can decide happens here.

The passes: `read` what the source is; `goal.set_goal`; `select` the leaves to keep; `arrange` their layers;
`casts.cast` on request; `target_state.build`. Each takes the values of those before it.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import arrangement
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import deepseek
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_finding
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import casts
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import goal as goal_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import target_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles as roles_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import moments
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix_target
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path
Variable = roles_lib.Variable
Goal = goal_lib.Goal
Run = goal_lib.Run
Source = target_state.Source
Selected = target_state.Selected


def plan_conversion(
    state: abstract_state.AbstractState,
    options: options_lib.PlanOptions,
    run: Run,
    empty_nodes: Mapping[Path, Any] | None = None,
) -> plan_lib.Plan:
  """The validated plan of a conversion.

  Args:
    state: the abstract state of the source.
    options: what the target is to be.
    run: the run that will resume from it.
    empty_nodes: empty optimizer nodes known from an earlier conversion, by Linen path below `opt_state`.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  layout = layouts.detect(state)
  goal = goal_lib.set_goal(layout, options, run)
  source = read(state, layout, params_only=goal.params_only)
  selected = select(source, goal)
  if goal.is_tunix:
    tunix_target.check(selected.paths, selected.collections, state.leaves)
  return plan(source, goal, selected, empty_nodes or {})


@abstract_state.uncollected()
def plan(source: Source, goal: Goal, selected: Selected, empty_nodes: Mapping[Path, Any]) -> plan_lib.Plan:
  """The validated plan of what has been selected. From here on, the release does not matter."""
  arranged, before, after = arrange(source, selected, goal)
  arranged = casts.cast(arranged, goal, selected.paths)
  target, moves, nodes = target_state.build(source, selected, goal, arranged, empty_nodes)
  flag = layer_stacks.is_scanned(after, [item.variable.path for item in arranged])
  result = plan_lib.Plan(
      source.state,
      target,
      moves,
      selected.dropped,
      source_layout=source.layout,
      target_layout=goal.layout,
      empty_nodes=nodes,
      scan_layers=goal.scan_layers if flag is None and goal.schedule is not None else flag,
      cast_to=frozenset(filter(None, (goal.weight_dtype, goal.optimizer_dtype))),
      source_scan_layers=layer_stacks.is_scanned(before, [it.path for it in selected.paths if isinstance(it, Variable)]),
  )
  result.validate()
  return result


@abstract_state.uncollected()
def read(state: abstract_state.AbstractState, layout: layouts.StateLayout, *, params_only: bool) -> Source:
  """The source with the role of each leaf, unwrapped if it is Tunix's."""
  roles = roles_lib.read(state, layout)
  if not params_only:
    moments.check(roles, state.leaves, layout)
  dropped = {}
  if layouts.is_tunix(layout):
    roles, dropped = tunix.unwrap(roles, state.leaves, params_only)
  return Source(state, layout, roles, dropped)


def select(source: Source, goal: Goal) -> Selected:
  """The leaves to keep, each variable's collection in the target, and the leaves left out, with the reason."""
  variables = [role for role in source.roles.by_path.values() if isinstance(role, Variable)]
  is_trained = any(variable.subtree is not None for variable in variables)
  collections = {
      variable: variable.collection if goal.keeps_form else _collection(variable, goal.layout, is_trained)
      for variable in variables
  }
  reasons = {path: _reason(role, collections, goal) for path, role in source.roles.by_path.items()}
  if goal.is_tunix:
    foreign = tunix.foreign_rng_state(source.roles, source.state.leaves, tunix_target.KEY_WORDS)
    reasons |= dict.fromkeys(foreign, tunix_target.RNG_REASON)
  kept = {role: path for path, role in source.roles.by_path.items() if not reasons[path]}
  if goal.release is not None:
    releases.refuse_other_mtp((it.path for it in kept if isinstance(it, Variable)), goal.release)
    former = _former_params(kept, goal.decoder, goal.release)
    collections |= {variable: layouts.NNX_AUX for variable in variables if variable.path in former}
    untrained = {it.path for it, to in collections.items() if it.subtree is None and to == layouts.NNX_AUX}
    moments_kept = {role for role in kept if isinstance(role, Variable) and role.subtree is not None}
    lost = {role for role in moments_kept if role.path in untrained}
    release = ".".join(map(str, goal.release))
    reasons |= {kept[role]: f"MaxText {release} trains no {'/'.join(role.path[-2:])}" for role in lost}
    kept = {role: path for role, path in kept.items() if role not in lost}
  filled = lambda path: not abstract_state.is_empty(source.state.leaves[path])
  dropped = {path: reason for path, reason in reasons.items() if reason and filled(path)}
  return Selected(kept, collections, {**dropped, **source.dropped})


def arrange(
    source: Source, selected: Selected, goal: Goal
) -> tuple[list[arrangement.Arranged], layer_stacks.Schedule, layer_stacks.Schedule]:
  """The target's variables, arranged; the source's schedule; and the schedule that they follow."""
  leaves, paths = source.state.leaves, selected.paths
  variables = {role: leaves[path] for role, path in paths.items() if isinstance(role, Variable)}
  path_of = lambda it: paths.get(it) or roles_lib.write(it, source.layout, source.roles.bare_subtrees)
  before = layer_finding.find(variables, goal.param_scan_axis, path_of)
  layer_finding.refuse_unknown_order(
      variables,
      before,
      path_of,
      keeps_pipelines=goal.keeps_pipelines and goal.schedule is None,
  )
  after = arrangement.target_schedule(
      before, goal.scan_layers, goal.layer_naming, goal.schedule, keeps_pipelines=goal.keeps_pipelines
  )
  arrangement.check_one_role(variables, before, path_of)
  arranged = arrangement.arrange(
      variables,
      before,
      after,
      param_scan_axis=goal.param_scan_axis,
      path_of=path_of,
      collection_of=selected.collections.__getitem__,
  )
  if goal.release is not None and goal.layout.nnx_optimizer:
    deepseek.refuse_lost_engram((item.variable.path for item in arranged), goal.release)
  if goal.decoder is None:
    arrangement.refuse_blocks(arranged, paths)
  elif not goal.decoder.known_order:
    arrangement.refuse_new_arrangement(arranged, paths, goal.decoder)
  else:
    arrangement.refuse_unproven(before, goal.decoder)
  return arranged, before, after


def _reason(role, collections, goal) -> str:
  """Why a leaf is left out on request; "" if it is kept."""
  if not goal.keeps_nnx_aux and collections.get(role) == layouts.NNX_AUX:
    return "--nnx_aux=drop"
  is_param = isinstance(role, Variable) and role == Variable(layouts.PARAMS, role.path)
  return "--params_only" if goal.params_only and not is_param else ""


def _collection(variable, layout, is_trained) -> str:
  """The collection of a variable in the target's layout."""
  collection, path = variable.collection, variable.path
  if variable.subtree is not None:
    return collection
  # Without an optimizer, MaxText's NNX models load each collection from its own place in the Linen layout.
  if layout.framework == "nnx" or (layout.nnx_optimizer and is_trained):
    return layouts.NNX_AUX if variable_kinds.is_nnx_variable(collection, path, is_trained) else collection
  return collection if collection != layouts.NNX_AUX else variable_kinds.linen_collection(path) or collection


def _former_params(kept: Iterable[roles_lib.Role], decoder, release) -> frozenset[Path]:
  """The paths of Params that are not Params in the release, which has no place for their moments."""
  variables = [role for role in kept if isinstance(role, Variable) and role.subtree is None]
  for variable in variables:
    if variable.collection == layouts.NNX_AUX:
      decoder_families.refuse_later_variable(variable.path, release)
  params = (variable.path for variable in variables if variable.collection == layouts.PARAMS)
  return frozenset(path for path in params if decoder_families.is_former_param(path, decoder, release))
