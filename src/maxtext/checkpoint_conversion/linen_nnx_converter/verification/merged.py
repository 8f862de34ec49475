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

"""What weights should be after merging adapters, in float64, and how far float32 may be off."""

from collections.abc import Iterator
import functools
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.verification import rounding

_ELEMENTS = 2**18  # At a time; each takes about 80 bytes.
_UNIT, _LEAST = 2.0**-24, 2.0**-149  # Errors of a float32 operation: relative, and of the smallest numbers.
_SUM = np.dtype([("value", np.float64), ("leeway", np.float64)])


def sums(adapter: Any, box: tuple[tuple[int, int], ...], data: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
  """Strips of a box of a weight, each with the right sums and their leeway, as `_SUM`s.

  Args:
    adapter: a `lora.Adapter`, of which the arrays are taken.
    box: (start, stop) for each axis of the weight.
    data: the weight, before the merge, in that box.
  """
  operations = adapter.a.shape[-1] + 3  # Products, additions, the scale and its cast.
  least = _LEAST * (1 + abs(adapter.scale))
  rows = max(1, _ELEMENTS * len(data) // max(1, data.size))
  for begin in range(0, len(data), rows):
    values = rounding.exact(np.ascontiguousarray(data[begin : begin + rows]))
    strip = ((box[0][0] + begin, box[0][0] + begin + len(values)), *box[1:])
    a, b = _factors(adapter, strip)
    placed = functools.partial(_as_weight, adapter=adapter, box=strip)
    found = np.empty(values.shape, _SUM)
    found["value"] = values + placed(a @ b * adapter.scale)
    norms = np.linalg.norm(a, axis=2)[:, :, None] * np.linalg.norm(b, axis=1)[:, None]
    size = np.abs(values) + placed(norms * abs(adapter.scale))  # By Cauchy and Schwarz.
    found["leeway"] = operations * (1.01 * _UNIT * size + least)
    yield strip, found


def first_difference(found: np.ndarray, expected: np.ndarray) -> int | None:
  """The index, in C order, of the first element farther from its sum than arithmetic and one rounding allow."""
  values, wanted, leeway = rounding.exact(np.ascontiguousarray(found)), expected["value"], expected["leeway"]
  bits, least = rounding.FORMATS[str(found.dtype)]
  with np.errstate(invalid="ignore"):
    allowed = leeway + 2.0**-bits * (np.abs(wanted) + leeway) + 2.0 ** (least - bits)
    same = (np.abs(values - wanted) <= allowed) | (values == wanted) | (np.isnan(values) & np.isnan(wanted))
  return None if same.all() else int(np.argmin(same))


def _factors(adapter, box) -> tuple[np.ndarray, np.ndarray]:
  """The parts of A and B for a box of the weight, as (layers, rows, rank) and (layers, rank, columns)."""
  layers, bounds = _bounds(adapter, box)
  ranks = range(adapter.a.shape[-1])
  a = adapter.a[np.ix_(layers, *(bounds[axis] for axis in adapter.rows), ranks)]
  b = adapter.b[np.ix_(layers, ranks, *(bounds[axis] for axis in adapter.columns))]
  return rounding.exact(a.reshape(len(layers), -1, len(ranks))), rounding.exact(b.reshape(len(layers), len(ranks), -1))


def _bounds(adapter, box) -> tuple[range, list[range]]:
  """The layers of a box of the weight, and its indices along each other axis."""
  bounds = [range(*of) for of in box]
  layers = range(1) if adapter.layer_axis is None else bounds.pop(adapter.layer_axis)
  return layers, bounds


def _as_weight(array, adapter, box) -> np.ndarray:
  """An array of (layers, rows, columns), rearranged to the weight's axes."""
  _, bounds = _bounds(adapter, box)
  axes = (*adapter.rows, *adapter.columns)
  array = array.reshape(len(array), *(len(bounds[axis]) for axis in axes))
  array = np.moveaxis(array, range(1, array.ndim), [axis + 1 for axis in axes])
  return array[0] if adapter.layer_axis is None else np.moveaxis(array, 0, adapter.layer_axis)
