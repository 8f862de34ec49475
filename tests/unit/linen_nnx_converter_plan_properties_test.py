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

"""Properties of plans, on generated trees."""

import dataclasses

from absl.testing import absltest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import in_memory
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

DTYPES = ("float32", "bfloat16", "int8", "uint32", "float8_e4m3fn")


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
  @pytest.mark.integration
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
  @pytest.mark.integration
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
