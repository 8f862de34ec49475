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

"""How two arrays of one shape differ, block by block: first the bits, then how far apart the values are. No I/O."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import ml_dtypes
import numpy as np

Index = tuple[int, ...]

# Elements compared at a time. With 2**17, whose temporary arrays the allocator returns to the system each time, arrays
# that differ everywhere took three times as long.
_PIECE = 2**15

# Small dtypes are held one per byte, whose other bits mean nothing.
_SMALL = {"int1": 1, "uint1": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4}
_SMALL |= {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}

_WORDS = (1, 2, 4, 8)  # Bytes of NumPy's unsigned integers.
_MIDDLE = np.uint64(2**63)


@dataclasses.dataclass(frozen=True)
class Tolerance:
  """Accepts `|a - b| <= atol + rtol * |b|`, as `numpy.allclose` does, and two NaNs."""

  atol: float = 0.0
  rtol: float = 0.0


@dataclasses.dataclass(frozen=True)
class Element:
  """An element that differs: its index in the canonical leaf, its value on each side, and the bits in hexadecimal."""

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
  """How a leaf, or a part of it, differs. The `largest_…` are of elements that are finite on both sides.

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
    outside: how many are outside the tolerance.
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

  def merged(self, other: "Difference") -> "Difference":
    """The difference of both parts together, whatever their order."""
    names = [field.name for field in dataclasses.fields(self)]
    return Difference(**{name: _merged(name, getattr(self, name), getattr(other, name)) for name in names})


def measure(a: np.ndarray, b: np.ndarray, origin: Index, tolerance: Tolerance | None = None) -> Difference:
  """Compares two arrays of one shape.

  Args:
    a: a part of a leaf of A, of any dtype that NumPy knows with `ml_dtypes`.
    b: the same part of the leaf of B. Where its dtype is another, they are compared as numbers, in float64.
    origin: the part's place in the leaf.
    tolerance: decides what is counted as `outside`; None counts every element that differs.
  """
  shape, size = a.shape, a.dtype.itemsize
  if a.dtype == b.dtype and size in _WORDS and np.array_equal(a.view(f"u{size}"), b.view(f"u{size}")):  # Copies neither.
    return Difference(elements=a.size)
  a, b = (np.ascontiguousarray(array).reshape(-1) for array in (a, b))

  def element(i):
    index = tuple(int(start + offset) for start, offset in zip(origin, np.unravel_index(i, shape)))
    return Element(index, str(a[i]), str(b[i]), _hexadecimal(a[i]), _hexadecimal(b[i]))

  total = Difference(elements=a.size)
  for start in range(0, a.size, _PIECE):
    x, y = a[start : start + _PIECE], b[start : start + _PIECE]
    where = np.flatnonzero(_differs(x, y))
    if where.size:
      total = total.merged(_measured(x[where], y[where], lambda i, at=start + where: element(at[i]), tolerance))
  return total


def of_objects(a: Any, b: Any) -> Difference:
  """Compares leaves that are not arrays, such as strings."""
  if a == b:
    return Difference(elements=1)
  return Difference(elements=1, differing=1, first=Element((), repr(a), repr(b), "", ""), outside=1)


def ordered(array: np.ndarray) -> np.ndarray:
  """The rank of each value among all values of its dtype, as uint64; the difference of two ranks is their distance.

  For floats this is a distance in units in the last place: adjacent values have adjacent ranks, and -0.0 and 0.0 share
  one. For integers and bools it is the difference of the values. NaNs have no meaningful rank.
  """
  if not _is(array, np.floating):
    is_signed = _is(array, np.signedinteger)
    return array.astype(np.int64).view(np.uint64) ^ _MIDDLE if is_signed else array.astype(np.uint64)
  raw, kind = _words(array).astype(np.uint64), ml_dtypes.finfo(array.dtype)
  if float(kind.min) > 0:  # float8_e8m0fnu has no sign.
    return raw
  below = kind.bits - 1  # The bits below the sign.
  negative = np.negative((raw >> np.uint64(below)).view(np.int64))  # -1 for negative values, else 0.
  magnitude = (raw & np.uint64(2**below - 1)).view(np.int64)
  return ((magnitude ^ negative) - negative).view(np.uint64) ^ _MIDDLE  # Negated where negative, without a branch.


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """How far apart two arrays of `ordered` ranks are, as uint64."""
  return np.maximum(a, b) - np.minimum(a, b)


def _differs(a, b) -> np.ndarray:
  if a.dtype == b.dtype:
    different = _words(a) != _words(b)
    return different if different.ndim == 1 else different.any(axis=1)
  x, y = _values(a), _values(b)
  return ~((x == y) | (np.isnan(x) & np.isnan(y)))


def _measured(a, b, element: Callable[[int], Element], tolerance: Tolerance | None) -> Difference:
  """The difference of elements that all differ; `element` returns one by its number."""
  if not _is(a, np.number) and a.dtype != np.bool_:
    return Difference(differing=a.size, first=element(0), outside=a.size)  # Bits without a known meaning.
  with np.errstate(all="ignore"):
    x, y = _values(a), _values(b)
    finite, nans = np.isfinite(x) & np.isfinite(y), np.isnan(x) & np.isnan(y)
    absolute, ulp = _sizes(a, b, x, y)
    scale = np.maximum(np.abs(x), np.abs(y))
    relative = np.divide(absolute, scale, out=np.zeros(a.size), where=finite & (scale > 0))
    near = tolerance is not None and absolute <= tolerance.atol + tolerance.rtol * np.abs(y)
  chosen, odd = np.flatnonzero(finite), np.flatnonzero(~finite & ~nans)
  within = (finite & near) | (nans & (tolerance is not None))

  def largest(sizes):
    """The first of the largest among those that are finite."""
    if sizes is None or not chosen.size:
      return None
    i = int(np.argmax(sizes[chosen]))
    return Largest(sizes[chosen][i].item(), element(chosen[i]))

  return Difference(
      differing=a.size,
      first=element(0),
      largest_absolute=largest(absolute),
      largest_relative=largest(relative),
      largest_ulp=largest(ulp),
      not_finite=odd.size,
      first_not_finite=element(odd[0]) if odd.size else None,
      nan_bits=int(np.count_nonzero(nans)),
      zero_signs=int(np.count_nonzero(finite & (scale == 0))),
      outside=int(np.count_nonzero(~within)),
  )


def _sizes(a, b, x, y) -> tuple[np.ndarray, np.ndarray | None]:
  """The absolute differences, and those in units in the last place where the dtype has them."""
  if a.dtype != b.dtype or _is(a, np.complexfloating):
    return np.abs(x - y), None
  places = distance(ordered(a), ordered(b))
  return (np.abs(x - y), places) if _is(a, np.floating) else (places, None)


def _merged(name: str, one: Any, other: Any) -> Any:
  """This field of two parts together; of two equal maxima, the one at the lower index."""
  if isinstance(one, int):
    return one + other
  some = [value for value in (one, other) if value is not None]
  if name.startswith("first"):
    return min(some, key=lambda element: element.index, default=None)
  some.sort(key=lambda largest: largest.element.index)
  return max(some, key=lambda largest: largest.value, default=None)


def _is(array, kind) -> bool:
  return jax.dtypes.issubdtype(array.dtype, kind)


def _words(array: np.ndarray) -> np.ndarray:
  """The bits of a contiguous one-dimensional array, as unsigned integers of shape (size,) or (size, words each)."""
  size = array.dtype.itemsize
  width = size if size in _WORDS else 8 if size % 8 == 0 else 1
  raw = array.view(f"u{width}")
  if (bits := _SMALL.get(array.dtype.name)) is not None:
    raw = raw & np.uint8(2**bits - 1)
  return raw if width == size else raw.reshape(array.size, -1)


def _values(array: np.ndarray) -> np.ndarray:
  """The values as float64, or complex128; every float of at most 64 bits, and every integer up to 2**53, is exact."""
  return array.astype(np.complex128 if _is(array, np.complexfloating) else np.float64)


def _hexadecimal(value: Any) -> str:
  """The bits of a scalar."""
  return "0x" + _words(np.atleast_1d(value)).reshape(-1)[::-1].byteswap().tobytes().hex()
