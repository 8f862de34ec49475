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

"""What weights should be when adapters are merged, found in float64, and how far float32 may be from it."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.verification import rounding

_ELEMENTS = 2**18  # At a time: each takes some 80 bytes.
_UNIT, _LEAST = 2.0**-24, 2.0**-149  # The errors of an operation in float32: relative, and of its least numbers.
_SUM = np.dtype([("value", np.float64), ("leeway", np.float64)])


def sums(adapter: Any, box: tuple[tuple[int, int], ...], data: np.ndarray) -> Iterator[tuple[Any, np.ndarray]]:
  """Strips of a box of a weight, each with the sums that belong there, and their leeway, as `_SUM`s.

  Args:
    adapter: a `lora.Adapter`, of which the arrays are taken.
    box: (start, stop) for each axis of the weight.
    data: the weight, before the merge, in that box.
  """
  a, b = _factors(adapter, box)
  norms = np.linalg.norm(a, axis=2)[:, :, None] * abs(adapter.scale), np.linalg.norm(b, axis=1)[:, None]
  inner = [stop - start for axis, (start, stop) in enumerate(box) if axis != adapter.layer_axis]
  operations = adapter.a.shape[-1] + 3  # Products, additions, the scale, and the cast of it.
  least = _LEAST * (1 + abs(adapter.scale))
  rows = max(1, _ELEMENTS * len(data) // max(1, data.size))
  for begin in range(0, len(data), rows):
    values = rounding.exact(np.ascontiguousarray(data[begin : begin + rows]))
    strip = ((box[0][0] + begin, box[0][0] + begin + len(values)), *box[1:])
    if adapter.layer_axis == 0:
      of_layers, inside, lengths = slice(begin, begin + len(values)), slice(None), inner
    else:  # The first axis is the slowest of the inputs.
      step, of_layers, lengths = a.shape[1] // len(data), slice(None), [len(values), *inner[1:]]
      inside = slice(begin * step, (begin + len(values)) * step)
    placed = lambda array, lengths=lengths: _as_weight(array, adapter.layer_axis, lengths)
    found = np.empty(values.shape, _SUM)
    found["value"] = values + placed(a[of_layers, inside] @ b[of_layers] * adapter.scale)
    size = np.abs(values) + placed(norms[0][of_layers, inside] * norms[1][of_layers])  # By Cauchy and Schwarz.
    found["leeway"] = operations * (1.01 * _UNIT * size + least)
    yield strip, found


def first_difference(found: np.ndarray, expected: np.ndarray) -> int | None:
  """The index, in C order, of the first element that is farther from the sum than arithmetic and one rounding allow."""
  values, wanted, leeway = rounding.exact(np.ascontiguousarray(found)), expected["value"], expected["leeway"]
  bits, least = rounding.FORMATS[str(found.dtype)]
  with np.errstate(invalid="ignore"):
    allowed = leeway + 2.0**-bits * (np.abs(wanted) + leeway) + 2.0 ** (least - bits)
    same = (np.abs(values - wanted) <= allowed) | (values == wanted) | (np.isnan(values) & np.isnan(wanted))
  return None if same.all() else int(np.argmin(same))


def _factors(adapter, box) -> tuple[np.ndarray, np.ndarray]:
  """What of A and of B counts in a box of the weight, as (layers, inputs, rank) and (layers, rank, outputs)."""
  bounds = [np.arange(*of) for axis, of in enumerate(box) if axis != adapter.layer_axis]
  layers = np.arange(1) if adapter.layer_axis is None else np.arange(*box[adapter.layer_axis])
  rows, columns = (
      np.ravel_multi_index(np.ix_(*bounds[of]), adapter.shape[of]).ravel()
      for of in (slice(adapter.inputs), slice(adapter.inputs, None))
  )
  return rounding.exact(adapter.a[layers][:, rows]), rounding.exact(adapter.b[layers][:, :, columns])


def _as_weight(array, layer_axis, lengths) -> np.ndarray:
  """What is (layers, inputs, outputs), with the axes of the weight."""
  array = array.reshape(len(array), *lengths)
  return array[0] if layer_axis is None else np.moveaxis(array, 0, layer_axis)
