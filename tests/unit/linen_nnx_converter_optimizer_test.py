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

"""Every optimizer that MaxText offers: real optax states of both frameworks, each converted into the other."""

import warnings

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import linen_nnx_converter_util as util
import numpy as np
import optax
from optax import contrib
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.common import train_state_nnx

SHAPES = {"decoder": {"layers": {"kernel": (4, 3, 8), "scale": (4, 3)}, "norm": {"scale": (4,)}}}
SCHEDULE = optax.linear_schedule(1e-3, 0.0, 10)


def by_path(trainable, other):
  """A labeller of params: layers are `trainable`, the rest `other`."""
  label = lambda path, _: trainable if "layers" in jax.tree_util.keystr(path) else other
  return lambda params: jax.tree_util.tree_map_with_path(label, params)


def skip_step(inner):
  """A state with the fields of MaxText's skip_step_on_spikes, which wraps a whole optimizer."""

  def init(params):
    return {
        "inner_state": inner.init(params),
        "losses": jnp.zeros(5),
        "grad_norms": jnp.zeros(5),
        "count": jnp.zeros([], jnp.int32),
        "is_skipped": jnp.array(False),
    }

  return optax.GradientTransformation(init, inner.update)


def adam_pax():
  """A state with the fields of MaxText's adam_pax, which is no chain."""

  def init(params):
    zeros = jax.tree.map(jnp.zeros_like, params)
    return optax.ScaleByAdamState(count=jnp.zeros([], jnp.int32), mu=zeros, nu=zeros)

  return optax.GradientTransformation(init, lambda *args: args)


OPTIMIZERS = {
    "adamw_schedule": optax.adamw(SCHEDULE),
    "adamw_constant": optax.adamw(1e-3),
    "adam_pax": adam_pax(),
    "sgd_schedule": optax.sgd(SCHEDULE),
    "sgd_momentum": optax.sgd(1e-3, momentum=0.9),
    "muon_schedule": contrib.muon(SCHEDULE),
    "muon_constant": contrib.muon(1e-3),
    "skip_step": skip_step(optax.adamw(SCHEDULE)),
    "skip_step_of_muon": skip_step(contrib.muon(SCHEDULE)),
    "trainable_mask": optax.multi_transform(
        {"trainable": optax.adamw(SCHEDULE), "frozen": optax.set_to_zero()}, by_path("trainable", "frozen")
    ),
    "trainable_mask_of_skip_step": optax.multi_transform(
        {"trainable": skip_step(optax.adamw(SCHEDULE)), "frozen": optax.set_to_zero()}, by_path("trainable", "frozen")
    ),
    "nested_chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(SCHEDULE)),
    "nested_chain_constant": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "inject_hyperparams_schedule": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "multi_steps": optax.MultiSteps(optax.adamw(SCHEDULE), 4),
    "multi_steps_of_chain": optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), 4),
}

# Optax's optimizers whose state does not have the shapes of the weights. MaxText has none of them.
OTHERS = {
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=3),
    "galore": contrib.galore(1e-3),
    "lbfgs": optax.lbfgs(),
    "novograd": optax.novograd(1e-3),
    "sm3": optax.sm3(1e-3),
}


class Module(nnx.Module):
  """A module with the given attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def model_of(shapes):
  children = {k: model_of(v) if isinstance(v, dict) else nnx.Param(jnp.zeros(v)) for k, v in shapes.items()}
  return Module(**children)


def linen_state(tx):
  """The abstract state of Flax Linen's TrainState, its leaves numbered by their dtype and shape."""
  params = jax.tree.map(jnp.zeros, SHAPES, is_leaf=lambda x: isinstance(x, tuple))
  state = train_state.TrainState.create(apply_fn=None, params={"params": params}, tx=tx)
  return {"params": state.params, "opt_state": state.opt_state, "step": jnp.asarray(state.step, jnp.int32)}


def nnx_state(tx):
  model = model_of(SHAPES)
  return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))


def model_boxed(linen):
  return converter.convert_linen_to_nnx(linen, params_only=True)


def described(tree):
  """Paths, shapes, dtypes, empty nodes and lists of any pytree."""
  state = abstract_state.abstract(abstract_state.flatten(tree))
  return {"/".join(path): util.bits(leaf) for path, leaf in state.leaves.items()}, {"/".join(p) for p in state.lists}


class OptimizerTest(parameterized.TestCase):

  @parameterized.parameters(*OPTIMIZERS)
  def test_linen_becomes_nnx_and_nnx_becomes_linen(self, name):
    linen, state = linen_state(OPTIMIZERS[name]), nnx.state(nnx_state(OPTIMIZERS[name]))
    plain, boxed = nnx.to_pure_dict(state), state
    for values, tree in (("plain", plain), ("all_boxed", boxed)):
      self.assertEqual(described(converter.convert_linen_to_nnx(linen, nnx_values=values)), described(tree))
      self.assertEqual(described(converter.convert_nnx_to_linen(tree)), described(linen))

  @parameterized.parameters(*OPTIMIZERS)
  @pytest.mark.integration
  def test_every_arrangement_and_back(self, name):
    linen = linen_state(OPTIMIZERS[name])
    nested = converter.convert_linen_to_nnx(linen, scan_layers=False)
    flat = converter.convert_nnx_to_linen(nested)
    self.assertIn("layers_2", flat["params"]["params"]["decoder"])
    back = converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(flat))
    self.assertEqual(described(back), described(linen))

  @parameterized.parameters("adamw_schedule", "adam_pax", "sgd_schedule")
  def test_agrees_with_maxtext(self, name):
    """MaxText's own mapping between the two, which knows these optimizers, is an independent oracle."""
    plain = nnx.to_pure_dict(nnx.state(nnx_state(OPTIMIZERS[name])))
    theirs = train_state_nnx.to_linen_checkpoint_dict(plain)
    ours = converter.convert_nnx_to_linen(plain)
    self.assertEqual(util.flat(ours), util.flat(theirs))
    back = train_state_nnx.from_linen_checkpoint_dict(ours)
    self.assertEqual(util.flat(converter.convert_linen_to_nnx(theirs, nnx_values="plain")), util.flat(back))

  def test_agrees_with_maxtext_on_other_variables(self):
    """MaxText tells variables apart by their type; the converter has only the tree."""
    model = model_of(SHAPES)
    model.decoder.gate = Module(bias=nnx.Variable(jnp.ones(3)))
    model.decoder.batch_norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    model.decoder.dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
    state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, OPTIMIZERS["adamw_schedule"], wrt=nnx.Param))
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # MaxText calls State.to_pure_dict.
      theirs = train_state_nnx.to_checkpoint_dict(state)
    ours = converter.convert_nnx_to_linen(nnx.to_pure_dict(nnx.state(state)))
    self.assertEqual(described(ours), described(theirs))

  def test_linen_layout_of_maxtexts_nnx_trainer(self):
    """A nested optimizer that lacks the params level, as MaxText 0.2.3 to 0.2.5 save it, is read as well."""
    adam = lambda level: [
        {"count": jnp.int32(1), "mu": level({"norm": util.array(3)}), "nu": level({"norm": util.array(3)})},
        None,
    ]
    state = lambda opt_state: {"params": {"params": {"norm": util.array(3)}}, "opt_state": opt_state}
    defect = state({"count": jnp.int32(2), "inner_state": {"0": adam(lambda tree: tree)[0]}})
    nnx_tree = converter.convert_linen_to_nnx(defect, nnx_values="plain")
    self.assertCountEqual(nnx_tree["optimizer"]["opt_state"]["inner_state"]["0"]["mu"], ["norm"])
    linen = converter.convert_nnx_to_linen(nnx_tree)
    self.assertEqual(util.flat(linen["opt_state"]["inner_state"][0]), util.flat(adam(lambda tree: {"params": tree})[0]))

  @parameterized.named_parameters(
      (
          "shape",
          lambda s: s[0]["mu"]["params"]["a"].update(w=util.array(2, 3)),
          r"0/mu/params/a/w: .*\(3, 2\), found \(2, 3\)",
      ),
      (
          "unknown_leaf",
          lambda s: s[0]["mu"]["params"]["a"].update(v=util.array(2)),
          "0/mu/params/a/v: expected the path of a",
      ),
      (
          "lost_leaf",
          lambda s: s[0]["nu"]["params"]["a"].pop("w"),
          "opt_state/0/nu/params/a/w: expected an optimizer leaf",
      ),
      ("all_renamed", lambda s: s[0].update(mu={"params": {"x": {"y": util.array(2)}}}), "opt_state/0/mu/params/x/y"),
      ("arranged_unlike", lambda s: s[0].update(mu={"params": {"a": {"0": {"w": util.array(2)}}}}), "0/mu/params/a/0/w"),
  )
  def test_refuses_damaged_moments(self, damage, message):
    state = util.linen({"a": {"w": util.array(3, 2), "b": util.array(2)}})
    damage(state["opt_state"])
    with self.assertRaisesRegex(errors.MomentError, message):
      converter.convert_linen_to_nnx(state)

  def test_refuses_a_lost_moment_in_nnx(self):
    state = converter.convert_linen_to_nnx(util.linen({"a": {"kernel": util.array(3, 2), "bias": util.array(2)}}))
    for moments in ("mu", "nu"):
      del state["optimizer"]["opt_state"]["0"][moments]["a"]["kernel"]
    with self.assertRaisesRegex(errors.MomentError, "optimizer/opt_state/0/(mu|nu)/a/kernel: expected an optimizer leaf"):
      converter.convert_nnx_to_linen(state)

  @parameterized.parameters(*OTHERS)
  def test_an_optimizer_that_does_not_follow_the_weights_is_named_and_its_weights_convert(self, name):
    linen, state = linen_state(OTHERS[name]), nnx.state(nnx_state(OTHERS[name]))
    boxed, weights = nnx.to_pure_dict(state), {"params": linen["params"]}
    tunix = {"model_params": model_boxed(linen), "optimizer_state": boxed["optimizer"]}
    sources = {"linen": linen, "plain": boxed, "all_boxed": state, "tunix": tunix}
    for kind, tree in sources.items():
      with self.subTest(kind):
        source = abstract_state.abstract(abstract_state.flatten(tree))
        with self.assertRaisesRegex(
            errors.MomentError, f"found that of {name}. Take the weights alone with --params_only"
        ):
          util.plan_conversion(source)
        self.assertEqual(
            described(abstract_state.unflatten(util.plan_conversion(source, params_only=True).target)),
            described(weights),
        )

  def test_a_damaged_adam_is_not_taken_for_another_optimizer(self):
    for damage in (lambda adam: adam["nu"]["params"]["a"].update(w=np.float32(1)), lambda adam: adam.pop("count")):
      state = util.linen({"a": {"w": util.array(3, 2), "b": util.array(2)}})
      damage(state["opt_state"][0])
      state["opt_state"][0]["mu"]["params"]["a"].update(b=util.array(3))
      with self.assertRaisesRegex(errors.MomentError, "expected the shape of its weight .*of an unknown kind"):
        converter.convert_linen_to_nnx(state)

  def test_a_mask_of_the_weight_decay_shows_in_linen_only(self):
    masked = optax.adamw(SCHEDULE, mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params))
    plain = nnx.to_pure_dict(nnx.state(nnx_state(masked)))
    self.assertEqual(described(converter.convert_linen_to_nnx(linen_state(masked), nnx_values="plain")), described(plain))
    self.assertIsNone(converter.convert_nnx_to_linen(plain)["opt_state"][1])  # As MaxText's own NNX trainer saves it.

  def test_an_empty_opt_state_stays(self):
    linen = {"params": {"params": {"w": util.array(2)}}, "opt_state": {}, "step": np.int32(0)}
    self.assertEqual(util.flat(converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(linen))), util.flat(linen))


if __name__ == "__main__":
  absltest.main()
