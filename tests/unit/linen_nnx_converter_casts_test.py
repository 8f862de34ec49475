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

"""Casts that are asked for: which leaves, to which bits, and that what verifies them does its own arithmetic."""

from unittest import mock

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import linen_nnx_converter_util as util
import ml_dtypes
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import rounding

BFLOAT16 = ml_dtypes.bfloat16
# By the IEEE 754 rule, to nearest and of two to even: float32 bits and the bfloat16 bits that they become.
ROUNDED = {
    0x3F800000: 0x3F80,  # 1
    0x3F808000: 0x3F80,  # Halfway, down to even.
    0x3F818000: 0x3F82,  # Halfway, up to even.
    0x3F808001: 0x3F81,
    0x3F807FFF: 0x3F80,
    0xBF818000: 0xBF82,
    0x00000000: 0x0000,
    0x80000000: 0x8000,  # -0
    0x00000001: 0x0000,  # The least float32.
    0x00008000: 0x0000,  # Half of the least bfloat16.
    0x00008001: 0x0001,
    0x80018000: 0x8002,
    0x007FFFFF: 0x0080,  # The largest subnormal becomes normal.
    0x7F7F7FFF: 0x7F7F,  # What is just not too large.
    0x7F800000: 0x7F80,  # Infinity.
    0xFF800000: 0xFF80,
}


def all_of(dtype):
  """Every value of a dtype of 16 bits."""
  return np.arange(2**16, dtype=np.uint16).view(dtype)


def floats(seed, number):
  """Float32s of random bits."""
  return np.random.default_rng(seed).integers(0, 2**32, number, np.uint32).view(np.float32)


def decoder(*leaves):
  return {"decoder": {f"layers_{i}": {"w": leaf} for i, leaf in enumerate(leaves)}}


class RoundingTest(parameterized.TestCase):

  def test_literally(self):
    source = np.array(list(ROUNDED), np.uint32).view(np.float32)
    expected = np.array(list(ROUNDED.values()), np.uint16).view(BFLOAT16)
    np.testing.assert_array_equal(
        abstract_state.checked_cast(("w",), source, np.dtype(BFLOAT16)).view("u2"), expected.view("u2")
    )
    self.assertIsNone(rounding.first_difference(expected, source))

  @parameterized.parameters(BFLOAT16, np.float16)
  def test_what_is_narrow_becomes_wide_and_narrow_again(self, dtype):
    values = all_of(dtype)
    wide = abstract_state.checked_cast(("w",), values, np.dtype(np.float32))
    self.assertIsNone(rounding.first_difference(wide, values))
    back = abstract_state.checked_cast(("w",), wide, np.dtype(dtype))
    self.assertIsNone(rounding.first_difference(back, wide))
    is_nan = np.isnan(values.astype(np.float32))
    np.testing.assert_array_equal(back.view("u2")[~is_nan], values.view("u2")[~is_nan])
    self.assertTrue(np.isnan(back[is_nan].astype(np.float32)).all())

  @parameterized.product(
      dtypes=((np.float32, BFLOAT16), (np.float32, np.float16), (BFLOAT16, np.float16), (np.float16, BFLOAT16))
  )
  def test_the_verifiers_arithmetic_agrees_with_the_library(self, dtypes):
    source, target = dtypes
    values = (
        all_of(source) if source != np.float32 else np.concatenate([floats(0, 10**5), all_of(target).astype(np.float32)])
    )
    if source == np.float32:  # And all that is halfway between two.
      step = np.float32(2.0**-8) if target == BFLOAT16 else np.float32(2.0**-11)
      values = np.concatenate([values, (1 + step * np.arange(1, 512, dtype=np.float32))])
    with np.errstate(over="ignore", invalid="ignore"):
      cast = values.astype(target)
      fits = ~(np.isinf(cast.astype(np.float32)) & np.isfinite(values.astype(np.float32)))
    self.assertIsNone(rounding.first_difference(cast[fits], values[fits]))

  @parameterized.parameters(0, 1, 7, 15)
  def test_a_flipped_bit_is_found(self, bit):
    source = np.linspace(1, 2, 600_000, dtype=np.float32)
    cast = source.astype(BFLOAT16)
    self.assertEqual(rounding.first_difference(util.flipped(cast, 599_998, bit), source), 599_998)

  def test_what_is_too_large_is_not_infinite(self):
    self.assertEqual(rounding.first_difference(np.array([1, np.inf], BFLOAT16), np.array([1, 3.4e38], np.float32)), 1)


class LeavesTest(parameterized.TestCase):

  def test_by_role(self):
    params = decoder(np.ones((2, 3), np.float32)) | {"table": np.ones(2, np.int32)}
    aux = {"model": {"bn": {"mean": np.ones(3, np.float32)}, "rngs": {"params": {"count": np.zeros((), np.uint32)}}}}
    state = util.linen(params, nnx_aux=aux)
    cast = converter.convert_linen_to_nnx(state, scan_layers=False, nnx_values="plain", weight_dtype="bfloat16")
    w = ("decoder", "layers", "0", "w")
    dtype = lambda *path: str(_at(cast, path).dtype)
    self.assertEqual(dtype("model", *w), "bfloat16")
    self.assertEqual(dtype("model", "table"), "int32")
    self.assertEqual(dtype("model", "bn", "mean"), "float32")
    self.assertEqual(dtype("optimizer", "opt_state", "0", "mu", *w), "float32")
    cast = converter.convert_linen_to_nnx(state, scan_layers=False, nnx_values="plain", optimizer_dtype="float16")
    self.assertEqual(dtype("model", *w), "float32")
    self.assertEqual(dtype("optimizer", "opt_state", "0", "nu", *w), "float16")
    self.assertEqual(dtype("optimizer", "opt_state", "0", "count"), "int32")

  def test_moments_that_are_left_out_are_not_cast(self):
    with self.assertRaisesRegex(
        errors.OptionError, "^--optimizer_dtype=float16: expected an optimizer, found --params_only"
    ):
      converter.convert_linen_to_nnx(util.linen(decoder(np.ones(3))), params_only=True, optimizer_dtype="float16")

  def test_moments_that_are_not_there(self):
    state = {"params": {"params": decoder(np.ones(3))}, "step": np.int32(1)}
    with self.assertRaisesRegex(errors.OptionError, "^--optimizer_dtype=float16: expected moments to cast, "):
      converter.convert_linen_to_nnx(state, optimizer_dtype="float16")

  def test_of_jax(self):
    tiny = jnp.array([1e-40, 1.00390625, -0.0], jnp.float32)  # XLA's CPU would make the first of them zero.
    linen = {"params": {"params": decoder(tiny, tiny)}}
    found = converter.convert_linen_to_nnx(linen, weight_dtype="bfloat16")["model"]["decoder"]["layers"]["w"]["value"]
    self.assertIsInstance(found, jax.Array)
    np.testing.assert_array_equal(np.asarray(found).view("u2")[:, 0], np.asarray(tiny).astype(BFLOAT16).view("u2"))

  def test_of_structs(self):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), "x")
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    leaf = jax.ShapeDtypeStruct((4, 2), np.float32, sharding=sharding)
    options = {"scan_layers": False, "nnx_values": "plain", "weight_dtype": "bfloat16"}
    found = converter.convert_linen_to_nnx({"params": {"params": decoder(leaf)}}, **options)["model"]["decoder"][
        "layers"
    ]["0"]["w"]
    self.assertEqual((found.shape, str(found.dtype), found.sharding), ((4, 2), "bfloat16", sharding))

  @parameterized.parameters(ml_dtypes.float8_e4m3fn, np.float64, np.complex64)
  def test_what_is_no_plain_number_is_refused(self, dtype):
    with self.assertRaisesRegex(
        errors.OptionError,
        f"^params/params/decoder/layers_0/w: expected bfloat16, .*found {np.dtype(dtype)}. Leave out --weight_dtype",
    ):
      converter.convert_linen_to_nnx({"params": {"params": decoder(np.ones(3, dtype))}}, weight_dtype="bfloat16")

  def test_layers_of_two_dtypes_are_stacked_only_on_request(self):
    layers = decoder(np.ones(3, np.float32), np.ones(3, BFLOAT16))
    with self.assertRaises(errors.LayerStackError):
      converter.convert_linen_to_nnx({"params": {"params": layers}})


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


class CheckpointTest(util.CheckpointTestCase):

  @parameterized.parameters(True, False)
  def test_there_and_back(self, use_ocdbt):
    """Weights that a bfloat16 can hold come back to the bit; the moments were left alone, and go by reference."""
    state = util.linen(jax.tree.map(lambda leaf: leaf.astype(BFLOAT16).astype(np.float32), util.unscanned_params()))
    source = self.save("source", state, use_ocdbt=use_ocdbt)
    there = converter.convert_checkpoint(source, self.tmp / "nnx", weight_dtype="bfloat16", scan_layers=True)
    self.assertTrue(there.verified)
    self.assertIn("; cast 6 leaves from float32 to bfloat16; ", there.summary())
    self.assertEqual(there.record()["casts"], {"float32 to bfloat16": 6})
    streamed = {path[0] for path, way in there.ways.items() if way == "streamed"}
    self.assertNotIn("opt_state", {key for path, way in there.ways.items() if way == "streamed" for key in path})
    self.assertEqual(streamed, {"model", "optimizer"})  # Of the optimizer, the step.
    self.assertLen(converter.verify_checkpoint(self.tmp / "nnx").verified, there.digests)
    converter.convert_checkpoint(self.tmp / "nnx", self.tmp / "back", weight_dtype="float32", scan_layers=False)
    self.assertEqual(*(util.flat(converter.load_checkpoint(path)) for path in (source, self.tmp / "back")))

  def test_what_does_not_fit_is_refused_and_nothing_is_left(self):
    source = self.save("source", {"params": {"params": decoder(np.array([1, 1e5], np.float32))}})
    with self.assertRaisesRegex(
        errors.OptionError,
        "^params/params/decoder/layers_0/w: expected numbers that float16 can hold, of at most 6.55.*, found 100000.0. ",
    ):
      converter.convert_checkpoint(source, self.tmp / "out", weight_dtype="float16")
    self.assertEqual([path.name for path in self.tmp.iterdir()], ["source"])

  @parameterized.parameters(True, False)
  def test_a_writer_that_truncates_is_found(self, scan_layers):
    layer = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)
    source = self.save("source", {"params": {"params": decoder(layer, layer)}})
    truncate = lambda path, value, dtype: (np.ascontiguousarray(value).view("u4") >> 16).astype("u2").view(dtype)
    refused = self.assertRaisesRegex(errors.VerificationError, "at index .*, for 1.0909")
    with mock.patch.object(abstract_state, "checked_cast", truncate), refused:
      converter.convert_checkpoint(source, self.tmp / "out", weight_dtype="bfloat16", scan_layers=scan_layers)
    self.assertEqual([path.name for path in self.tmp.iterdir()], ["source"])


if __name__ == "__main__":
  absltest.main()
