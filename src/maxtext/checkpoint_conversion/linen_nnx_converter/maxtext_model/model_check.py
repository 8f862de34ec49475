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

"""Compares a plan's target with the state into which MaxText itself would restore it."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases

_SHOWN = 3
Sides = tuple[abstract_state.Leaf, abstract_state.Leaf]  # The target's leaf and the model's; None if absent.


def check_plan(plan: plan_lib.Plan, config: Any, release: releases.Version) -> tuple[str, ...]:
  """Compares the target with the model of the config, if the installed MaxText is the one that will read it.

  Returns:
    The notes of `check`.
  """
  if layouts.is_tunix(plan.target_layout):
    return (
        check(plan.target, _tunix_state(config, release, plan.target_layout.name))
        if release == run_config.version()
        else ()
    )
  trainer = run_config.trainer(config, release)
  is_whole = any(path[0] == "opt_state" for path in plan.target.leaves)
  reads = releases.find(release, trainer).layout
  if is_whole and release == run_config.version() and plan.target_layout == reads:
    return check(plan.target, run_config.saved_state(config, trainer))
  return ()


def check_scan_layers(
    plan: plan_lib.Plan, asked: bool | None, config: Any, step: Any, custom_metadata: Mapping[str, Any]
) -> tuple[str, ...]:
  """Refuses a recorded `scan_layers` that is not true of the layers, and notes an option that means none.

  Args:
    plan: the plan.
    asked: the option `scan_layers`.
    config: the MaxText config, or None.
    step: the source's step folder.
    custom_metadata: its metadata, in which MaxText >= 0.2.4 records the flag.

  Returns:
    A note if, without a config, the option is given and the source has no layers under MaxText's names.

  Raises:
    ConfigError: the record contradicts the layers. The config's `scan_layers` is the target's, but nobody can tell to
      which of the two its other settings belong.
  """
  if config is None:
    is_vain = asked is not None and plan.scan_layers is None
    return ("--scan_layers changes nothing: there are no layers under such names as decoder/layers",) if is_vain else ()
  flag = custom_metadata.get("scan_layers")
  if isinstance(flag, bool) and plan.source_scan_layers is not None and flag != plan.source_scan_layers:
    raise errors.ConfigError(
        step / "_CHECKPOINT_METADATA",
        f"scan_layers={plan.source_scan_layers}, as the layers in the checkpoint are written",
        f"scan_layers={flag}",
        "Check which run wrote the checkpoint, and correct the flag; without a config it is ignored.",
    )
  return ()


def check(target: abstract_state.AbstractState, model: abstract_state.AbstractState) -> tuple[str, ...]:
  """Checks that the target has the model's leaves, each of the model's shape.

  NNX state beside the params (`nnx_aux`) may be absent, because a Linen source has none and MaxText >= 0.2.4 then
  initializes it; it may also differ from the model's, which MaxText reports and ignores. Floats of another width are no
  reason to refuse: MaxText's restore casts them, and its own first steps with bfloat16 weights save some moments in
  float32.

  Args:
    target: what the plan writes.
    model: what MaxText saves of the config's model.

  Returns:
    A note if MaxText will cast leaves.

  Raises:
    ConfigError: naming the first leaves that differ.
  """
  differing = differences(target, model)
  if refused := {path: sides for path, sides in differing.items() if not is_cast(*sides)}:
    raise _unlike(refused)
  if not differing:
    return ()
  path, (found, wanted) = next(iter(differing.items()))
  first = f"{'/'.join(path)} is {found.dtype}, not {wanted.dtype}"
  return (f"MaxText will cast {len(differing)} leaves when it loads them, as the config says: {first}",)


def _tunix_state(config, release, name) -> abstract_state.AbstractState:
  """The abstract state of what Tunix, or the training engine, saves of the config's model, RNG keys as their raw data."""
  state = abstract_state.flatten(run_config.nnx_state(config))
  raw = {path: jax.eval_shape(_key_data, leaf) for path, leaf in state.leaves.items() if abstract_state.is_array(leaf)}
  source = abstract_state.abstract(dataclasses.replace(state, leaves={**state.leaves, **raw}))
  run = dataclasses.replace(run_config.run(config, None), release=release)
  target_layout = "training_engine" if name == layouts.TRAINING_ENGINE else "tunix"
  return planner.plan_conversion(source, options_lib.PlanOptions(target_layout=target_layout), run).target


def _key_data(leaf):
  return jax.random.key_data(leaf) if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def differences(
    target: abstract_state.AbstractState, model: abstract_state.AbstractState
) -> dict[abstract_state.Path, Sides]:
  """The leaves in which target and model differ, not counting empty nodes and `nnx_aux`."""
  found, wanted = arrays(target), arrays(model)
  sides = {path: (found.get(path), wanted.get(path)) for path in (*wanted, *found)}
  return {path: (a, b) for path, (a, b) in sides.items() if _text(a) != _text(b)}


def _unlike(differing) -> errors.ConfigError:
  shown = list(differing.items())[:_SHOWN]
  lines = [f"{'/'.join(path)}: {_text(a) or 'missing'}, not {_text(b) or 'there'}" for path, (a, b) in shown]
  first, (found, wanted) = shown[0]
  return errors.ConfigError(
      first,
      _text(wanted) or "nothing there, as the model of the config has no such leaf",
      f"{_text(found) or 'nothing'} ({len(differing)} leaves differ: {'; '.join(lines)})",
      "Give the config of the run that wrote the checkpoint, its optimizer too, or pass --nocheck_model.",
  )


def is_cast(found: abstract_state.Leaf, wanted: abstract_state.Leaf) -> bool:
  """Whether both are float arrays of one shape, which MaxText casts when it loads them."""
  if not abstract_state.is_array(found) or not abstract_state.is_array(wanted):
    return False
  are_floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (found, wanted))
  return are_floats and tuple(found.shape) == tuple(wanted.shape)


def _text(leaf) -> str:
  return "" if leaf is None else plan_lib.described(leaf)


def arrays(state: abstract_state.AbstractState) -> dict[abstract_state.Path, abstract_state.Leaf]:
  """The leaves that are compared."""
  return {
      path: leaf
      for path, leaf in state.leaves.items()
      if path[0] != layouts.NNX_AUX and not abstract_state.is_empty(leaf)
  }
