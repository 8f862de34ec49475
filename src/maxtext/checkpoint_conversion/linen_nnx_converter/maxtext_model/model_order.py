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

"""The order of layers of a decoder block unknown to `decoder_families`, as the installed MaxText's models prove it.

The config's model is traced at its real size, scanned and unscanned, and no weight is made. Each layer's weights must
meet tokens that have passed all layers before it and none after. If both models apply the layers, as found from names
and shapes, in the same order, then these were found correctly.
"""

import copy
import dataclasses
from typing import Any

import jax
from jax.extend import core
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_finding
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import dataflow
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Layer = tuple[abstract_state.Path, int]  # Its group, and its number there.
Leaf = tuple[leaf_roles.Variable | None, Any]  # A variable (None for RNG state) and its shape.


def plan_conversion(
    state: abstract_state.AbstractState, options: options_lib.PlanOptions, run: planner.Run, empty_nodes: Any, config: Any
) -> tuple[plan_lib.Plan, tuple[str, ...]]:
  """The planner's plan, and a note if the installed MaxText's models had to prove the order of layers.

  Raises:
    ConversionError: the planner's; if a proof was tried, it says why there is none.
  """
  try:
    return planner.plan_conversion(state, options, run, empty_nodes), ()
  except (errors.ConfigError, errors.LayerStackError) as e:
    if run.decoder is None or not _is_new(run.decoder, run):
      raise
    refusal = e
  try:
    decoder = dataclasses.replace(run.decoder, proven=proven_schedules(config))
  except Exception as e:  # Whatever a model raises while it is traced.  pylint: disable=broad-except
    found = f"{refusal.found}, and no proof by MaxText's models ({errors.named(e)})"
    raise type(refusal)(refusal.path, refusal.expected, found, refusal.remedy) from e
  note = f"order of {decoder.block}'s layers derived: MaxText's own models, traced, apply them so, scanned and unscanned"
  return planner.plan_conversion(state, options, dataclasses.replace(run, decoder=decoder), empty_nodes), (note,)


def _is_new(decoder, run) -> bool:
  """Whether a run of the installed MaxText has a decoder block that the table lacks, and whose order may be proven."""
  is_installed = run.release == run_config.version() and run.trainer == "nnx"
  is_open = is_installed and decoder.known_order and not decoder.pipeline
  return is_open and not decoder_families.for_release(decoder, run.release).known_order


def proven_schedules(config: Any) -> tuple[layer_stacks.Schedule, layer_stacks.Schedule]:
  """The schedules of the config's decoder, unscanned and scanned.

  Raises:
    LayerStackError: the two models do not apply the layers, as found from names and shapes, in one order.
  """
  (unscanned, wanted), (scanned, found) = (_applied(_with(config, scan_layers)) for scan_layers in (False, True))
  if found != wanted:
    names = lambda order: ", ".join(f"{'/'.join(group)} {number}" for group, number in order)
    raise _unproven(("decoder",), f"scanned layers applied in the order {names(wanted)}", names(found))
  return unscanned, scanned


def _with(config, scan_layers):
  """The config with or without scanned layers, and with an attention that needs no accelerator, which does not matter."""
  changed = copy.deepcopy(config)
  changed.get_keys().update(scan_layers=scan_layers, attention="dot_product")
  return changed


def _applied(config) -> tuple[layer_stacks.Schedule, list[Layer]]:
  """The decoder's schedule, from names and shapes, and its layers in the order in which they are applied.

  Raises:
    LayerStackError: they are not applied one after the other.
  """
  jaxpr, leaves = _traced(config)
  variables = {variable: shape for variable, shape in leaves if variable is not None}
  found = layer_finding.find(variables, config.param_scan_axis, lambda variable: variable.path)
  schedule = tuple(stack for stack in found if stack.group[0] == "decoder")
  layers = [(stack.group, number) for stack in schedule for number in stack.layers()]
  weights = [_weights(variable, leaf.shape, schedule, layers, config.param_scan_axis) for variable, leaf in leaves]
  follower = dataflow.Follower()
  follower.follow(jaxpr, [*weights, dataflow.Tokens(), None])
  before = {(path, layer): after & ~(1 << layer) for (path, layer), after in follower.met.items()}
  sets = [0] * len(layers)
  for (_, layer), after in before.items():
    sets[layer] |= after
  order = sorted(range(len(layers)), key=lambda layer: sets[layer].bit_count())
  if any(sets[layer] != sum(1 << other for other in order[:i]) for i, layer in enumerate(order)):
    raise _unproven(("decoder",), "layers that are applied one after the other", "layers in no order")
  stacked = {stack.prefix for stack in schedule if stack.sizes}
  for (path, layer), after in before.items():
    # Tokens may meet some variables early, such as a table of their ids; of a single layer, these are known by path.
    if after != sets[layer] and layer_names.prefix_of(path) in stacked:
      raise _unproven(path, "weights applied with the others of their layer", "others")
  return schedule, [layers[i] for i in order]


def _unproven(path, expected, found) -> errors.LayerStackError:
  return errors.LayerStackError(path, expected, found, "Keep the arrangement.")


def _weights(variable, shape, schedule, layers, param_scan_axis) -> dataflow.Weights | None:
  """What is known of a leaf, if it belongs to the decoder's layers."""
  prefix = layer_names.prefix_of(variable.path) if variable is not None else None
  if (stack := next((stack for stack in schedule if stack.prefix == prefix), None)) is None:
    return None
  axes = stack.axes(variable, len(shape) - len(stack.sizes), param_scan_axis)
  numbers = np.array([layers.index((stack.group, number)) for number in stack.layers()])
  along = [shape[axis] if axis in axes else 1 for axis in range(len(shape))]
  return dataflow.Weights(np.broadcast_to(numbers.reshape(along), shape), frozenset([variable.path]))


def _traced(config) -> tuple[core.Jaxpr, list[Leaf]]:
  """The model's forward pass as a function of leaves, tokens and positions; and the leaves."""
  # pylint: disable=import-outside-toplevel
  from flax import nnx

  from maxtext.utils import model_creation_utils

  mesh = run_config.device_mesh(config)
  create_model = model_creation_utils.get_nnx_create_model_fn(config, mesh)
  integers = jax.ShapeDtypeStruct((config.micro_batch_size_to_train_on, config.max_target_length), np.int32)
  with mesh, nnx.logical_axis_rules(config.logical_axis_rules):
    graph, state = nnx.split(nnx.eval_shape(create_model))
    leaves, tree = jax.tree.flatten(state)
    model = lambda leaves: nnx.merge(graph, jax.tree.unflatten(tree, leaves))
    forward = lambda leaves, tokens, at: model(leaves)(tokens, at, decoder_segment_ids=at, enable_dropout=False)
    jaxpr = jax.make_jaxpr(forward)(leaves, integers, integers).jaxpr
  kind = lambda leaf: leaf_roles.PARAMS if isinstance(leaf, nnx.Param) else layouts.NNX_AUX
  flat = [(leaf_roles.Variable(kind(leaf), tuple(map(str, path))), leaf) for path, leaf in nnx.to_flat_state(state)]
  return jaxpr, [(None if isinstance(leaf, nnx.RngState) else variable, leaf) for variable, leaf in flat]
