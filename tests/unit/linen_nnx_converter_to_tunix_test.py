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

"""Plans of what Tunix's SFT trainer resumes, and MaxText's training engine."""

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_tunix_trees import MAXTEXTS
from linen_nnx_converter_tunix_trees import Module
from linen_nnx_converter_tunix_trees import tunix_tree
from linen_nnx_converter_tunix_trees import WRAPPERS
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix_target

PARAMS = {"decoder": {"norm": {"scale": util.array(4)}, **{f"layers_{i}": {"kernel": util.array(3, 5)} for i in (0, 1)}}}
RNGS = {"rngs": {"params": {"count": util.array(dtype=np.uint32), "key": util.array(2, dtype=np.uint32)}}}


def plan_of(tree, target_layout="tunix", **keywords):
  """The plan of a tree for Tunix."""
  state = abstract_state.abstract(abstract_state.flatten(tree))
  return util.plan_conversion(state, target_layout=target_layout, **keywords)


class PlanTest(parameterized.TestCase):

  @parameterized.parameters(
      ("tunix", True, "opt_state/1"),
      ("tunix", False, "opt_state"),
      ("training_engine", True, "opt_state"),
      ("training_engine", False, "opt_state"),
  )
  def test_where_each_leaf_goes(self, target_layout, clips_gradients, root):
    tree = util.linen(PARAMS, nnx_aux={"model": {"decoder": RNGS}})
    plan = plan_of(tree, target_layout, clips_gradients=clips_gradients)
    expected = {"optimizer_state/step/value": "step"}
    for i in (0, 2):
      expected[f"optimizer_state/{root}/{i}/count/value"] = f"opt_state/{i}/count"
    for weight in ("norm/scale", "layers_0/kernel", "layers_1/kernel"):
      expected[f"model_params/decoder/{weight}/value"] = f"params/params/decoder/{weight}"
      for moment in ("mu", "nu"):
        path = f"optimizer_state/{root}/0/{moment}/decoder/{weight}/value"
        expected[path] = f"opt_state/0/{moment}/params/decoder/{weight}"
    for leaf in ("count", "key"):
      expected[f"model_params/decoder/rngs/params/{leaf}/value"] = f"nnx_aux/model/decoder/rngs/params/{leaf}"
    self.assertEqual(
        {"/".join(path): "/".join(move.sources[0]) for path, move in plan.moves.items()},
        expected,
    )
    self.assertEqual(str(plan.target.leaves["optimizer_state", "step", "value"].dtype), "uint32")
    self.assertEmpty(plan.dropped)

  @parameterized.product(optimizer=list(MAXTEXTS), wrapper=("bare", "clip"), release=((0, 2, 4), None))
  @pytest.mark.integration
  def test_there_and_back(self, optimizer, wrapper, release):
    """From Tunix's tree to what MaxText reads, and to the same tree."""
    tree = tunix_tree(WRAPPERS[wrapper](MAXTEXTS[optimizer]))
    folder, name = layouts.FOLDER_STEP
    state = abstract_state.abstract(abstract_state.flatten(tree))
    there = util.plan_conversion(
        abstract_state.abstract(abstract_state.flatten(tree | {folder: {name: np.int64(5)}})), release=release
    )
    back = util.plan_conversion(there.target, target_layout="tunix", clips_gradients=wrapper == "clip", release=release)
    self.assertEqual(back.target, state)

  @parameterized.product(boxed=(True, False), optimizer=("adamw", "muon", "trainable_mask_of_skip_step"))
  def test_from_an_nnx_layout(self, boxed, optimizer):
    tree = tunix_tree(MAXTEXTS[optimizer])
    state = {"model": tree["model_params"], "optimizer": tree["optimizer_state"]}
    if not boxed:
      state = {name: part.to_pure_dict() for name, part in state.items()}
    self.assertEqual(plan_of(state, clips_gradients=False).target, abstract_state.abstract(abstract_state.flatten(tree)))

  @parameterized.parameters((None, "slice", 0), (True, "stack", 3), (False, "slice", 0))
  def test_layers(self, scan_layers, kind, stacked):
    plan = plan_of(util.linen(PARAMS), scan_layers=scan_layers)
    self.assertLen([move for move in plan.moves.values() if move.kind == kind], stacked)
    self.assertIs(plan.scan_layers, bool(scan_layers))

  def test_rng_state_of_maxtexts_keys_is_left_out(self):
    rngs = {"rngs": {"params": {"count": util.array(dtype=np.uint32), "key": util.array(4, dtype=np.uint32)}}}
    plan = plan_of(util.linen(PARAMS, nnx_aux={"model": {"decoder": rngs}}))
    reason = "RNG keys of four words where the trainer's have two"
    root = ("nnx_aux", "model", "decoder", "rngs", "params")
    self.assertEqual(plan.dropped, {(*root, "count"): reason, (*root, "key"): reason})
    with self.assertRaisesRegex(errors.LayoutError, "^model_params: expected RNG state .* found none .* --init_rngs"):
      tunix_target.check_resumes(plan.target, 11, 11)


class RefusedTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("none", {}, "no state"),
      ("without_a_schedule", [{"count": 0, "mu": {"params": PARAMS}, "nu": {"params": PARAMS}}, None], "0/count, 0/mu"),
      ("of_momentum", [{"trace": {"params": PARAMS}}, {"count": np.int32(3)}], "0/trace, 1/count"),
  )
  def test_an_optimizer(self, opt_state, found):
    tree = util.linen(PARAMS) | {"opt_state": opt_state}
    with self.assertRaisesRegex(errors.LayoutError, f"^opt_state: expected the state of an optimizer .* found {found}"):
      plan_of(tree)

  def test_a_lost_step(self):
    tree = util.linen(PARAMS)
    del tree["step"]
    with self.assertRaisesRegex(errors.StepError, "^step: expected the step, found none"):
      plan_of(tree)

  def test_a_collection_of_linens(self):
    tree = util.linen(PARAMS)
    tree["params"]["batch_stats"] = {"decoder": {"norm": {"mean": util.array(4)}}}
    message = (
        "^params/batch_stats/decoder/norm/mean: expected a variable of an NNX model, found one of a Linen collection"
    )
    with self.assertRaisesRegex(errors.UnaccountedLeafError, message):
      plan_of(tree)

  def test_what_is_tunixs_already(self):
    with self.assertRaisesRegex(
        errors.LayoutError, "^model_params: expected a state of MaxText's trainers, .* one in Tunix's"
    ):
      plan_of(tunix_tree(MAXTEXTS["adamw"]))

  @parameterized.parameters(("tunix", (0, 2, 3), "0.2.4"), ("training_engine", (0, 2, 4), "0.2.5"))
  def test_a_release_that_does_not_resume_from_it(self, target_layout, release, since):
    message = (
        f"^--maxtext_release: expected {since} or later, for --target_layout={target_layout}, found 0.2.{release[2]}"
    )
    with self.assertRaisesRegex(errors.DirectionError, message):
      plan_of(util.linen(PARAMS), target_layout, release=release)

  @parameterized.parameters(
      ({"direction": "linen_to_nnx"}, "--direction=linen_to_nnx"),
      ({"nnx_values": "plain"}, "--nnx_values=plain"),
      ({"nnx_aux": "drop"}, "--nnx_aux=drop"),
      ({"params_only": True}, "--params_only=True"),
  )
  def test_options_that_contradict(self, values, name):
    for layout in ("tunix", "training_engine"):
      message = f"^{name}: expected a target of MaxText's, found --target_layout={layout}, whose trainer"
      with self.assertRaisesRegex(errors.OptionError, message):
        converter.convert_checkpoint("/nowhere", "/nowhere/out", target_layout=layout, **values)

  def test_a_config_with_micro_batches(self):
    config = Module(gradient_accumulation_steps=2, scan_layers=True, param_scan_axis=1)
    chosen = options.Options(target_layout="tunix")
    with self.assertRaisesRegex(errors.ConfigError, "^gradient_accumulation_steps: expected 1, .* found 2, with which"):
      run_config.with_config(chosen, config)
    run_config.with_config(options.Options(target_layout="training_engine"), config)  # It accumulates on its own.

  def test_a_config_of_distillation(self):
    config = Module(teacher_overrides={"load_parameters_path": "gs://teacher"}, scan_layers=True, param_scan_axis=1)
    with self.assertRaisesRegex(errors.ConfigError, "^teacher_overrides: expected none, .*found MaxText's distillation"):
      run_config.with_config(options.Options(target_layout="tunix"), config)
    run_config.with_config(options.Options(), config)


if __name__ == "__main__":
  absltest.main()
