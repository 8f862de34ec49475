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

"""How two arrays of one shape differ, block by block: bits first, then how far apart the values are. No I/O."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_comparator import numbers

Index = tuple[int, ...]

# Elements that are compared at a time. With 2**17, whose temporary arrays the allocator returns to the system each time,
# what differs everywhere took three times as long.
_PIECE = 2**15


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """Within it, `|a - b| <= atol + rtol * |b|`, as in `numpy.allclose`; NaNs are within it of each other alone."""

  atol: float = 0.0
  rtol: float = 0.0


@dataclasses.dataclass(frozen=True)
class Element:
  """An element that differs.

  Attributes:
    index: its index in the canonical leaf.
    a: the value in A, written out.
    b: the value in B.
    a_bits: its bits in A, in hexadecimal.
    b_bits: its bits in B.
  """

  index: Index
  a: str
  b: str
  a_bits: str
  b_bits: str


@dataclasses.dataclass(frozen=True)
class Largest:
  """The largest difference of a kind, and the first element that has it."""

  value: float | int
  element: Element


@dataclasses.dataclass(frozen=True)
class Difference:
  """How a leaf, or a part of it, differs. All of `largest_…` are of elements that are finite on both sides.

  Attributes:
    elements: how many elements were compared.
    differing: how many are not equal to the bit; where the dtypes differ, not equal as numbers.
    first: the first that differs, in C order.
    largest_absolute: of |a - b|, in float64; exact for integers.
    largest_relative: of |a - b| / max(|a|, |b|), so at most 2.
    largest_ulp: of the distance in units in the last place, for floats of one dtype.
    not_finite: how many have a NaN or an infinity on one side and another value on the other.
    first_not_finite: the first of these.
    nan_bits: how many are NaN on both sides, with other bits.
    zero_signs: how many are zero on both sides, with other signs.
    outside: how many are outside of the tolerance.
    absolute_histogram: how many differ by 2**e to 2**(e + 1), by e.
    ulp_histogram: the same in units in the last place.
  """

  elements: int = 0
  differing: int = 0
  first: Element | None = None
  largest_absolute: Largest | None = None
  largest_relative: Largest | None = None
  largest_ulp: Largest | None = None
  not_finite: int = 0
  first_not_finite: Element | None = None
  nan_bits: int = 0
  zero_signs: int = 0
  outside: int = 0
  absolute_histogram: Mapping[int, int] = dataclasses.field(default_factory=dict)
  ulp_histogram: Mapping[int, int] = dataclasses.field(default_factory=dict)

  def merged(self, other: "Difference") -> "Difference":
    """The difference of both parts together, whatever their order."""
    return Difference(
        **{field.name: _MERGE[field.name](getattr(self, field.name), getattr(other, field.name)) for field in _FIELDS}
    )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
  """Whether two arrays of one shape and dtype are equal to the bit; a NaN equals itself, and -0.0 is not 0.0."""
  a, b = (np.ascontiguousarray(array).reshape(-1) for array in (a, b))
  return all(np.array_equal(numbers.words(x), numbers.words(y)) for x, y in zip(_pieces(a), _pieces(b)))


def measure(a: np.ndarray, b: np.ndarray, origin: Index, tolerance: Tolerance | None = None) -> Difference:
  """Compares two arrays of one shape.

  Args:
    a: a part of a leaf of A, of any dtype that NumPy knows with `ml_dtypes`.
    b: the same part of the leaf of B. Where its dtype is another, they are compared as numbers, in float64.
    origin: the part's place in the leaf.
    tolerance: what `outside` is counted by; None counts every element that differs.
  """
  shape = a.shape
  a, b = (np.ascontiguousarray(array).reshape(-1) for array in (a, b))
  total = Difference()
  for i, (x, y) in enumerate(zip(_pieces(a), _pieces(b))):
    piece = Difference(elements=x.size)
    where = np.flatnonzero(_differs(x, y))
    if where.size:
      located = _Located(x[where], y[where], where + i * _PIECE, shape, origin)
      piece = dataclasses.replace(_measured(located, tolerance), elements=x.size)
    total = total.merged(piece)
  return total


@dataclasses.dataclass(frozen=True)
class _Located:
  """Elements that differ, with their places in the block."""

  a: np.ndarray
  b: np.ndarray
  flat: np.ndarray
  shape: tuple[int, ...]
  origin: Index

  def element(self, i: int) -> Element:
    inside = np.unravel_index(self.flat[i], self.shape)
    index = tuple(int(start + offset) for start, offset in zip(self.origin, inside))
    a, b = self.a[i], self.b[i]
    return Element(index, str(a), str(b), numbers.hexadecimal(a), numbers.hexadecimal(b))

  def largest(self, sizes: np.ndarray, chosen: np.ndarray) -> Largest | None:
    """The first of the largest among the chosen ones."""
    if not chosen.size:
      return None
    i = int(np.argmax(sizes[chosen]))
    return Largest(sizes[chosen][i].item(), self.element(chosen[i]))


def _pieces(array):
  for start in range(0, array.size, _PIECE):
    yield array[start : start + _PIECE]


def _differs(a, b) -> np.ndarray:
  if a.dtype == b.dtype:
    different = numbers.words(a) != numbers.words(b)
    return different if different.ndim == 1 else different.any(axis=1)
  x, y = numbers.values(a), numbers.values(b)
  return ~((x == y) | (np.isnan(x) & np.isnan(y)))


def _measured(located: _Located, tolerance: Tolerance | None) -> Difference:
  """The difference of elements that all differ."""
  a, b = located.a, located.b
  count = a.size
  if not any(kind(a.dtype) for kind in (numbers.is_float, numbers.is_integer, numbers.is_complex)):
    return Difference(differing=count, first=located.element(0), outside=count)  # Bits without a known meaning.
  with np.errstate(all="ignore"):
    x, y = numbers.values(a), numbers.values(b)
    nans = np.isnan(x) & np.isnan(y)
    finite = np.isfinite(x) & np.isfinite(y)
    chosen, odd = np.flatnonzero(finite), np.flatnonzero(~finite & ~nans)
    absolute, ulp = _sizes(a, b, x, y)
    size_of_b = np.abs(y)
    scale = np.maximum(np.abs(x), size_of_b)
    relative = np.divide(absolute, scale, out=np.zeros(count), where=finite & (scale > 0))
    zeros = finite & (scale == 0)
    outside = count
    if tolerance is not None:
      near = absolute <= tolerance.atol + tolerance.rtol * size_of_b
      outside = count - int(np.count_nonzero(np.where(finite, near, nans)))
  return Difference(
      differing=count,
      first=located.element(0),
      largest_absolute=located.largest(absolute, chosen),
      largest_relative=located.largest(relative, chosen),
      largest_ulp=None if ulp is None else located.largest(ulp, chosen),
      not_finite=odd.size,
      first_not_finite=located.element(odd[0]) if odd.size else None,
      nan_bits=int(np.count_nonzero(nans)),
      zero_signs=int(np.count_nonzero(zeros)),
      outside=outside,
      absolute_histogram=_histogram(absolute[chosen]),
      ulp_histogram={} if ulp is None else _histogram(ulp[chosen]),
  )


def _sizes(a, b, x, y) -> tuple[np.ndarray, np.ndarray | None]:
  """The absolute differences, and those in units in the last place where the dtype has them."""
  if a.dtype == b.dtype and not numbers.is_complex(a.dtype):
    places = numbers.distance(numbers.ordered(a), numbers.ordered(b))
    return (np.abs(x - y), places) if numbers.is_float(a.dtype) else (places, None)
  return np.abs(x - y), None


def _histogram(sizes: np.ndarray) -> dict[int, int]:
  """Counts by the exponent of the power of two below; zeros are left out."""
  sizes = sizes.astype(np.float64)
  sizes = sizes[(sizes > 0) & np.isfinite(sizes)]
  if not sizes.size:
    return {}
  exponents = np.frexp(sizes)[1] - 1
  lowest = int(exponents.min())
  counts = np.bincount(exponents - lowest)
  return {lowest + int(i): int(counts[i]) for i in np.flatnonzero(counts)}


def _earlier(one: Element | None, other: Element | None) -> Element | None:
  return min((element for element in (one, other) if element), key=lambda element: element.index, default=None)


def _larger(one: Largest | None, other: Largest | None) -> Largest | None:
  """The larger one; of two alike, the one at the lower index."""
  some = [largest for largest in (one, other) if largest]
  if len(some) == 2 and some[0].value == some[1].value:
    return min(some, key=lambda largest: largest.element.index)
  return max(some, key=lambda largest: largest.value, default=None)


def _sum(one: int, other: int) -> int:
  return one + other


def _joined(one: Mapping[int, int], other: Mapping[int, int]) -> dict[int, int]:
  return {key: one.get(key, 0) + other.get(key, 0) for key in sorted(one.keys() | other.keys())}


_FIELDS = dataclasses.fields(Difference)
_MERGE: dict[str, Any] = {field.name: _sum for field in _FIELDS}
_MERGE |= {"first": _earlier, "first_not_finite": _earlier}
_MERGE |= {"largest_absolute": _larger, "largest_relative": _larger, "largest_ulp": _larger}
_MERGE |= {"absolute_histogram": _joined, "ulp_histogram": _joined}
