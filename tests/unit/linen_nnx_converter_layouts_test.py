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

"""State layouts: literal trees in, literal trees out."""

import collections

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

W = np.float32([[1, 2], [3, 4]])
MU, NU = W + 10, W + 20
KEY = np.uint32([0, 7])
COUNT, STEP = np.int32(5), np.int32(9)

LINEN = {
    "params": {"params": {"decoder": {"norm": {"scale": W}}}},
    "opt_state": [
        {
            "count": COUNT,
            "mu": {"params": {"decoder": {"norm": {"scale": MU}}}},
            "nu": {"params": {"decoder": {"norm": {"scale": NU}}}},
        },
        None,
        {"count": COUNT},
    ],
    "step": STEP,
}
NNX_PLAIN = {
    "model": {"decoder": {"norm": {"scale": W}}},
    "optimizer": {
        "opt_state": {
            "0": {"count": COUNT, "mu": {"decoder": {"norm": {"scale": MU}}}, "nu": {"decoder": {"norm": {"scale": NU}}}},
            "2": {"count": COUNT},
        },
        "step": np.uint32(9),
    },
}
NNX_BOXED = NNX_PLAIN | {"model": {"decoder": {"norm": {"scale": {"value": W}}}}}
NNX_ALL_BOXED = NNX_BOXED | {
    "optimizer": {
        "opt_state": {
            "0": {
                "count": {"value": COUNT},
                "mu": {"decoder": {"norm": {"scale": {"value": MU}}}},
                "nu": {"decoder": {"norm": {"scale": {"value": NU}}}},
            },
            "2": {"count": {"value": COUNT}},
        },
        "step": {"value": np.uint32(9)},
    },
}
OLD_NNX = {
    "params": {"decoder": {"norm": {"scale": {"value": W}}}},
    "opt_state": NNX_PLAIN["optimizer"]["opt_state"],
    "step": np.uint32(9),
}
RNGS = {"rngs": {"params": {"key": KEY, "count": np.uint32(3)}}}


def nnx_with(*path_and_leaf, moments=True):
  """NNX_PLAIN with one more variable in the model."""
  *path, leaf = path_and_leaf
  variable = leaf
  for key in reversed(path):
    variable = {key: variable}
  state = {"model": {"decoder": NNX_PLAIN["model"]["decoder"] | variable}}
  return state | ({"optimizer": NNX_PLAIN["optimizer"]} if moments else {})


class LayoutsTest(parameterized.TestCase):

  def assert_tree(self, found, expected):
    self.assertEqual(util.flat(found), util.flat(expected))

  @parameterized.parameters(("boxed", NNX_BOXED), ("plain", NNX_PLAIN), ("all_boxed", NNX_ALL_BOXED))
  def test_linen_and_nnx(self, nnx_values, nnx):
    self.assert_tree(converter.convert_linen_to_nnx(LINEN, nnx_values=nnx_values), nnx)
    self.assert_tree(converter.convert_nnx_to_linen(nnx), LINEN)

  def test_nnx_is_boxed_by_default(self):
    self.assert_tree(converter.convert_linen_to_nnx(LINEN), NNX_BOXED)

  def test_old_nnx(self):
    self.assert_tree(converter.convert_nnx_to_linen(OLD_NNX), LINEN)

  def test_params_only(self):
    linen = {"params": {"params": {"decoder": {"norm": {"scale": W}}}}}
    self.assert_tree(
        converter.convert_linen_to_nnx(LINEN, params_only=True), {"decoder": {"norm": {"scale": {"value": W}}}}
    )
    self.assert_tree(
        converter.convert_linen_to_nnx(LINEN, params_only=True, nnx_values="plain"), {"decoder": {"norm": {"scale": W}}}
    )
    self.assert_tree(converter.convert_nnx_to_linen(NNX_PLAIN, params_only=True), linen)
    self.assert_tree(converter.convert_linen_to_nnx(linen), {"model": {"decoder": {"norm": {"scale": {"value": W}}}}})

  @parameterized.parameters(
      {"state": {"decoder": {"norm": {"scale": {"value": W}}}}},
      {"state": {"decoder": {"norm": {"scale": W}}}},
      {"state": {"base": {"decoder": {"norm": {"scale": {"value": W}}}}}},
      {"state": {"model": {"decoder": {"norm": {"scale": W}}}}},
  )
  def test_nnx_params_only_to_linen(self, state):
    self.assertEqual(converter.detect_format(state), "nnx")
    self.assert_tree(converter.convert_nnx_to_linen(state), {"params": {"params": {"decoder": {"norm": {"scale": W}}}}})

  def test_optimizer_that_is_no_chain(self):
    linen = LINEN | {"opt_state": LINEN["opt_state"][0]}
    nnx = NNX_BOXED | {"optimizer": {"opt_state": NNX_PLAIN["optimizer"]["opt_state"]["0"], "step": np.uint32(9)}}
    self.assert_tree(converter.convert_linen_to_nnx(linen), nnx)
    self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)

  def test_rng_state_goes_to_nnx_aux_and_back(self):
    nnx = nnx_with("dropout", RNGS)
    linen = LINEN | {"nnx_aux": {"model": {"decoder": {"dropout": RNGS}}}}
    self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)
    self.assert_tree(converter.convert_linen_to_nnx(linen, nnx_values="plain"), nnx)
    self.assert_tree(converter.convert_nnx_to_linen(nnx, nnx_aux="drop"), LINEN)

  @parameterized.parameters("dropout", "rngs", "to_nnx__rngs")
  def test_moments_prove_a_param_whatever_its_module_is_called(self, module):
    linen = util.linen({"decoder": {module: {"kernel": W, "count": W}, "norm": {"scale": W}}})
    for nnx_values in ("boxed", "plain", "all_boxed"):
      nnx = converter.convert_linen_to_nnx(linen, nnx_values=nnx_values)
      self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)
      self.assert_tree(converter.convert_nnx_to_linen(nnx, nnx_aux="drop"), linen)

  @parameterized.parameters("dropout", "rngs", "to_nnx__rngs")
  def test_without_moments_rng_state_is_told_by_its_dtype_too(self, module):
    nnx = {"model": {"decoder": {module: {"kernel": W, "count": W, "key": KEY}}}}
    linen = converter.convert_nnx_to_linen(nnx)
    self.assert_tree(linen["params"], {"params": {"decoder": {module: {"kernel": W, "count": W}}}})
    self.assert_tree(linen["nnx_aux"], {"model": {"decoder": {module: {"key": KEY}}}})

  def test_a_lost_moment_in_a_module_called_dropout_is_seen(self):
    nnx = converter.convert_linen_to_nnx(util.linen({"dropout": {"kernel": W}, "norm": {"scale": W}}))
    del nnx["optimizer"]["opt_state"]["0"]["mu"]["dropout"], nnx["optimizer"]["opt_state"]["0"]["nu"]["dropout"]
    with self.assertRaisesRegex(errors.MomentError, "mu/dropout/kernel: expected an optimizer leaf"):
      converter.convert_nnx_to_linen(nnx)

  @parameterized.parameters(("bias",), ("routing_table",), ("mean",))
  def test_a_variable_without_moments_is_no_param(self, name):
    linen = LINEN | {"nnx_aux": {"model": {"decoder": {"gate": {name: W}}}}}
    self.assert_tree(converter.convert_nnx_to_linen(nnx_with("gate", name, W)), linen)

  def test_batch_statistics_are_known_without_moments(self):
    state = converter.convert_nnx_to_linen(nnx_with("norm", {"mean": W, "var": W, "scale": W}, moments=False))
    self.assert_tree(state["nnx_aux"], {"model": {"decoder": {"norm": {"mean": W, "var": W}}}})
    self.assert_tree(state["params"], {"params": {"decoder": {"norm": {"scale": W}}}})

  def test_other_collections_are_carried(self):
    params = {"params": LINEN["params"]["params"], "_overwrite_with_gradient": {"decoder": {"norm": {"scale": KEY}}}}
    first = dict(
        LINEN["opt_state"][0],
        mu={
            "params": {"decoder": {"norm": {"scale": MU}}},
            "_overwrite_with_gradient": {"decoder": {"norm": {"scale": KEY}}},
        },
    )
    linen = LINEN | {"params": params, "opt_state": [first, None, {"count": COUNT}]}
    nnx = converter.convert_linen_to_nnx(linen)
    self.assert_tree(nnx["model"], NNX_BOXED["model"])
    self.assert_tree(nnx["optimizer"], NNX_BOXED["optimizer"])
    self.assert_tree(nnx["linen_aux"]["params"], {"_overwrite_with_gradient": {"decoder": {"norm": {"scale": KEY}}}})
    self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)

  @parameterized.parameters(
      ({"decoder": {"gate": {"value": W}}}, "plain", "params/params/decoder/gate/value"),
      ({"decoder": {"gate": {"value": W}, "norm": {"scale": W}}}, "plain", "params/params/decoder/gate/value"),
      ({"decoder": {"gate": {"value": W}}}, "boxed", "opt_state/0/mu/params/decoder/gate/value"),
  )
  def test_a_leaf_that_would_be_taken_for_a_box_is_refused(self, params, nnx_values, path):
    with self.assertRaisesRegex(errors.LayoutError, f"^{path}: .*own name is value, .*--nnx_values=all_boxed"):
      converter.convert_linen_to_nnx(util.linen(params), nnx_values=nnx_values)

  def test_a_leaf_of_the_name_value_where_it_is_no_box(self):
    linen = util.linen({"decoder": {"gate": {"value": W, "key": W}}})
    for nnx_values in ("boxed", "plain", "all_boxed"):
      nnx = converter.convert_linen_to_nnx(linen, nnx_values=nnx_values)
      self.assert_tree(converter.convert_nnx_to_linen(nnx), linen)

  def test_a_mixture_of_boxes_in_the_optimizer(self):
    nnx = converter.convert_linen_to_nnx(LINEN)
    nnx["optimizer"]["opt_state"]["2"]["count"] = {"value": COUNT}
    with self.assertRaisesRegex(errors.LayoutError, "expected all leaves boxed .* or none, .*2/count/value boxed"):
      converter.convert_nnx_to_linen(nnx)
    self.assert_tree(converter.convert_nnx_to_linen(nnx, params_only=True), {"params": LINEN["params"]})

  def test_inputs_are_not_modified_and_leaves_are_shared(self):
    before = util.flat(LINEN)
    nnx = converter.convert_linen_to_nnx(LINEN)
    self.assertIs(nnx["model"]["decoder"]["norm"]["scale"]["value"], W)
    self.assertEqual(util.flat(LINEN), before)

  @parameterized.parameters((11,), (0,))
  def test_a_python_step_stays_one(self, step):
    nnx = converter.convert_linen_to_nnx(LINEN | {"step": step})
    self.assertIs(type(nnx["optimizer"]["step"]), int)
    self.assertEqual(converter.convert_nnx_to_linen(nnx)["step"], step)

  @parameterized.parameters((np.int64, np.uint32), (np.uint32, np.uint32), (np.int32, np.uint32))
  def test_step_dtype(self, source, target):
    self.assertEqual(converter.convert_linen_to_nnx(LINEN | {"step": source(9)})["optimizer"]["step"].dtype, target)

  @parameterized.parameters(({"step": np.int32(-1)},), ({"step": np.int64(2**32)},), ({"step": np.float32(1)},))
  def test_step_out_of_range(self, change):
    with self.assertRaisesRegex(errors.StepError, "^step: expected .*, found .*"):
      converter.convert_linen_to_nnx(LINEN | change)

  def test_step_too_large_for_linen(self):
    nnx = {"model": NNX_PLAIN["model"], "optimizer": {"step": np.uint32(2**31)}}
    with self.assertRaisesRegex(errors.StepError, "optimizer/step: .* found 2147483648"):
      converter.convert_nnx_to_linen(nnx)

  @parameterized.parameters((LINEN, "linen"), (NNX_PLAIN, "nnx"), (NNX_ALL_BOXED, "nnx"), (OLD_NNX, "nnx"))
  def test_detect_format(self, state, framework):
    self.assertEqual(converter.detect_format(state), framework)

  def test_detect_format_of_a_tree_without_leaves(self):
    self.assertEqual(converter.detect_format({"params": {"params": {"decoder": {"layers": {}}}}}), "linen")

  @parameterized.named_parameters(
      ("nothing", {}, "top level: expected model"),
      ("step_alone", {"step": STEP}, "top level: expected model"),
      ("both", LINEN | NNX_PLAIN, "either model .NNX. or params .Linen., found model"),
      ("unknown_key_linen", LINEN | {"ema": {"w": W}}, "^ema: expected only .*, found ema"),
      ("unknown_key_nnx", NNX_PLAIN | {"ema": {"w": W}}, "^ema: expected only .*, found ema"),
      ("params_neither_nested_nor_boxed", {"params": {"decoder": {"w": W}}}, "^params: expected params/params"),
      ("boxed_in_places", {"model": {"a": {"value": W}, "b": W}}, "^model/b: expected all leaves boxed"),
      ("module_and_collection", {"params": {"params": {"decoder": {"w": W}}, "decoder": {"w": W}}}, "^params/decoder: "),
  )
  def test_refuses_layout(self, state, message):
    with self.assertRaisesRegex(errors.LayoutError, message):
      converter.detect_format(state)

  def test_conversion_errors_are_value_errors(self):
    with self.assertRaises(ValueError):
      converter.detect_format({"step": STEP})

  @parameterized.named_parameters(
      ("aux_of_no_model", LINEN | {"nnx_aux": {"optimizer": {"x": W}}}, "^nnx_aux/optimizer/x: expected a place"),
      ("collection_without_module", LINEN | {"params": {"params": {"w": W}, "batch_stats": W}}, "^params/batch_stats: "),
  )
  def test_refuses_a_leaf_that_nothing_accounts_for(self, state, message):
    state = dict(state) if "nnx_aux" in state else {"params": state["params"]}
    with self.assertRaisesRegex(errors.UnaccountedLeafError, message):
      converter.convert_linen_to_nnx(state)

  @parameterized.parameters((converter.convert_nnx_to_linen, LINEN), (converter.convert_linen_to_nnx, NNX_PLAIN))
  def test_refuses_a_direction_that_contradicts_the_source(self, convert, state):
    with self.assertRaisesRegex(errors.DirectionError, "--direction=.*expected a source of .*, found the layout"):
      convert(state)

  @parameterized.named_parameters(
      ("of_linen", {}, "the layout Linen"),
      ("of_a_release", {"release": (0, 2, 5)}, "the layout Linen layout of the NNX trainer"),
      ("of_linen_unchanged", {"direction": "linen_to_linen"}, "the layout Linen"),
  )
  def test_refuses_boxes_that_the_target_does_not_have(self, options, found):
    state = abstract_state.abstract(abstract_state.flatten(LINEN if options else NNX_PLAIN))
    with self.assertRaisesRegex(errors.OptionError, f"^--nnx_values=all_boxed: expected a target with .*found {found}"):
      util.plan_conversion(state, nnx_values="all_boxed", **options)

  def test_refuses_keys_of_one_name(self):
    with self.assertRaisesRegex(errors.PathCollisionError, "^model/0: expected one leaf of this path, found two"):
      converter.detect_format({"model": collections.OrderedDict([(0, W), ("0", W)])})


if __name__ == "__main__":
  absltest.main()
