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

"""Compares a plan's target with the state that MaxText itself would restore into."""

from typing import Any

import jax.numpy as jnp

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases

_SHOWN = 3


def check_plan(plan: plan_lib.Plan, config: Any, release: releases.Version) -> tuple[str, ...]:
  """Compares the target with the model of the config, where the installed MaxText is the one that shall read it.

  Returns:
    What `check` notes.
  """
  trainer = run_config.trainer(config, release)
  is_whole = any(path[0] == "opt_state" for path in plan.target.leaves)
  reads = releases.find(release, trainer).layout
  if is_whole and release == run_config.version() and plan.target_layout == reads:
    return check(plan.target, run_config.saved_state(config, trainer))
  return ()


def check(target: abstract_state.AbstractState, model: abstract_state.AbstractState) -> tuple[str, ...]:
  """Checks that the target has the model's leaves, each of the model's shape.

  NNX state beside the params (`nnx_aux`) may be absent, for a Linen source has none and MaxText >= 0.2.4 initializes it
  then; where it is there, it may be other than the model's, which MaxText says and leaves aside. Floats of another width
  are no reason to refuse: MaxText's restore casts them, and its own first steps with bfloat16 weights save some moments
  in float32.

  Args:
    target: what the plan writes.
    model: what MaxText saves of the model that the config describes.

  Returns:
    A note, if MaxText will cast leaves.

  Raises:
    ConfigError: naming the first leaves that differ.
  """
  found, wanted = _arrays(target), _arrays(model)
  differing = [path for path in dict.fromkeys((*wanted, *found)) if _text(found.get(path)) != _text(wanted.get(path))]
  cast = [path for path in differing if _is_cast(found.get(path), wanted.get(path))]
  if refused := [path for path in differing if path not in set(cast)]:
    raise _unlike(refused, found, wanted)
  if not cast:
    return ()
  first = f"{'/'.join(cast[0])} is {found[cast[0]].dtype}, not {wanted[cast[0]].dtype}"
  return (f"MaxText will cast {len(cast)} leaves when it loads them, as the config says: {first}",)


def _unlike(differing, found, wanted) -> errors.ConfigError:
  text = lambda leaves, path, otherwise: _text(leaves.get(path)) or otherwise
  lines = [f"{'/'.join(p)}: {text(found, p, 'missing')}, not {text(wanted, p, 'there')}" for p in differing[:_SHOWN]]
  return errors.ConfigError(
      differing[0],
      text(wanted, differing[0], "nothing there, as the model of the config has no such leaf"),
      f"{text(found, differing[0], 'nothing')} ({len(differing)} leaves differ: {'; '.join(lines)})",
      "Give the config of the run that wrote the checkpoint, its optimizer too, or pass --nocheck_model.",
  )


def _is_cast(found, wanted) -> bool:
  """Whether both are arrays of one shape, of floats."""
  if not abstract_state.is_array(found) or not abstract_state.is_array(wanted):
    return False
  are_floats = all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in (found, wanted))
  return are_floats and tuple(found.shape) == tuple(wanted.shape)


def _text(leaf) -> str:
  return "" if leaf is None else plan_lib.described(leaf)


def _arrays(state) -> dict[abstract_state.Path, abstract_state.Leaf]:
  return {
      path: leaf
      for path, leaf in state.leaves.items()
      if path[0] != layouts.NNX_AUX and not abstract_state.is_empty(leaf)
  }
