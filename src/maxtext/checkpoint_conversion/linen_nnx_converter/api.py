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

"""Conversion in memory: what Python programs call."""

import dataclasses
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases


def detect_format(state: Any) -> str:
  """Tells `linen` from `nnx`.

  Args:
    state: a train state, as a pytree of any leaves.

  Raises:
    LayoutError: it fits no known layout, or two.
  """
  return layouts.detect(abstract_state.flatten(state)).framework


def convert_linen_to_nnx(state: Any, scan_layers: bool | None = None, **options) -> dict[str, Any]:
  """Converts a Linen train state in memory. The input is not modified; leaves that only move are shared with it.

  Args:
    state: a pytree: nested dicts and lists, or a Flax `TrainState`, with leaves of NumPy arrays, JAX arrays or
      `jax.ShapeDtypeStruct`.
    scan_layers: whether the result's layers are scanned; None is True, but keeps a pipeline.
    **options: others of `options.PlanOptions`, except the direction.

  Returns:
    Nested dicts, `{"model": …, "optimizer": {"opt_state": …, "step": …}}`. Keys are strings, those of chains too.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  return _convert_tree(state, direction="linen_to_nnx", scan_layers=scan_layers, **options)


def convert_nnx_to_linen(state: Any, scan_layers: bool | None = None, **options) -> dict[str, Any]:
  """Converts an NNX train state in memory, as `convert_linen_to_nnx` does the other way.

  Args:
    state: a pytree: nested dicts, or an `nnx.State`, boxed or plain.
    scan_layers: whether the result's layers are scanned; None leaves them as they are.
    **options: as `convert_linen_to_nnx` takes them.

  Returns:
    Nested dicts and lists, `{"params": {"params": …}, "opt_state": …, "step": …}`.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  return _convert_tree(state, direction="nnx_to_linen", scan_layers=scan_layers, **options)


def _convert_tree(state, **options) -> dict[str, Any]:
  chosen = options_lib.PlanOptions.of(**options)
  run = planner.Run(releases.parse(chosen.maxtext_release) if chosen.maxtext_release else None)
  source = abstract_state.flatten(state)
  plan = planner.plan_conversion(abstract_state.abstract(source), chosen, run)
  return abstract_state.unflatten(dataclasses.replace(plan.target, leaves=in_memory.apply(plan, source.leaves)))
