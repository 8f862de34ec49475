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
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

DTYPES = ("float32", "bfloat16", "int8", "uint32", "float8_e4m3fn")


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


@st.composite
def layer_trees(draw):
  """The leaves of one layer: paths, shapes of rank 0 to 3, dtypes."""
  names = st.sampled_from(["mlp", "attention", "norm", "kernel", "scale", "wi_0", "wi_0_scale"])
  paths = draw(st.lists(st.lists(names, min_size=1, max_size=3).map(tuple), min_size=1, max_size=5, unique=True))
  paths = [p for p in paths if not any(q != p and q[: len(p)] == p for q in paths)]
  leaf = st.tuples(st.lists(st.integers(1, 4), max_size=3).map(tuple), st.sampled_from(DTYPES))
  return {path: draw(leaf) for path in paths}


@st.composite
def linen_states(draw):
  """A random Linen train state: layers scanned or flat, any optimizer, RNG state, other collections."""
  random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))

  def array(shape, dtype):
    dtype = jax.numpy.dtype(dtype)
    return random.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]

  def put(tree, path, leaf):
    for key in path[:-1]:
      tree = tree.setdefault(key, {})
    tree[path[-1]] = leaf

  def params(axis_of=lambda rank: min(1, rank)):
    tree = {}
    for (component, stack, count, is_scanned), layer in stacks.items():
      for path, (shape, dtype) in layer.items():
        if is_scanned:
          axis = axis_of(len(shape))
          put(tree, (component, stack, *path), array((*shape[:axis], count, *shape[axis:]), dtype))
        for i in () if is_scanned else range(count):
          put(tree, (component, f"{stack}_{i}", *path), array(shape, dtype))
    put(tree, ("decoder", "decoder_norm", "scale"), array((3,), "float32"))
    return tree

  stacks = {
      (component, stack, draw(st.integers(1, 12)), draw(st.booleans())): draw(layer_trees())
      for component, stack in draw(
          st.lists(
              st.sampled_from([("decoder", "layers"), ("decoder", "moe_layers"), ("encoder", "layers")]),
              max_size=3,
              unique=True,
          )
      )
  }
  state = {"params": {"params": params()}, "step": np.array(draw(st.integers(0, 2**31 - 1)), np.int32)}
  count = np.array(3, np.int32)
  adam = {"count": count, "mu": {"params": params()}, "nu": {"params": params()}}
  opt_state = draw(st.sampled_from([None, "chain", "flat", "nested", "multi"]))
  if opt_state:
    state["opt_state"] = {
        "chain": [adam, None, {"count": count}],
        "flat": adam,
        "nested": [None, [adam, None, {"count": count}]],
        "multi": {
            "mini_step": count,
            "gradient_step": count,
            "acc_grads": {"params": params()},
            "skip_state": (),
            "inner_opt_state": [adam, None, None],
        },
    }[opt_state]
  if draw(st.booleans()):
    state["nnx_aux"] = {"model": {"decoder": {"dropout": {"rngs": {"params": {"key": array((2,), "uint32")}}}}}}
  if draw(st.booleans()):
    state["params"]["_overwrite_with_gradient"] = {"decoder": {"x": {"input_scale": array((1,), "float32")}}}
  return state


class PropertiesTest(absltest.TestCase):

  @settings(max_examples=50, deadline=None)
  @given(linen_states(), st.sampled_from(["boxed", "plain", "all_boxed"]), st.booleans())
  def test_there_and_back_is_identity(self, state, nnx_values, scan_layers):
    before = util.flat(state)
    nnx = converter.convert_linen_to_nnx(state, scan_layers=scan_layers, nnx_values=nnx_values)
    # Stacks of the source were scanned or not, each for itself; going back stack by stack needs all of one kind.
    kinds = {name.endswith("layers") for key in state["params"]["params"].values() for name in key if "layers" in name}
    self.assertEqual(util.flat(state), before)
    if len(kinds) < 2:
      back = converter.convert_nnx_to_linen(nnx, scan_layers=kinds.pop() if kinds else None)
      self.assertEqual(util.flat(back), before)

  @settings(max_examples=50, deadline=None)
  @given(
      st.dictionaries(
          st.lists(st.sampled_from(["gate", "key", "value"]), min_size=1, max_size=3).map(tuple),
          st.just(np.float32([1, 2])),
          min_size=1,
          max_size=4,
      ),
      st.sampled_from(["boxed", "plain", "all_boxed"]),
      st.sampled_from(["state", "params", "params_only"]),
  )
  def test_names_that_look_like_boxes_come_back_or_are_refused(self, weights, nnx_values, kind):
    weights = {
        path: leaf for path, leaf in weights.items() if not any(p != path and p[: len(path)] == path for p in weights)
    }
    tree = abstract_state.unflatten(abstract_state.AbstractState({("decoder", *p): leaf for p, leaf in weights.items()}))
    alone = {"params": {"params": tree}}
    state = util.linen(tree) if kind == "state" else alone
    try:
      nnx = converter.convert_linen_to_nnx(state, nnx_values=nnx_values, params_only=kind == "params_only")
    except errors.LayoutError as e:
      self.assertIn("own name is value", str(e))
      self.assertNotEqual(nnx_values, "all_boxed")
      return
    self.assertEqual(util.flat(converter.convert_nnx_to_linen(nnx)), util.flat(state))
    self.assertEqual(util.flat(converter.convert_nnx_to_linen(nnx, params_only=True)), util.flat(alone))

  @settings(max_examples=50, deadline=None)
  @given(linen_states(), st.booleans())
  def test_inverse(self, state, scan_layers):
    """A plan's inverse is valid, leads back, and is its own inverse's inverse."""
    source = abstract_state.flatten(state)
    plan = util.plan_conversion(abstract_state.abstract(source), scan_layers=scan_layers)
    inverse = plan.inverse()
    inverse.validate()
    self.assertEqual(inverse.inverse().moves, plan.moves)
    there = in_memory.apply(plan, source.leaves)
    back = in_memory.apply(inverse, there)
    of = lambda leaves: {path: util.bits(leaf) for path, leaf in leaves.items()}
    self.assertEqual(of(back), of(source.leaves))

  @settings(max_examples=40, deadline=None)
  @given(linen_states(), st.data())
  def test_a_lost_moment_is_named(self, state, data):
    """A leaf of mu, nu or acc_grads cannot go missing without being noticed."""
    source = abstract_state.flatten(state)
    moments = [path for path in source.leaves if path[0] == "opt_state" and "params" in path]
    subtree = lambda path: path[: path.index("params")]
    # The last leaf of a subtree takes the subtree with it, and a tree without mu is another optimizer's.
    moments = [path for path in moments if any(subtree(path) == subtree(other) for other in moments if other != path)]
    if not moments:
      return
    lost = data.draw(st.sampled_from(sorted(moments)))
    damaged = dataclasses.replace(source, leaves={path: leaf for path, leaf in source.leaves.items() if path != lost})
    with self.assertRaises(errors.ConversionError) as raised:
      util.plan_conversion(abstract_state.abstract(damaged))
    self.assertIn(lost[-1], str(raised.exception))


if __name__ == "__main__":
  absltest.main()
