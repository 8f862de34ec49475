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

"""LoRA: which weights adapters are merged into, and how. No I/O; adapters are small and held in memory."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path

_FLAG = "--lora_restore_path"
_A, _B = "kernel_lora_a", "kernel_lora_b"  # Beside `kernel`, of MaxText's `DenseGeneral`: Qwix names them so.
_STRIP = 2**20  # Elements computed at a time.


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What is added to a weight: `a` times `b`, scaled.

  For a kernel (inputs …, outputs …), Qwix flattens the inputs in `a` and the outputs in `b`.

  Attributes:
    a: (layers, inputs, rank), with one layer where the weight is not stacked.
    b: (layers, rank, outputs).
    scale: alpha / rank.
    shape: the weight's, without its layer axis.
    inputs: how many of these axes are inputs.
    layer_axis: the weight's layer axis, or None.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  shape: tuple[int, ...]
  inputs: int
  layer_axis: int | None

  def merged(self, region: tuple[slice, ...], data: np.ndarray, dtype: np.dtype, path: Path) -> np.ndarray:
    """A region of the weight after the merge, given the `data` in it: in float32, rounded once, to `dtype`."""
    result = np.empty(data.shape, dtype)
    rows = max(1, _STRIP * len(data) // max(1, data.size))
    for begin in range(0, len(data), rows):
      strip = slice(begin, begin + rows)
      values = data[strip]
      first = slice(region[0].start + begin, region[0].start + begin + len(values))
      added = self._product((first, *region[1:])) * np.float32(self.scale)
      result[strip] = abstract_state.checked_cast(path, values.astype(np.float32) + added, dtype)
    return result

  def _product(self, region) -> np.ndarray:
    """A times B in a region of the weight, in float32."""
    axis, inside = self.layer_axis, list(region)
    layers = slice(None) if axis is None else inside.pop(axis)
    ins, outs = inside[: self.inputs], inside[self.inputs :]
    a = self.a.reshape(len(self.a), *self.shape[: self.inputs], -1)[(layers, *ins)].astype(np.float32)
    b = self.b.reshape(*self.b.shape[:2], *self.shape[self.inputs :])[(layers, slice(None), *outs)].astype(np.float32)
    product = np.matmul(a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1))
    product = product.reshape(len(a), *a.shape[1:-1], *b.shape[2:])
    return product[0] if axis is None else np.moveaxis(product, 0, axis)


def alpha_of(given: float | None, metadata: Mapping[str, Any]) -> float:
  """The alpha of adapters, which is given or in their own metadata.

  Args:
    given: the option, or the config's.
    metadata: MaxText's entry `lora` in the custom metadata, or {}.

  Raises:
    OptionError: it is in neither, or the two differ.
  """
  known = {float(value) for value in (given, metadata.get("lora_alpha")) if value}
  if len(known) != 1:
    raise errors.OptionError(
        "--lora_alpha",
        "the alpha that the adapters were trained with",
        " and ".join(f"{value:g}" for value in sorted(known)) or "none, here or in their metadata",
        "Give it, or the config of the run that trained them.",
    )
  return known.pop()


def merge(plan: plan_lib.Plan, adapters: Mapping[Path, np.ndarray], alpha: float, scan_axis: int) -> plan_lib.Plan:
  """The plan, with adapters merged into the weights that it moves.

  Args:
    plan: the plan, of the weights alone.
    adapters: `…/kernel_lora_a` and `…/kernel_lora_b`, by path inside the model.
    alpha: what they are scaled by, with their rank.
    scan_axis: the layer axis of stacked adapters, that of all Params.

  Raises:
    OptionError: there is an optimizer.
    LayoutError: a leaf is not an adapter, or lacks its counterpart, or its weight, or does not fit that.
  """
  roles = leaf_roles.read(plan.source, plan.source_layout).by_path
  weights = {}
  for path, role in roles.items():
    if isinstance(role, leaf_roles.Variable) and path not in plan.dropped:
      _refuse_moments(path, role)
      weights |= {role.path: path} if role.collection == layouts.PARAMS else {}
  pairs = {path[:-1]: _pair(path, adapters) for path in adapters}
  if not pairs:
    raise errors.LayoutError(_FLAG, "adapters", "none", "Give the checkpoint that the LoRA run saved.")
  return dataclasses.replace(plan, merges=dict(_merges(pairs, weights, plan.source.leaves, alpha, scan_axis)))


def _merges(pairs, weights, leaves, alpha, scan_axis):
  for module, (a, b) in pairs.items():
    path = weights.get((*module, "kernel"))
    if path is None or (*module, _A) in weights:
      raise errors.LayoutError(
          (*module, _A),
          "its kernel in the source, without adapters",
          "none" if path is None else "one with them",
          "Give the base that the adapters were trained on, arranged alike.",
      )
    yield path, _fitted((*module, _A), a, b, leaves[path], alpha, scan_axis)


def _refuse_moments(path, role):
  if role.subtree is not None:
    raise errors.OptionError(
        path, f"weights alone, with {_FLAG}", "an optimizer's moments, of the weights as they were", "Pass --params_only."
    )


def _pair(path, adapters) -> tuple[np.ndarray, np.ndarray]:
  a, b = ((*path[:-1], name) for name in (_A, _B))
  if path not in (a, b) or not {a, b} <= adapters.keys():
    raise errors.LayoutError(
        path,
        f"{_A} and {_B}, the adapters of a kernel",
        "one alone" if path in (a, b) else "another leaf",
        f"Give {_FLAG} a checkpoint of such adapters alone.",
    )
  return adapters[a], adapters[b]


def _fitted(path, a, b, weight, alpha, scan_axis) -> Adapter:
  """The adapter of a weight, if it fits the weight's axes."""
  axis = None if a.ndim == 2 else scan_axis
  shape = list(weight.shape)
  if a.ndim == b.ndim and a.ndim in (2, 3) and len(shape) >= a.ndim and (axis is None or axis < 2):
    layers = 1 if axis is None else shape.pop(axis)
    a, b = (array[None] if axis is None else np.moveaxis(array, axis, 0) for array in (a, b))
    for inputs in range(1, len(shape)):
      wanted = (layers, math.prod(shape[:inputs])), (layers, a.shape[-1], math.prod(shape[inputs:]))
      if (a.shape[:2], b.shape) == wanted and {str(x.dtype) for x in (a, b, weight)} <= abstract_state.FLOATS:
        return Adapter(a, b, alpha / a.shape[-1], tuple(shape), inputs, axis)
  raise errors.LayoutError(
      path,
      f"adapters that fit its kernel, {plan_lib.described(weight)}, scanned along axis {scan_axis} or not as it is",
      f"{a.shape} {a.dtype} and {b.shape} {b.dtype}",
      "Give the base that they were trained on, arranged alike, and --param_scan_axis.",
  )
