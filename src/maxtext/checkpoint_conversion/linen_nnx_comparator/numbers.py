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

"""What the bits of a dtype mean: which of them count, and how far apart two values are in units in the last place."""

from typing import Any

import jax
import ml_dtypes
import numpy as np

# Small dtypes are held one to a byte; the bits above them mean nothing.
_SMALL = {"int1": 1, "uint1": 1, "int2": 2, "uint2": 2, "int4": 4, "uint4": 4}
_SMALL |= {"float4_e2m1fn": 4, "float6_e2m3fn": 6, "float6_e3m2fn": 6}

_MIDDLE = np.uint64(2**63)


def is_float(dtype: np.dtype) -> bool:
  return jax.dtypes.issubdtype(dtype, np.floating)


def is_complex(dtype: np.dtype) -> bool:
  return jax.dtypes.issubdtype(dtype, np.complexfloating)


def is_integer(dtype: np.dtype) -> bool:
  """Whether it is an integer, of any width, or a bool."""
  return dtype == np.bool_ or jax.dtypes.issubdtype(dtype, np.integer)


def words(array: np.ndarray) -> np.ndarray:
  """The bits of a contiguous one-dimensional array, as unsigned integers of shape (size,) or (size, words each)."""
  size = array.dtype.itemsize
  width = size if size in (1, 2, 4, 8) else 8 if size % 8 == 0 else 1
  raw = array.view(f"u{width}")
  if (bits := _SMALL.get(array.dtype.name)) is not None:
    raw = raw & np.uint8(2**bits - 1)
  return raw if width == size else raw.reshape(array.size, -1)


def ordered(array: np.ndarray) -> np.ndarray:
  """The place of each value among all values of its dtype, as uint64; the difference of two places is their distance.

  For floats it is a distance in units in the last place: next to each other are values with no other between them, and
  -0.0 and 0.0 have one place. For integers and bools it is the difference of the values. NaNs have no meaningful place.
  """
  dtype = array.dtype
  if is_integer(dtype):
    if dtype == np.bool_ or jax.dtypes.issubdtype(dtype, np.unsignedinteger):
      return array.astype(np.uint64)
    return array.astype(np.int64).view(np.uint64) ^ _MIDDLE
  raw = words(array).astype(np.uint64)
  if float(ml_dtypes.finfo(dtype).min) > 0:  # float8_e8m0fnu has no sign.
    return raw
  below = ml_dtypes.finfo(dtype).bits - 1  # The bits below the sign.
  negative = np.negative((raw >> np.uint64(below)).view(np.int64))  # -1 for negative values, else 0.
  magnitude = (raw & np.uint64(2**below - 1)).view(np.int64)
  return ((magnitude ^ negative) - negative).view(np.uint64) ^ _MIDDLE  # Negated where negative, without a branch.


def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """How far apart two arrays of `ordered` places are, as uint64."""
  return np.maximum(a, b) - np.minimum(a, b)


def values(array: np.ndarray) -> np.ndarray:
  """The values as float64, or complex128; every float of at most 64 bits, and every integer up to 2**53, is exact."""
  return array.astype(np.complex128 if is_complex(array.dtype) else np.float64)


def hexadecimal(value: Any) -> str:
  """The bits of a scalar."""
  raw = words(np.atleast_1d(value)).reshape(-1)
  digits = 2 * raw.dtype.itemsize
  return "0x" + "".join(f"{int(word):0{digits}x}" for word in raw[::-1])
