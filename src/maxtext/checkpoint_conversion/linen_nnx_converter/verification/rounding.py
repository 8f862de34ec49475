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

"""What a number becomes in another dtype, by arithmetic, so that no library's cast is trusted."""

import numpy as np

# For each dtype, the bits of its significand, including the hidden one, and the exponent of its least normal number.
FORMATS = {"bfloat16": (8, -126), "float16": (11, -14), "float32": (24, -126)}
_ELEMENTS = 2**18  # At a time; each takes about 50 bytes.


def first_difference(found: np.ndarray, source: np.ndarray) -> int | None:
  """The index, in C order, of the first element that is not the source's, rounded to nearest, ties to even.

  Signs of zeros count; all NaNs are equal.

  Args:
    found: numbers of a dtype in `FORMATS`.
    source: the numbers that they were cast from, of another dtype.
  """
  found, source = np.ascontiguousarray(found).reshape(-1), np.ascontiguousarray(source).reshape(-1)
  for begin in range(0, source.size, _ELEMENTS):
    values, expected = exact(found[begin : begin + _ELEMENTS]), exact(source[begin : begin + _ELEMENTS])
    expected = rounded(expected, str(found.dtype))
    same = (values == expected) & (np.signbit(values) == np.signbit(expected))
    same |= np.isnan(values) & np.isnan(expected)
    if not same.all():
      return begin + int(np.argmin(same))
  return None


def exact(values: np.ndarray) -> np.ndarray:
  """The same numbers as float64; a bfloat16 is the upper half of a float32."""
  if str(values.dtype) == "bfloat16":
    values = (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
  with np.errstate(invalid="ignore"):  # Signaling NaNs.
    return values.astype(np.float64)


def rounded(values: np.ndarray, dtype: str) -> np.ndarray:
  """The numbers of `dtype` nearest to these float64s, as float64; `np.rint` rounds ties to even, as IEEE 754 does.

  A number that is too large for `dtype` stays finite, because it must not become infinite.
  """
  bits, least_exponent = FORMATS[dtype]
  with np.errstate(invalid="ignore"):
    _, exponents = np.frexp(values)  # values = m * 2**exponents, 0.5 <= |m| < 1
    unit = np.maximum(exponents, least_exponent + 1) - bits  # The exponent of the last bit.
    return np.ldexp(np.rint(np.ldexp(values, -unit)), unit)
