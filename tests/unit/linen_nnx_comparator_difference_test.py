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

"""The numerics of a comparison, against slow references that share nothing with them."""

import fractions
import math
import struct

from absl.testing import absltest
from absl.testing import parameterized
import hypothesis
from hypothesis import strategies as st
import ml_dtypes
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_comparator import difference

SMALL_FLOATS = (
    *("float4_e2m1fn", "float6_e2m3fn", "float6_e3m2fn", "float8_e3m4", "float8_e4m3", "float8_e4m3b11fnuz"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "bfloat16", "float16"),
)
INTEGERS = ("int2", "uint2", "int4", "uint4", "int8", "uint8", "int16", "int32", "uint32", "int64", "uint64", "bool")


def dtype_of(name):
  return np.dtype(getattr(ml_dtypes, name, None) or name)


def every_value(name):
  """Every value of a small dtype, by its bits."""
  dtype = dtype_of(name)
  bits = ml_dtypes.finfo(dtype).bits
  return np.arange(2**bits, dtype="u1" if dtype.itemsize == 1 else "u2").view(dtype)


def measure(a, b, dtype, **options):
  a, b = (np.asarray(values, dtype_of(dtype)) for values in (a, b))
  return difference.measure(a, b, (0,) * a.ndim, **options)


class OrderTest(parameterized.TestCase):

  @parameterized.parameters(*SMALL_FLOATS)
  def test_ulp_counts_the_values_between(self, name):
    values = every_value(name)
    with np.errstate(invalid="ignore"):  # Signaling NaNs.
      finite = values[np.isfinite(values.astype(np.float64))]
    # The reference: the finite values in their order, each number once, so that -0.0 and 0.0 have one place.
    place_of = {number: place for place, number in enumerate(sorted(set(finite.astype(np.float64).tolist())))}
    places = np.array([place_of[number] for number in finite.astype(np.float64).tolist()])
    ordered = difference.ordered(finite)
    first = int(np.argmin(places))
    np.testing.assert_array_equal(difference.distance(ordered, ordered[first]), places - places[first])

  @hypothesis.given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(-40, 40))
  def test_ulp_of_float32_by_steps(self, start, steps):
    end = np.float32(start)
    with np.errstate(over="ignore"):
      for _ in range(abs(steps)):
        end = np.nextafter(end, np.float32(math.copysign(math.inf, steps)))
    hypothesis.assume(np.isfinite(end))
    places = difference.ordered(np.array([start, end], np.float32))
    self.assertEqual(int(difference.distance(places[0], places[1])), abs(steps))

  @hypothesis.given(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)
  def test_ulp_of_float64_by_bits(self, a, b):
    def place(value):  # Python integers, which cannot overflow.
      (bits,) = struct.unpack("<q", struct.pack("<d", value))
      return bits if bits >= 0 else -(bits & (2**63 - 1))

    places = difference.ordered(np.array([a, b]))
    self.assertEqual(int(difference.distance(places[0], places[1])), abs(place(a) - place(b)))

  @parameterized.parameters(*INTEGERS)
  def test_integers_are_apart_by_their_difference(self, name):
    dtype = dtype_of(name)
    if name == "bool":
      ends = [0, 1]
    else:
      info = ml_dtypes.iinfo(dtype)
      ends = [int(info.min), 0, 1, int(info.max)]
    places = difference.ordered(np.array(ends).astype(dtype) if name != "uint64" else np.array(ends, np.uint64))
    for x, i in zip(ends, places):
      for y, j in zip(ends, places):
        self.assertEqual(int(difference.distance(i, j)), abs(x - y))

  def test_bits_above_a_small_dtype_mean_nothing(self):
    a, b = (np.array([raw], np.uint8).view(ml_dtypes.int4) for raw in (0x0F, 0xFF))
    self.assertEqual(difference.measure(a, b, (0,)).differing, 0)


class MeasureTest(parameterized.TestCase):

  def test_equal(self):
    found = measure([1.0, math.nan, -0.0], [1.0, math.nan, -0.0], "float32")
    self.assertEqual(found, difference.Difference(elements=3))

  def test_one_flipped_bit(self):
    a = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    b = a.copy()
    b.view(np.uint32)[1, 2, 3] ^= 1
    found = difference.measure(a, b, (10, 20, 30))
    element = difference.Element((11, 22, 33), "23.0", "23.000002", "0x41b80000", "0x41b80001")
    self.assertEqual((found.elements, found.differing, found.first, found.outside), (24, 1, element, 1))
    self.assertEqual(found.largest_ulp, difference.Largest(1, element))
    self.assertEqual(found.largest_absolute, difference.Largest(2.0**-19, element))

  @parameterized.product(name=("float32", "float64", "int32", "bfloat16", "float8_e4m3fn"), bit=(0, 3, 7))
  def test_any_flipped_bit_is_found(self, name, bit):
    a = np.zeros(200_000, dtype_of(name))  # More than one piece.
    b = a.copy()
    b[150_001:150_002].view(np.uint8)[0] ^= 1 << bit
    found = difference.measure(a, b, (0,))
    self.assertEqual((found.differing, found.first.index), (1, (150_001,)))

  def test_nans_and_infinities(self):
    nan, inf = math.nan, math.inf
    found = measure([nan, inf, inf, 1.0, inf, 2.0], [1.0, -inf, 1.0, nan, inf, 3.0], "float32")
    self.assertEqual((found.differing, found.not_finite, found.nan_bits, found.outside), (5, 4, 0, 5))
    self.assertEqual(found.first_not_finite.index, (0,))
    self.assertEqual(found.largest_absolute.value, 1.0)  # Of the finite ones.
    self.assertEqual(found.largest_absolute.element.index, (5,))

  def test_nan_payloads(self):
    a, b = (np.array([bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    found = difference.measure(a, b, (0,))
    self.assertEqual((found.differing, found.nan_bits, found.not_finite), (1, 1, 0))
    self.assertEqual((found.first.a_bits, found.first.b_bits), ("0x7fc00000", "0x7fc00001"))
    self.assertIsNone(found.largest_absolute)
    self.assertEqual(difference.measure(a, b, (0,), difference.Tolerance()).outside, 0)

  def test_signed_zeros(self):
    found = measure([0.0], [-0.0], "bfloat16")
    self.assertEqual((found.differing, found.zero_signs, found.largest_ulp.value), (1, 1, 0))
    self.assertEqual(found.largest_relative.value, 0.0)

  def test_large_integers_are_exact(self):
    found = measure([2**63 - 1, -(2**63)], [2**63 - 2, 2**63 - 1], "int64")
    self.assertEqual(found.largest_absolute.value, 2**64 - 1)
    self.assertEqual(found.largest_absolute.element.index, (1,))
    self.assertIsNone(found.largest_ulp)

  @parameterized.parameters("int4", "uint4", "int8", "bool")
  def test_small_integers(self, name):
    found = measure([0, 1, 1], [0, 0, 1], name)
    self.assertEqual((found.differing, found.largest_absolute.value, found.largest_relative.value), (1, 1, 1.0))

  def test_complex_numbers(self):
    found = measure([1 + 1j, 2], [1 + 1j, 2 + 2j], "complex64")
    self.assertEqual((found.differing, found.largest_absolute.value, found.first.index), (1, 2.0, (1,)))
    self.assertEqual(measure([1j], [2j], "complex128").first.a_bits, "0x3ff00000000000000000000000000000")

  def test_other_dtypes_are_compared_as_numbers(self):
    a, b = np.array([1.0, 1.01, math.nan, 0.0], np.float32), np.array([1, 1.01, math.nan, -0.0], ml_dtypes.bfloat16)
    found = difference.measure(a, b, (0,))
    self.assertEqual((found.differing, found.first.index, found.largest_ulp), (1, (1,), None))
    self.assertEqual(difference.measure(np.array(7, np.int32), np.array(7, np.uint32), ()).differing, 0)

  def test_a_scalar_and_an_empty_array(self):
    self.assertEqual(measure(3.0, 4.0, "float32").first.index, ())
    self.assertEqual(measure(np.zeros((0, 3)), np.zeros((0, 3)), "float32"), difference.Difference())

  @parameterized.parameters((None, 3), ((0.1, 0.0), 2), ((0.0, 0.1), 1), ((1.0, 0.0), 1), ((100.0, 0.0), 0))
  def test_tolerance(self, tolerance, outside):
    tolerance = difference.Tolerance(*tolerance) if tolerance else None
    found = measure([1.0, 0.0, 20.0], [1.05, 0.125, 21.5], "float64", tolerance=tolerance)
    self.assertEqual((found.differing, found.outside), (3, outside))

  @hypothesis.given(st.data())
  def test_against_a_slow_reference(self, data):
    name = data.draw(st.sampled_from(("float32", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float16")))
    dtype = dtype_of(name)
    raw = st.integers(0, 2 ** (8 * dtype.itemsize) - 1)
    pairs = data.draw(st.lists(st.one_of(st.tuples(raw, raw), raw.map(lambda bits: (bits, bits))), max_size=12))
    a, b = (np.array([pair[side] for pair in pairs], f"u{dtype.itemsize}").view(dtype) for side in (0, 1))
    found = difference.measure(a, b, (5,), difference.Tolerance(0.5, 0.25))
    expected = slow(pairs, a.astype(np.float64).tolist(), b.astype(np.float64).tolist())
    largest = lambda some: None if some is None else (some.value, some.element.index)
    self.assertEqual(
        expected,
        {
            "differing": found.differing,
            "first": found.first and found.first.index,
            "absolute": largest(found.largest_absolute),
            "not_finite": found.not_finite,
            "nan_bits": found.nan_bits,
            "outside": found.outside,
        },
    )

  @hypothesis.given(st.data())
  def test_parts_together_are_the_whole(self, data):
    small = st.sampled_from((0.0, -0.0, 1.0, 1.5, math.nan, math.inf))
    rows = data.draw(st.integers(1, 5))
    a, b = (np.array(data.draw(st.lists(small, min_size=3 * rows, max_size=3 * rows))).reshape(rows, 3) for _ in "ab")
    cut = data.draw(st.integers(0, rows))
    parts = [difference.measure(a[cut:], b[cut:], (cut, 0)), difference.measure(a[:cut], b[:cut], (0, 0))]
    self.assertEqual(parts[0].merged(parts[1]), difference.measure(a, b, (0, 0)))
    self.assertEqual(parts[1].merged(parts[0]), difference.measure(a, b, (0, 0)))


def slow(pairs, a, b):
  """One element after the other, in exact arithmetic."""
  differing = [i for i, (x, y) in enumerate(pairs) if x != y]
  finite = [i for i in differing if math.isfinite(a[i]) and math.isfinite(b[i])]
  nans = [i for i in differing if math.isnan(a[i]) and math.isnan(b[i])]
  exact = {i: abs(fractions.Fraction(a[i]) - fractions.Fraction(b[i])) for i in finite}
  within = [i for i in finite if exact[i] <= fractions.Fraction(1, 2) + fractions.Fraction(b[i]).__abs__() / 4]
  worst = max(finite, key=lambda i: (float(exact[i]), -i), default=None)
  return {
      "differing": len(differing),
      "first": (differing[0] + 5,) if differing else None,
      "absolute": None if worst is None else (float(exact[worst]), (worst + 5,)),
      "not_finite": len(differing) - len(finite) - len(nans),
      "nan_bits": len(nans),
      "outside": len(differing) - len(within) - len(nans),
  }


if __name__ == "__main__":
  absltest.main()
