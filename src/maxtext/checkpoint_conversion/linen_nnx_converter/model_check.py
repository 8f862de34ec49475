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

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter import maxtext_config
from maxtext.checkpoint_conversion.linen_nnx_converter import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import releases

_SHOWN = 3


def check_plan(plan: plan_lib.Plan, config: Any, release: releases.Version):
  """Compares the target with the model of the config, where the installed MaxText is the one that shall read it."""
  trainer = maxtext_config.trainer(config, release)
  is_whole = any(path[0] == "opt_state" for path in plan.target.leaves)
  reads = releases.find(release, trainer).layout
  if is_whole and release == maxtext_config.version() and plan.target_layout == reads:
    check(plan.target, maxtext_config.saved_state(config, trainer))


def check(target: abstract_state.AbstractState, model: abstract_state.AbstractState):
  """Checks that the target has the model's leaves, each of the model's shape and dtype.

  NNX state beside the params (`nnx_aux`) may be absent, for a Linen source has none and MaxText >= 0.2.4 initializes it
  then; where it is there, it may be other than the model's, which MaxText says and leaves aside.

  Args:
    target: what the plan writes.
    model: what MaxText saves of the model that the config describes.

  Raises:
    ConfigError: naming the first leaves that differ.
  """
  found, wanted = _described(target), _described(model)
  differing = [path for path in dict.fromkeys((*wanted, *found)) if found.get(path) != wanted.get(path)]
  if not differing:
    return
  lines = [f"{'/'.join(path)}: {found.get(path, 'missing')}, not {wanted.get(path, 'there')}" for path in differing]
  raise errors.ConfigError(
      differing[0],
      expected=wanted.get(differing[0], "nothing there, as the model of the config has no such leaf"),
      found=f"{found.get(differing[0], 'nothing')} ({len(differing)} leaves differ: {'; '.join(lines[:_SHOWN])})",
      remedy="Give the config of the run that wrote the checkpoint, its optimizer too, or pass --nocheck_model.",
  )


def _described(state) -> dict[abstract_state.Path, str]:
  return {
      path: plan_lib.described(leaf)
      for path, leaf in state.leaves.items()
      if path[0] != layouts.NNX_AUX and not abstract_state.is_empty(leaf)
  }
