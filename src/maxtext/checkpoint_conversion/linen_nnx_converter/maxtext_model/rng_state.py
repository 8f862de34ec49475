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

"""RNG state that a Linen source cannot have, made with MaxText's own model and added to a plan."""

import dataclasses
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

# The trainers' generators: MaxText's set theirs, Tunix's use JAX's default.
_MAXTEXTS_PRNG, _TUNIXS_PRNG = "unsafe_rbg", "threefry2x32"


def add(plan: plan_lib.Plan, source: reader.Checkpoint, config: Any, options: options_lib.Options, run: planner.Run):
  """Adds the RNG state that the plan's target lacks, from the config's model and seed.

  Args:
    plan: the plan.
    source: the checkpoint that it reads.
    config: the MaxText config, or None.
    options: the options of the conversion.
    run: the run of the config.

  Returns:
    The plan with more leaves, and a source that has them below `plan.MADE`.

  Raises:
    ConfigError: there is no config, or its model's RNG state has no place in the target.
  """
  _check(plan, config, options, run)
  prng_impl = _TUNIXS_PRNG if layouts.is_tunix(plan.target_layout) else _MAXTEXTS_PRNG
  targets: dict[abstract_state.Path, Any] = {
      leaf_roles.write(leaf_roles.Variable(layouts.NNX_AUX, path), plan.target_layout): value
      for path, value in run_config.rng_state(config, prng_impl).items()
  }
  made: dict[abstract_state.Path, Any] = {
      (plan_lib.MADE, *path): value for path, value in targets.items() if path not in plan.target.leaves
  }
  source = source.with_arrays(made)
  structs = {path: source.state.leaves[path] for path in made}
  added = {path[1:]: struct for path, struct in structs.items()}
  plan = dataclasses.replace(
      plan,
      source=dataclasses.replace(plan.source, leaves={**plan.source.leaves, **structs}),
      target=dataclasses.replace(plan.target, leaves={**plan.target.leaves, **added}),
      moves={**plan.moves, **{path[1:]: leaf_moves.copy(path) for path in made}},
  )
  plan.validate()
  return plan, source


def _check(plan, config, options, run):
  """Refuses a target in which the model's RNG state has no place."""
  layout = plan.target_layout
  if config is None:
    raise _error("a MaxText config, base.yml and settings, whose model makes it", "none", "Give the config of the run.")
  asked = next((f"--{k}={v}" for k, v in (("params_only", True), ("nnx_aux", "drop")) if getattr(options, k) == v), None)
  if asked or (layout.framework == "linen" and not layout.nnx_optimizer):
    raise _error("a target with NNX's RNG state", asked or f"the layout {layout}", "Leave out one of the two.")
  release, trainer = run.release, run.trainer
  installed = run_config.version()
  if release != installed or trainer != "nnx":
    raise _error(
        "a target for the NNX trainer of the installed MaxText",
        f"the {trainer} trainer of {'.'.join(map(str, release))}, and {'.'.join(map(str, installed))} installed",
        "Run in that MaxText's environment, with pure_nnx=True up to 0.2.4.",
    )
  naming = releases.find(release, trainer).layer_naming
  if options.layer_naming not in (None, naming):
    raise _error(f"--layer_naming={naming}, as its model has it", options.layer_naming, "Leave out --layer_naming.")


def _error(expected, found, remedy) -> errors.ConfigError:
  return errors.ConfigError("--init_rngs", expected, found, remedy)
