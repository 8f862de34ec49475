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
import itertools
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
_A, _B = "_lora_a", "_lora_b"  # Qwix appends these to the name of a weight.
_KERNEL = "kernel"  # Of MaxText's `DenseGeneral`, inputs before outputs.
_STRIP = 2**20  # Elements computed at a time.


@dataclasses.dataclass(frozen=True)
class Adapter:
  """What is added to a weight: `a` times `b`, scaled.

  Qwix gives `a` the axes of the weight that are summed over, or that the data has too, and `b` the others (`lora.py`).

  Attributes:
    a: (layers, the axes that it has …, rank), with one layer where the weight is not stacked.
    b: (layers, rank, the others …).
    scale: alpha / rank.
    rows: the axes of the weight, without its layer axis, that `a` has.
    layer_axis: the weight's layer axis, or None.
  """

  a: np.ndarray
  b: np.ndarray
  scale: float
  rows: tuple[int, ...]
  layer_axis: int | None

  @property
  def columns(self) -> tuple[int, ...]:
    """The axes of the weight, without its layer axis, that `b` has."""
    return tuple(axis for axis in range(self.a.ndim + self.b.ndim - 4) if axis not in self.rows)

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
    a = self.a[(layers, *(inside[row] for row in self.rows))].astype(np.float32)
    b = self.b[(layers, slice(None), *(inside[column] for column in self.columns))].astype(np.float32)
    product = np.matmul(a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1))
    return self._as_weight(product, (*a.shape[1:-1], *b.shape[2:]))

  def _as_weight(self, product, sizes) -> np.ndarray:
    """An array of (layers, rows, columns), rearranged to the weight's axes; `sizes` are those of rows and columns."""
    order = np.argsort((*self.rows, *self.columns)) + 1
    product = product.reshape(len(product), *sizes).transpose(0, *order)
    return product[0] if self.layer_axis is None else np.moveaxis(product, 0, self.layer_axis)


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
    adapters: `…/W_lora_a` and `…/W_lora_b` of weights `…/W`, by path inside the model.
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
  pairs = {_weight_of(path): _pair(path, adapters) for path in adapters}
  if not pairs:
    raise errors.LayoutError(_FLAG, "adapters", "none", "Give the checkpoint that the LoRA run saved.")
  return dataclasses.replace(plan, merges=dict(_merges(pairs, weights, plan.source.leaves, alpha, scan_axis)))


def _merges(pairs, weights, leaves, alpha, scan_axis):
  for inner, (a, b) in pairs.items():
    path, adapter = weights.get(inner), (*inner[:-1], inner[-1] + _A)
    if path is None or adapter in weights:
      raise errors.LayoutError(
          adapter,
          f"its {inner[-1]} in the source, without adapters",
          "none" if path is None else "one with them",
          "Give the base that the adapters were trained on, arranged alike.",
      )
    yield path, _fitted(adapter, a, b, leaves[path], alpha, scan_axis)


def _weight_of(path) -> Path:
  return (*path[:-1], path[-1].removesuffix(_A).removesuffix(_B))


def _refuse_moments(path, role):
  if role.subtree is not None:
    raise errors.OptionError(
        path, f"weights alone, with {_FLAG}", "an optimizer's moments, of the weights as they were", "Pass --params_only."
    )


def _pair(path, adapters) -> tuple[np.ndarray, np.ndarray]:
  *module, name = _weight_of(path)
  a, b = ((*module, name + suffix) for suffix in (_A, _B))
  if path not in (a, b) or not {a, b} <= adapters.keys():
    raise errors.LayoutError(
        path,
        f"…{_A} and …{_B}, the adapters of a weight",
        "one alone" if path in (a, b) else "another leaf",
        f"Give {_FLAG} a checkpoint of such adapters alone.",
    )
  return adapters[a], adapters[b]


def _fitted(path, a, b, weight, alpha, scan_axis) -> Adapter:
  """The adapter of a weight, if it fits the weight's axes in one way."""
  are_floats = {str(array.dtype) for array in (a, b, weight)} <= abstract_state.FLOATS
  is_kernel, found = path[-1] == _KERNEL + _A, {}
  for axis in (None, scan_axis) if are_floats else ():
    for rows, of_a, of_b in _splits(a, b, weight.shape, axis, is_kernel):
      key = axis, tuple(row for row in rows if _layer_shape(weight.shape, axis)[row] != 1)
      found.setdefault(key, Adapter(of_a, of_b, alpha / a.shape[-1], rows, axis))
  if len(found) == 1:
    return next(iter(found.values()))
  ways = f", in {len(found)} ways" if found else ""
  raise errors.LayoutError(
      path,
      f"adapters that fit their weight, {plan_lib.described(weight)}, in one way, scanned as it along axis {scan_axis}",
      f"{a.shape} {a.dtype} and {b.shape} {b.dtype}{ways}",
      "Give the base that they were trained on, arranged alike, and --param_scan_axis.",
  )


def _splits(a, b, shape, axis, is_kernel):
  """The ways to share a weight's axes out between A and B: the axes of A, and both by layers, with all axes.

  Of a kernel, Qwix flattens the inputs, the first axes, in A and the outputs in B. Of other weights it keeps the axes.
  """
  layer = _layer_shape(shape, axis)
  if axis is not None and axis >= min(a.ndim, b.ndim, len(shape)):
    return
  a, b = (array[None] if axis is None else np.moveaxis(array, axis, 0) for array in (a, b))
  layers, rank = 1 if axis is None else shape[axis], a.shape[-1]
  sizes = lambda axes: tuple(layer[axis] for axis in axes)
  stored = lambda axes: (math.prod(sizes(axes)),) if is_kernel else sizes(axes)
  for count in range(1, len(layer) + (not is_kernel)):
    for rows in (tuple(range(count)),) if is_kernel else itertools.combinations(range(len(layer)), count):
      columns = [axis for axis in range(len(layer)) if axis not in rows]
      if (a.shape, b.shape) == ((layers, *stored(rows), rank), (layers, rank, *stored(columns))):
        yield rows, a.reshape(layers, *sizes(rows), rank), b.reshape(layers, rank, *sizes(columns))


def _layer_shape(shape, axis) -> tuple[int, ...]:
  return tuple(size for at, size in enumerate(shape) if at != axis)
