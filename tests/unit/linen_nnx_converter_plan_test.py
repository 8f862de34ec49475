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

"""The plan's invariants, and the algebra of plans as properties."""

import dataclasses

from absl.testing import absltest
from absl.testing import parameterized
import jax
import jax.numpy as jnp
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


def struct(*shape, dtype=np.float32):
  return jax.ShapeDtypeStruct(shape, dtype)


def state_of(leaves):
  return abstract_state.AbstractState({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def plan_of(source, target, moves, dropped=()):
  return plan_lib.Plan(
      state_of(source),
      state_of(target),
      moves,
      {path: "for the test" for path in dropped},
      source_layout=None,
      target_layout=None,
  )


def copied(path):
  return leaf_moves.copy((path,))


class PlanTest(parameterized.TestCase):

  def test_a_plan_that_accounts_for_all_is_valid(self):
    plan_of(
        {"a": struct(3), "b": struct(3), "c": struct(2, 3)},
        {"x": struct(3, 2), "y": struct(3), "z": struct(3)},
        {
            ("x",): util.stack([("a",), ("b",)], (1,), (2,)),
            ("y",): util.slice_of(("c",), (0,), (0,)),
            ("z",): util.slice_of(("c",), (0,), (1,)),
        },
    ).validate()

  @parameterized.named_parameters(
      (
          "source_lost",
          {"a": struct(3), "b": struct(3)},
          {"x": struct(3)},
          {("x",): copied("a")},
          (),
          "^b: .*exactly once",
      ),
      (
          "source_twice",
          {"a": struct(3)},
          {"x": struct(3), "y": struct(3)},
          {("x",): copied("a"), ("y",): copied("a")},
          (),
          "^a: ",
      ),
      ("dropped_and_used", {"a": struct(3)}, {"x": struct(3)}, {("x",): copied("a")}, [("a",)], "^a: .*and dropped"),
      ("index_lost", {"a": struct(3)}, {"x": struct()}, {("x",): util.slice_of(("a",), (0,), (1,))}, (), "^a: "),
      (
          "index_twice",
          {"a": struct(2)},
          {"x": struct(), "y": struct()},
          {("x",): util.slice_of(("a",), (0,), (1,)), ("y",): util.slice_of(("a",), (0,), (1,))},
          (),
          "^a: ",
      ),
      ("target_from_nowhere", {}, {"x": struct()}, {}, (), "^x: expected a source leaf"),
  )
  def test_refuses_unaccounted_leaves(self, source, target, moves, dropped, message):
    with self.assertRaisesRegex(errors.UnaccountedLeafError, message):
      plan_of(source, target, moves, dropped).validate()

  @parameterized.named_parameters(
      ("shape", struct(3), struct(4), r"^x: expected shape \(4,\), found \(3,\) made of a"),
      ("dtype", struct(3), struct(3, dtype=np.float16), "^x: expected dtype float16, found float32 of a"),
      (
          "cast_of_an_array",
          struct(3, dtype=np.int32),
          struct(3, dtype=np.uint32),
          "^x: expected dtype uint32, found int32",
      ),
  )
  def test_refuses_moves_that_yield_something_else(self, source, target, message):
    with self.assertRaisesRegex(errors.LayerStackError, message):
      plan_of({"a": source}, {"x": target}, {("x",): copied("a")}).validate()

  def test_refuses_a_leaf_that_is_also_a_subtree(self):
    with self.assertRaisesRegex(errors.PathCollisionError, "^a: expected a path of its own in the target, found x,"):
      plan_of(
          {"a": struct(), "b": struct()}, {"x": struct(), "x/y": struct()}, {("x",): copied("a"), ("x", "y"): copied("b")}
      ).validate()

  def test_no_inverse_where_something_is_dropped(self):
    with self.assertRaisesRegex(errors.UnaccountedLeafError, "^b: expected a plan that drops nothing"):
      plan_of({"a": struct(), "b": struct()}, {"x": struct()}, {("x",): copied("a")}, [("b",)]).inverse()

  def test_no_inverse_where_something_is_cast(self):
    half, moves = jax.ShapeDtypeStruct((2,), jnp.bfloat16), {("x",): copied("a")}
    plan = dataclasses.replace(plan_of({"a": struct(2)}, {"x": half}, moves), cast_to=frozenset({"bfloat16"}))
    plan.validate()
    with self.assertRaisesRegex(
        errors.UnaccountedLeafError, "^x: expected .* that casts nothing, found float32 cast to bfloat16"
    ):
      plan.inverse()

  def test_a_leaf_that_was_made_is_told_apart_and_has_no_way_back(self):
    made = (plan_lib.MADE, "b")
    plan = plan_of(
        {"a": struct(2), f"{plan_lib.MADE}/b": struct(3)},
        {"c": struct(2), "b": struct(3)},
        {("c",): copied("a"), ("b",): leaf_moves.copy(made)},
    )
    plan.validate()
    self.assertEqual(plan.counts(), {"copy": 1, "stack": 0, "slice": 0, "transpose": 0, plan_lib.MADE: 1, "dropped": 0})
    self.assertEqual(list(plan.lines()), ["c  (2,) float32  copy of a", f"b  (3,) float32  {plan_lib.MADE}"])
    back = plan.inverse()
    back.validate()
    self.assertEqual(back.dropped, {("b",): plan_lib.MADE})
    self.assertEqual(set(back.target.leaves), {("a",)})

  def test_two_leaves_onto_one_path(self):
    state = {
        "params": {"params": {"decoder": {"w": util.array(2)}}},
        "nnx_aux": {"model": {"decoder": {"w": util.array(2)}}},
    }
    with self.assertRaisesRegex(
        errors.PathCollisionError, "^model/decoder/w/value: expected one leaf to land here, found two"
    ):
      converter.convert_linen_to_nnx(state)


if __name__ == "__main__":
  absltest.main()
