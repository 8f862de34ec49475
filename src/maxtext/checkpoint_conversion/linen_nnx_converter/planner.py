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

"""Plans a conversion from the source's abstract state. Every refusal that metadata can decide happens here."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import families
from maxtext.checkpoint_conversion.linen_nnx_converter import layers
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter import moments
from maxtext.checkpoint_conversion.linen_nnx_converter import optimizer
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import releases
from maxtext.checkpoint_conversion.linen_nnx_converter import roles as roles_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import schedules
from maxtext.checkpoint_conversion.linen_nnx_converter import target_state
from maxtext.checkpoint_conversion.linen_nnx_converter import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter import variable_kinds

Path = abstract_state.Path
Variable = roles_lib.Variable


@dataclasses.dataclass(frozen=True)
class Run:
  """The run that shall go on from the target, as far as it is known.

  Attributes:
    release: its MaxText release; with it, `auto` goes to what that release reads.
    trainer: which of the release's trainers, `linen` or `nnx`; None takes the Linen trainer as long as there is one.
    decoder: the decoder of the model's config, which says how its layers are scanned.
    adamw_mask: whether the optimizer is adamw with a mask of its weight decay, which does not show in NNX. What is known
      from an earlier conversion counts more.
  """

  release: releases.Version | None = None
  trainer: str | None = None
  decoder: families.Decoder | None = None
  adamw_mask: bool = False


def plan_conversion(
    source: abstract_state.AbstractState,
    options: options_lib.PlanOptions,
    run: Run,
    empty_nodes: Mapping[Path, Any] | None = None,
) -> plan_lib.Plan:
  """The validated plan of a conversion.

  Args:
    source: the abstract state of the source.
    options: what the target shall be.
    run: the run that shall go on from it.
    empty_nodes: empty optimizer nodes known from an earlier conversion, by Linen path below `opt_state`.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  direction, scan_layers, nnx_values = options.direction, options.scan_layers, options.nnx_values
  params_only, release, decoder = options.params_only, run.release, run.decoder
  if decoder is not None and release is not None:
    decoder = families.for_release(decoder, release)
  source_layout = layouts.detect(source)
  _refuse_apart(source_layout, params_only)
  reads = releases.find(release, run.trainer) if release else None
  takes_release_form = reads is not None and direction == "auto"
  target_layout = (
      reads.layout if takes_release_form else _target_layout(source_layout, direction, nnx_values, params_only)
  )
  if scan_layers is None and (source_layout.framework, target_layout.framework) == ("linen", "nnx"):
    scan_layers = True
  # What is not asked for stays as it is: within Linen, the form that a trainer gave to a nested optimizer.
  keeps_form = source_layout.framework == target_layout.framework and not takes_release_form
  roles = roles_lib.read(source, source_layout)
  if not params_only:
    moments.check(roles, source.leaves, source_layout)
  unwrapped = {}
  if layouts.is_tunix(source_layout):
    roles, unwrapped = tunix.unwrap(roles, source.leaves, params_only)
  is_trained = any(isinstance(role, Variable) and role.subtree is not None for role in roles.by_path.values())
  former_params = frozenset()

  def collection_of(variable):
    if variable.path in former_params:
      return layouts.NNX_AUX
    return variable.collection if keeps_form else _target_collection(variable, target_layout, is_trained)

  kept, dropped = _select(roles, source.leaves, collection_of, options.nnx_aux == "keep", params_only)
  dropped |= unwrapped
  if takes_release_form and release is not None:
    former_params = _former_params(source.leaves, kept, dropped, decoder, release, collection_of)
  paths = {role: path for path, role in kept.items()}
  arranged, before, after = _arrange(
      {role: source.leaves[path] for path, role in kept.items() if isinstance(role, Variable)},
      lambda variable: paths.get(variable) or roles_lib.write(variable, source_layout, roles.bare_subtrees),
      scan_layers,
      options.layer_naming or _layer_naming(target_layout, reads),
      1 if options.param_scan_axis is None else options.param_scan_axis,
      _model_schedule(decoder, scan_layers, release, reads),
      collection_of,
  )
  if decoder is None:
    layers.refuse_blocks(arranged, paths)
  elif not decoder.known_order:
    layers.refuse_new_arrangement(arranged, paths, decoder)
  known_nodes = empty_nodes or {}
  nodes = None if keeps_form else known_nodes or _decay_mask(kept, run.adamw_mask)
  target, moves = target_state.build(source, source_layout, target_layout, roles, kept, arranged, nodes)
  target_state.refuse_ambiguous(target, target_layout)
  if source_layout.framework == "linen":
    known_nodes = target_state.empty_optimizer_nodes(source, kept)
  plan = plan_lib.Plan(
      source,
      target,
      moves,
      dropped,
      source_layout=source_layout,
      target_layout=target_layout,
      empty_nodes=known_nodes,
      scan_layers=schedules.is_scanned(after, (item.variable.path for item in arranged)),
      source_scan_layers=schedules.is_scanned(before, (item.variable.path for item in arranged)),
  )
  plan.validate()
  return plan


def _refuse_apart(source_layout, params_only):
  """Refuses what belongs to no single train state, unless the params alone are asked for."""
  if source_layout.apart and not params_only:
    raise errors.LayoutError(
        (min(source_layout.apart),),
        expected="one train state",
        found=f"a {source_layout}: a train state for each replica, and an outer optimizer",
        remedy="Convert its outer params with --params_only: no other layout has a place for the rest.",
    )


def _layer_naming(target_layout, reads) -> str:
  """How layers that are not scanned are written where nothing else is asked for."""
  if reads is not None:
    return reads.layer_naming
  return schedules.FLAT if target_layout.framework == "linen" else schedules.NESTED


def _model_schedule(decoder, scan_layers, release, reads) -> schedules.Schedule | None:
  """The schedule of the config's decoder, if there is one and it is asked for."""
  if decoder is None or not decoder.known_order or scan_layers is None or release is None or reads is None:
    return None
  return families.schedule(decoder, scan_layers, reads.trainer, release)


def _target_collection(variable, layout, is_trained) -> str:
  """The collection of a variable in the target's layout."""
  collection, path = variable.collection, variable.path
  if variable.subtree is not None:
    return collection
  # Without an optimizer, MaxText's NNX models load each collection from its own place in the Linen layout.
  if layout.framework == "nnx" or (layout.nnx_optimizer and is_trained):
    return layouts.NNX_AUX if variable_kinds.is_nnx_variable(collection, path, is_trained) else collection
  return collection if collection != layouts.NNX_AUX else variable_kinds.linen_collection(path) or collection


def _former_params(leaves, kept, dropped, decoder, release, collection_of) -> frozenset[Path]:
  """The paths of Params that are none in the release.

  Their moments have no place there, nor have those of any variable that an NNX trainer has for no Param: they move to
  `dropped`.
  """
  is_model_param = lambda role: isinstance(role, Variable) and role == Variable(layouts.PARAMS, role.path)
  paths = {role.path for role in kept.values() if is_model_param(role)}
  for role in kept.values():
    if isinstance(role, Variable) and role.collection == layouts.NNX_AUX:
      families.refuse_later_variable(role.path, release)
  former = frozenset(path for path in paths if families.is_former_param(path, decoder, release))
  for source_path, role in list(kept.items()):
    if not isinstance(role, Variable) or role.subtree is None:
      continue
    if role.path in former or collection_of(dataclasses.replace(role, subtree=None)) == layouts.NNX_AUX:
      del kept[source_path]
      if abstract_state.is_empty(leaves[source_path]):
        continue
      dropped[source_path] = f"MaxText {'.'.join(map(str, release))} trains no {'/'.join(role.path[-2:])}"
  return former


def _arrange(variables, path_of, scan_layers, naming, param_scan_axis, model, collection_of):
  """The variables of the target, arranged, the schedule of the source, and the one that they follow."""
  before = schedules.find(variables, param_scan_axis, path_of)
  after = layers.target_schedule(before, scan_layers, naming, model)
  layers.check_one_role(variables, before, path_of)
  if scan_layers is False:
    schedules.refuse_unknown_order(variables, path_of)
  options = {"param_scan_axis": param_scan_axis, "path_of": path_of, "collection_of": collection_of}
  return layers.arrange(variables, before, after, **options), before, after


def _decay_mask(kept, adamw_mask) -> dict[Path, Any]:
  """The empty nodes that a mask of adamw's weight decay gives to Linen."""
  subtrees = {role.subtree for role in kept.values() if isinstance(role, Variable) and role.subtree is not None}
  return optimizer.decay_mask(subtrees) if adamw_mask else {}


def _target_framework(direction, source_layout) -> str:
  """The framework to convert to; refuses a direction that starts from the other one."""
  if direction == "auto":
    return "nnx" if source_layout.framework == "linen" else "linen"
  begin, end = direction.split("_to_")
  if begin != source_layout.framework:
    raise errors.DirectionError(
        f"--direction={direction}",
        expected=f"a source of {begin.replace('nnx', 'NNX').replace('linen', 'Linen')}",
        found=f"the layout {source_layout}",
        remedy="Leave out --direction, or give the one that starts from this layout.",
    )
  return end


def _target_layout(source_layout, direction, nnx_values, params_only) -> layouts.StateLayout:
  """The layout to write where no release asks for its own."""
  if direction == "auto" and params_only and nnx_values is None:
    return layouts.LINEN  # From which `load_parameters_path` takes weights in every release, with either trainer.
  if layouts.is_tunix(source_layout) and direction == "auto":
    return layouts.LINEN_OF_NNX
  if _target_framework(direction, source_layout) == "linen":
    return source_layout if source_layout.framework == "linen" and not source_layout.apart else layouts.LINEN
  boxes = {"plain": (False, False), "boxed": (True, False), "all_boxed": (True, True)}.get(nnx_values)
  within_nnx = source_layout.framework == "nnx"
  if boxes is None:
    boxes = (source_layout.boxed_variables, source_layout.boxed_optimizer) if within_nnx else (True, False)
  if params_only or (within_nnx and source_layout.opt_state is None):
    keeps = within_nnx and source_layout.opt_state is None and not layouts.is_tunix(source_layout)
    layout = source_layout if keeps else layouts.NNX_PARAMS_ONLY
  else:
    layout = layouts.NNX_PLAIN
  return layouts.with_boxes(layout, *boxes)


def _select(
    roles, leaves, collection_of, keep_nnx_aux, params_only
) -> tuple[dict[Path, roles_lib.Role], dict[Path, str]]:
  """The leaves that go along, and those that are left out on request, with the reason."""
  kept, dropped = {}, {}
  for path, role in roles.by_path.items():
    is_aux = isinstance(role, Variable) and collection_of(role) == layouts.NNX_AUX
    is_param = isinstance(role, Variable) and role == Variable(layouts.PARAMS, role.path)
    if (params_only and not is_param) or (is_aux and not keep_nnx_aux):
      if not abstract_state.is_empty(leaves[path]):
        dropped[path] = "--nnx_aux=drop" if is_aux and not keep_nnx_aux else "--params_only"
    else:
      kept[path] = role
  return kept, dropped
