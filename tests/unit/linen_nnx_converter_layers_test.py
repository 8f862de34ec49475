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

"""Layer stacks: every crossing of scanned, flat and nested, and what is refused."""

from absl.testing import absltest
from absl.testing import parameterized
import jax
from linen_nnx_converter_layer_trees import LayersTestCase
from linen_nnx_converter_layer_trees import state
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

LAYERS = 12  # More than ten: `layers_10` sorts before `layers_9`.


def flat_layers(make=lambda i: {"w": util.array(3, 5, start=10 * i)}, count=LAYERS, stack="layers"):
  return {f"{stack}_{i}": make(i) for i in range(count)}


def stacked(leaves, axis):
  return np.stack(leaves, axis)


class LayersTest(LayersTestCase):

  def test_all_crossings(self):
    """flat, nested and scanned; Linen and NNX: each turned into each other."""
    flat = util.unscanned_params(LAYERS)
    layers = [flat["decoder"][f"layers_{i}"] for i in range(LAYERS)]
    rest = {"decoder_norm": flat["decoder"]["decoder_norm"]}
    nested = flat | {"decoder": {"layers": {str(i): layer for i, layer in enumerate(layers)}} | rest}
    scanned = flat | {
        "decoder": {
            "layers": {
                "mlp": {
                    "wi_0": {"kernel": stacked([layer["mlp"]["wi_0"]["kernel"] for layer in layers], 1)},
                    "wi_0_scale": stacked([layer["mlp"]["wi_0_scale"] for layer in layers], 1),
                },
                "norm": {"scale": stacked([layer["norm"]["scale"] for layer in layers], 1)},
                "gain": stacked([layer["gain"] for layer in layers], 0),
            }
        }
        | rest
    }
    arrangements = {
        (True, None): scanned,
        (False, "flat"): flat,
        (False, "nested"): nested,
    }
    for (is_scanned, named), params in arrangements.items():
      linen = util.linen(params)
      nnx = converter.convert_linen_to_nnx(linen, scan_layers=is_scanned, layer_naming=named)
      self.assert_tree(nnx["optimizer"]["opt_state"]["0"]["mu"], util.linen(params)["opt_state"][0]["mu"]["params"])
      for (scan_layers, naming), wanted in arrangements.items():
        options = {"scan_layers": scan_layers, "layer_naming": naming}
        self.assert_tree(converter.convert_nnx_to_linen(nnx, **options), util.linen(wanted))
        there = converter.convert_linen_to_nnx(linen, nnx_values="plain", **options)
        self.assert_tree(there["model"], wanted)
        self.assert_tree(there["optimizer"]["opt_state"]["0"]["nu"], util.linen(wanted)["opt_state"][0]["nu"]["params"])

  def test_defaults(self):
    linen = state(flat_layers(count=3))
    self.assertEqual(converter.convert_linen_to_nnx(linen)["model"]["decoder"]["layers"]["w"]["value"].shape, (3, 3, 5))
    nested = converter.convert_linen_to_nnx(linen, scan_layers=False)
    self.assertCountEqual(nested["model"]["decoder"]["layers"], ["0", "1", "2"])
    self.assert_tree(converter.convert_nnx_to_linen(nested), linen)

  @parameterized.parameters(
      (0, (), (12,), 0),
      (0, (3,), (12, 3), 0),
      (0, (3, 5), (12, 3, 5), 0),
      (1, (), (12,), 0),
      (1, (3,), (3, 12), 1),
      (1, (3, 5), (3, 12, 5), 1),
      (2, (3,), (3, 12), 1),
      (2, (3, 5), (3, 5, 12), 2),
      (2, (3, 5, 7), (3, 5, 12, 7), 2),
  )
  def test_param_scan_axis(self, param_scan_axis, shape, scanned_shape, axis):
    layers = flat_layers(lambda i: {"w": util.array(*shape, start=10 * i)})
    nnx = converter.convert_linen_to_nnx(state(layers), param_scan_axis=param_scan_axis)
    leaf = nnx["model"]["decoder"]["layers"]["w"]["value"]
    self.assertEqual(leaf.shape, scanned_shape)
    np.testing.assert_array_equal(np.take(leaf, 10, axis), layers["layers_10"]["w"])
    back = converter.convert_nnx_to_linen(nnx, scan_layers=False, param_scan_axis=param_scan_axis)
    self.assert_tree(back, state(layers))

  def test_what_is_no_param_has_its_layer_axis_first(self):
    rngs = lambda i: {
        "dropout": {"rngs": {"params": {"key": util.array(4, start=i, dtype=np.uint32), "count": np.uint32(i)}}}
    }
    linen = state(flat_layers(), nnx_aux={"model": {"decoder": flat_layers(rngs)}})
    nnx = converter.convert_linen_to_nnx(linen)
    streams = nnx["model"]["decoder"]["layers"]["dropout"]["rngs"]["params"]
    self.assertEqual(streams["key"]["value"].shape, (12, 4))
    self.assertEqual(streams["count"]["value"].shape, (12,))
    self.assert_tree(converter.convert_nnx_to_linen(nnx, scan_layers=False), linen)

  def test_every_stack_of_every_component(self):
    linen = {
        "params": {
            "params": {
                "decoder": flat_layers(count=2, stack="dense_layers") | flat_layers(count=3, stack="moe_layers"),
                "encoder": flat_layers(count=4),
            }
        }
    }
    model = converter.convert_linen_to_nnx(linen, nnx_values="plain")["model"]
    self.assertEqual(model["decoder"]["dense_layers"]["w"].shape, (3, 2, 5))
    self.assertEqual(model["decoder"]["moe_layers"]["w"].shape, (3, 3, 5))
    self.assertEqual(model["encoder"]["layers"]["w"].shape, (3, 4, 5))
    self.assert_tree(converter.convert_nnx_to_linen({"model": model}, scan_layers=False), linen)

  @parameterized.parameters(
      ("decoder", "mtp_layer_0"),
      ("vision_encoder", "layers_0"),
      ("decoder", "layers_0_3"),
      ("decoder", "layers_" + "9" * 5000),  # More digits than Python reads.
  )
  def test_never_stacked(self, component, name):
    linen = {"params": {"params": {component: {name: {"w": util.array(3)}}}}}
    model = converter.convert_linen_to_nnx(linen, nnx_values="plain")["model"]
    self.assert_tree(model, linen["params"]["params"])

  def test_other_kinds_of_arrays(self):
    layers = flat_layers(lambda i: {"w": jax.numpy.full((3, 5), i)})
    leaf = converter.convert_linen_to_nnx(state(layers))["model"]["decoder"]["layers"]["w"]["value"]
    self.assertIsInstance(leaf, jax.Array)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(layers))
    struct = converter.convert_linen_to_nnx(structs)["model"]["decoder"]["layers"]["w"]["value"]
    self.assertEqual(struct, jax.ShapeDtypeStruct((3, 12, 5), np.int32))
    keys = flat_layers(lambda i: {"rngs": {"key": jax.random.key(i)}})
    nnx = converter.convert_linen_to_nnx(state(layers, nnx_aux={"model": {"decoder": keys}}))
    stack = nnx["model"]["decoder"]["layers"]["rngs"]["key"]["value"]
    self.assertEqual(stack.shape, (12,))
    self.assertTrue(jax.dtypes.issubdtype(stack.dtype, jax.dtypes.prng_key))

  def test_structs_keep_their_shardings(self):
    mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
    named = lambda *spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    struct = lambda shape, sharding: jax.ShapeDtypeStruct(shape, np.int32, sharding=sharding)
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    layer = {"w": struct((3, 5), named(None, "fsdp")), "b": struct((3,), single)}
    mixed = lambda i: {"m": struct((3,), named("fsdp" if i else "tensor"))}
    tree = state(flat_layers(lambda i: layer | mixed(i), 4), step=struct((), named()))
    tree["params"]["params"]["decoder"]["norm"] = struct((7, 2), single)
    nnx = converter.convert_linen_to_nnx(tree, nnx_values="plain")
    model = nnx["model"]["decoder"]
    self.assertEqual(nnx["optimizer"]["step"], jax.ShapeDtypeStruct((), np.uint32, sharding=named()))
    self.assertIs(model["norm"], tree["params"]["params"]["decoder"]["norm"])
    self.assertEqual(model["layers"]["w"], struct((3, 4, 5), named(None, None, "fsdp")))
    self.assertEqual([model["layers"][name].sharding for name in "bm"], [None, None])
    back = converter.convert_nnx_to_linen(nnx, scan_layers=False)["params"]["params"]["decoder"]
    self.assertEqual(back["layers_2"]["w"], struct((3, 5), named(None, "fsdp")))

  @parameterized.parameters("bfloat16", "float8_e4m3fn", "float16", "float32")
  @pytest.mark.integration
  def test_nan_payloads_survive_in_jax_arrays(self, dtype):
    dtype = jax.numpy.dtype(dtype)
    bits = np.random.default_rng(0).integers(0, 256, (LAYERS, 6, dtype.itemsize), np.uint8)
    layers = flat_layers(lambda i: {"w": jax.numpy.asarray(bits[i].view(dtype)[:, 0])})
    there = converter.convert_linen_to_nnx(state(layers))
    self.assert_tree(converter.convert_nnx_to_linen(there, scan_layers=False), state(layers))

  @parameterized.named_parameters(
      ("missing_layer", lambda d: d.pop("layers_1"), "params/params/decoder/layers_1: expected the layers 0 to 11"),
      ("missing_leaf", lambda d: d["layers_3"].pop("w"), "params/params/decoder/layers_3"),
      (
          "leaf_in_some_layers",
          lambda d: d["layers_4"].update(v=util.array(2)),
          "layers_0/v: expected a leaf in every layer, as params/params/decoder/layers_4/v, found none",
      ),
      (
          "other_shape",
          lambda d: d["layers_5"].update(w=util.array(5, 3)),
          r"layers_5/w: expected \(3, 5\) float32, as params/params/decoder/layers_0/w has, found \(5, 3\) float32",
      ),
      ("other_dtype", lambda d: d["layers_5"].update(w=util.array(3, 5, dtype=np.float16)), "layers_5/w: .*float16"),
      ("subtree_for_leaf", lambda d: d["layers_5"].update(w={"kernel": util.array(3, 5)}), "layers_5/w: expected a leaf"),
  )
  def test_refuses_layers_that_are_not_alike(self, damage, message):
    decoder = flat_layers()
    damage(decoder)
    with self.assertRaisesRegex(errors.LayerStackError, message):
      converter.convert_linen_to_nnx(state(decoder))

  def test_refuses_a_missing_layer_whatever_is_asked_for(self):
    decoder = flat_layers()
    del decoder["layers_1"]
    with self.assertRaisesRegex(errors.LayerStackError, "layers_1"):
      converter.convert_linen_to_nnx(state(decoder), scan_layers=False)

  def test_names_the_missing_layer_in_every_layout(self):
    linen = util.linen({"decoder": flat_layers(count=3)})
    for nnx_values, path in (("plain", "model/decoder/layers/1"), ("all_boxed", "model/decoder/layers/1")):
      nnx = converter.convert_linen_to_nnx(linen, scan_layers=False, nnx_values=nnx_values)
      moments = nnx["optimizer"]["opt_state"]["0"]
      for tree in (nnx["model"], moments["mu"], moments["nu"]):
        del tree["decoder"]["layers"]["1"]
      with self.assertRaisesRegex(errors.LayerStackError, f"^{path}: expected the layers 0 to 2 of decoder/layers"):
        converter.convert_nnx_to_linen(nnx)

  def test_an_absurd_number_of_layers_is_refused(self):
    struct = jax.ShapeDtypeStruct((3, 2**62), np.float32)
    with self.assertRaisesRegex(
        errors.LayerStackError, "decoder/layers/w: expected at most 100000 layers, found 4611686"
    ):
      converter.convert_linen_to_nnx(state({"layers": {"w": struct}}), scan_layers=False)

  @parameterized.parameters(
      ({"layers": {"w": util.array(3, 4)}, "layers_0": {"w": util.array(3)}},),
      ({"layers": {"0": {"w": util.array(3)}}, "layers_0": {"w": util.array(3)}},),
      ({"layers": {"0": {"w": util.array(3)}, "w": util.array(3)}},),
  )
  def test_refuses_a_stack_written_in_two_ways(self, decoder):
    with self.assertRaisesRegex(errors.PathCollisionError, "expected the layers of decoder/layers written in one way"):
      converter.convert_linen_to_nnx(state(decoder))

  def test_refuses_to_unstack_leaves_that_disagree_on_the_number_of_layers(self):
    decoder = {"layers": {"a": util.array(3, 4, 5), "b": util.array(3, 6, 5)}}
    with self.assertRaisesRegex(
        errors.LayerStackError, r"layers/b: expected 4 layers, .* found 6 on axis 1 of \(3, 6, 5\)"
    ):
      converter.convert_linen_to_nnx(state(decoder), scan_layers=False)


if __name__ == "__main__":
  absltest.main()
