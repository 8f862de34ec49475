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

"""Checkpoints of Tunix, which splits a train state over two items and wraps the optimizer."""

from absl.testing import absltest
from absl.testing import parameterized
from flax import nnx
import jax
from linen_nnx_converter_tunix_trees import CLIP
from linen_nnx_converter_tunix_trees import MAXTEXTS
from linen_nnx_converter_tunix_trees import model_of
from linen_nnx_converter_tunix_trees import Module
from linen_nnx_converter_tunix_trees import SCHEDULE
from linen_nnx_converter_tunix_trees import tunix_tree
from linen_nnx_converter_tunix_trees import WRAPPERS
import linen_nnx_converter_util as util
import numpy as np
import optax
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.common import train_state_nnx

# Other ways to have MaxText's adamw, whose state they hold somewhere.
ADAMW = {
    "inject": optax.inject_hyperparams(optax.adamw)(learning_rate=SCHEDULE),
    "inject_of_clip": optax.inject_hyperparams(lambda learning_rate: optax.chain(CLIP, optax.adamw(learning_rate)))(
        learning_rate=SCHEDULE
    ),
    "inject_without_a_state_of_the_schedule": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-3),
    "multi_steps_of_inject": optax.MultiSteps(
        optax.inject_hyperparams(lambda learning_rate: optax.adamw(learning_rate, b1=0.95))(learning_rate=SCHEDULE), 2
    ),
    "one_chain": optax.chain(
        CLIP, optax.scale_by_adam(), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(SCHEDULE)
    ),
    "adam": optax.chain(CLIP, optax.adam(SCHEDULE)),
}
UNKNOWN = {
    "sgd_momentum": optax.sgd(SCHEDULE, momentum=0.9),
    "adamw_without_a_schedule": optax.chain(CLIP, optax.adamw(1e-3)),
    "lion": optax.lion(SCHEDULE),
    "ema_behind": optax.chain(optax.adamw(SCHEDULE), optax.ema(0.9)),
    "schedule_first": optax.chain(optax.scale_by_schedule(SCHEDULE), optax.scale_by_adam()),
    "two_schedules": optax.inject_hyperparams(lambda scale: optax.chain(optax.adamw(SCHEDULE), optax.scale(scale)))(
        scale=SCHEDULE
    ),
    "two_adams": optax.chain(optax.adamw(SCHEDULE), optax.adamw(SCHEDULE)),
    "inject_of_sgd": optax.inject_hyperparams(optax.sgd)(learning_rate=SCHEDULE),
    "stateless": optax.sgd(1e-3),
}


def plan_of(tree, step=None, **options):
  """The plan for a tree that stands in a folder of this name."""
  folder, name = layouts.FOLDER_STEP
  held = {} if step is None else {folder: {name: np.int64(step)}}
  return util.plan_conversion(abstract_state.abstract(abstract_state.flatten(tree | held)), **options)


def maxtexts_target(optimizer):
  """What MaxText 0.2.5 reads, by the way from its own NNX state."""
  model = model_of()
  state = train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, optimizer, wrt=nnx.Param))
  return plan_of(nnx.state(state), release=(0, 2, 5)).target


class OptimizerTest(parameterized.TestCase):
  """Every wrapper around every optimizer that MaxText has, and some that it has not."""

  @parameterized.product(optimizer=list(MAXTEXTS), wrapper=list(WRAPPERS), base=(False, True))
  @pytest.mark.integration
  def test_maxtexts_optimizers(self, optimizer, wrapper, base):
    plan = plan_of(tunix_tree(WRAPPERS[wrapper](MAXTEXTS[optimizer]), base), step=5)
    self.assertEqual(plan.target, maxtexts_target(MAXTEXTS[optimizer]))

  @parameterized.product(name=list(ADAMW), base=(False, True))
  def test_other_ways_to_have_adamw(self, name, base):
    plan = plan_of(tunix_tree(ADAMW[name], base), step=5)
    self.assertEqual(plan.target, maxtexts_target(MAXTEXTS["adamw"]))

  def test_each_leaf_comes_from_its_own(self):
    plan = plan_of(tunix_tree(ADAMW["multi_steps_of_inject"], base=True), step=5)
    inner = "optimizer_state/opt_state/inner_opt_state"
    self.assertEqual(
        {"/".join(path): "/".join(move.sources[0]) for path, move in plan.moves.items()},
        {
            "params/params/decoder/layers/kernel": "model_params/base/decoder/layers/kernel/value",
            "params/params/decoder/norm/scale": "model_params/base/decoder/norm/scale/value",
            "opt_state/0/count": f"{inner}/inner_state/0/count/value",
            "opt_state/0/mu/params/decoder/layers/kernel": f"{inner}/inner_state/0/mu/base/decoder/layers/kernel/value",
            "opt_state/0/mu/params/decoder/norm/scale": f"{inner}/inner_state/0/mu/base/decoder/norm/scale/value",
            "opt_state/0/nu/params/decoder/layers/kernel": f"{inner}/inner_state/0/nu/base/decoder/layers/kernel/value",
            "opt_state/0/nu/params/decoder/norm/scale": f"{inner}/inner_state/0/nu/base/decoder/norm/scale/value",
            "opt_state/2/count": f"{inner}/count/value",
            "step": "from the folder's name/step",
        },
    )
    outer = "optimizer_state/opt_state"
    self.assertCountEqual(
        ["/".join(path) for path in plan.dropped],
        [
            "optimizer_state/step/value",
            f"{outer}/mini_step/value",
            f"{outer}/gradient_step/value",
            f"{outer}/acc_grads/base/decoder/layers/kernel/value",
            f"{outer}/acc_grads/base/decoder/norm/scale/value",
            f"{inner}/hyperparams/learning_rate/value",
            f"{inner}/hyperparams_states/learning_rate/count/value",
        ],
    )

  @parameterized.product(name=list(UNKNOWN), base=(False, True))
  def test_an_optimizer_that_maxtext_has_not_is_refused(self, name, base):
    tree = tunix_tree(UNKNOWN[name], base)
    with self.assertRaisesRegex(errors.LayoutError, "optimizer_state/opt_state: expected an optimizer that MaxText has"):
      plan_of(tree, step=5)
    self.assertLen(plan_of(tree, params_only=True).moves, 2)

  def test_a_lost_step_is_refused(self):
    tree = tunix_tree(MAXTEXTS["adamw"])
    del tree["optimizer_state"]["step"]
    with self.assertRaisesRegex(errors.StepError, "optimizer_state/step: expected the optimizer's step, found none"):
      plan_of(tree, step=5)

  @parameterized.parameters(False, True)
  def test_a_model_that_is_not_maxtexts_is_refused(self, base):
    model = Module(embedder=Module(input_embedding=nnx.Param(util.array(7, 4))))
    with self.assertRaisesRegex(errors.LayoutError, "model_params.*: expected a model of MaxText's: .* found embedder"):
      plan_of(tunix_tree(MAXTEXTS["adamw"], base, model), step=5)

  def test_factored_moments_are_refused(self):
    """They stand where moments would, and have other shapes."""
    with self.assertRaisesRegex(errors.MomentError, "optimizer_state/opt_state/0/v_col/.* found that of adafactor"):
      plan_of(tunix_tree(optax.adafactor(SCHEDULE)), step=5)

  def test_a_lost_moment_is_refused(self):
    tree = nnx.to_pure_dict(tunix_tree(MAXTEXTS["adamw"])["optimizer_state"])
    del tree["opt_state"][0]["mu"]["decoder"]["norm"]
    box = lambda leaf: {"value": leaf}
    damaged = {"model_params": tunix_tree(MAXTEXTS["adamw"])["model_params"], "optimizer_state": jax.tree.map(box, tree)}
    with self.assertRaisesRegex(
        errors.MomentError, "optimizer_state/opt_state/0/mu/decoder/norm/scale/value: expected an optimizer leaf"
    ):
      plan_of(damaged, step=5)

  def test_rng_state_goes_along_where_its_keys_are_maxtexts(self):
    for words, aux in ((4, ["nnx_aux/model/rngs/params/count", "nnx_aux/model/rngs/params/key"]), (2, [])):
      model = model_of()
      stream = Module(key=nnx.Variable(np.zeros(words, np.uint32)), count=nnx.Variable(np.zeros((), np.uint32)))
      model.rngs = Module(params=stream)
      plan = plan_of(tunix_tree(MAXTEXTS["adamw"], model=model), step=5)
      self.assertCountEqual(["/".join(path) for path in plan.moves if path[0] == "nnx_aux"], aux)
      self.assertLen([path for path in plan.dropped if path[0] == "model_params"], 2 - len(aux))

  def test_adapters_are_refused(self):
    model = model_of()
    model.decoder.layers.kernel_lora_a = nnx.Param(util.array(4, 3, 2))
    with self.assertRaisesRegex(errors.LayoutError, "layers/kernel_lora_a/value: expected whole weights, found a LoRA"):
      plan_of(tunix_tree(MAXTEXTS["adamw"], model=model), params_only=True)

  def test_a_tree_in_memory_has_no_step(self):
    with self.assertRaisesRegex(errors.StepError, "step: expected the step as the name of the source's folder"):
      converter.convert_nnx_to_linen(tunix_tree(MAXTEXTS["adamw"]))
    params = converter.convert_nnx_to_linen(tunix_tree(MAXTEXTS["adamw"], base=True), params_only=True)
    self.assertEqual(util.flat(params), util.flat({"params": {"params": nnx.to_pure_dict(nnx.state(model_of()))}}))


if __name__ == "__main__":
  absltest.main()
