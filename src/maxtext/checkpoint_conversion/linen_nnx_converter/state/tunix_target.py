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

"""What Tunix's SFT trainer resumes of MaxText's models; `tunix` reads more than this.

It restores the whole state of model and optimizer into trees of the same leaves, RNG state included. So does MaxText
0.2.5's training engine, which clips gradients outside the optimizer and needs none of its other items.
"""

from collections.abc import Mapping
import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles as roles_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path

KEY_WORDS = 2  # Of RNG keys of JAX's default kind, which these trainers use.
RNG_REASON = "RNG keys of four words where the trainer's have two"
_MODEL, _OPTIMIZER = layouts.TUNIX_ITEMS
_STEP = (_OPTIMIZER, "step")  # In Tunix it counts micro-batches, here one per step.
STEP = (*_STEP, layouts.VALUE)


def layout(target_layout: str, has_clip: bool) -> layouts.StateLayout:
  """A trainer's layout. In Tunix's, the optimizer may be behind gradient clipping."""
  root: Path = (_OPTIMIZER, "opt_state")
  is_engine = target_layout == "training_engine"
  return dataclasses.replace(
      layouts.TUNIX,
      name=layouts.TRAINING_ENGINE if is_engine else layouts.TUNIX.name,
      opt_state=(*root, "1") if has_clip and not is_engine else root,
      step=_STEP,
      boxed_variables=True,
      boxed_optimizer=True,
  )


def check(
    kept: Mapping[roles_lib.Role, Path],
    collections: Mapping[roles_lib.Variable, str],
    leaves: Mapping[Path, abstract_state.Leaf],
):
  """Checks that everything kept has a place, and that the trainer can resume this optimizer.

  Args:
    kept: the roles of the leaves that are kept, each with its path in the source.
    collections: the collection of each variable in the target.
    leaves: the leaves of the source.

  Raises:
    UnaccountedLeafError: a Linen collection has no place.
    LayoutError: it is no optimizer of MaxText's with a learning rate schedule.
    StepError: there is no step.
  """
  for role, path in kept.items():
    if isinstance(role, roles_lib.Variable) and collections[role] not in (layouts.PARAMS, layouts.NNX_AUX):
      raise errors.UnaccountedLeafError(
          path, "a variable of an NNX model", "one of a Linen collection", "Leave out --target_layout."
      )
  filled = (role for role, path in kept.items() if not abstract_state.is_empty(leaves[path]))
  nodes = {node for node in map(tunix.node_of, filled) if node is not None}
  if not tunix.is_maxtexts(nodes):
    raise errors.LayoutError(
        ("opt_state",),
        "the state of an optimizer of MaxText's with a schedule of the learning rate: adamw, adam_pax, sgd, muon",
        ", ".join("/".join(node) for node in sorted(nodes)[:8]) or "no state",
        "To start from weights alone (load_parameters_path), leave out --target_layout, and pass --params_only.",
    )
  if roles_lib.Step() not in kept:
    raise errors.StepError(("step",), "the step", "none", "The checkpoint is damaged: use another step.")


def check_resumes(target: abstract_state.AbstractState, step: int, folder: int | None):
  """Checks that the trainer resumes from the target, at its step.

  Args:
    target: the target, with RNG state, which every NNX model of MaxText's has.
    step: the finished steps as the optimizer has counted them.
    folder: the finished steps by the name of the target's folder, which is where the trainer reads them.

  Raises:
    LayoutError: there is no RNG state.
    StepError: the folder has another number.
  """
  if step != folder:
    raise errors.StepError(
        ("step",),
        f"{folder}, as the target's folder, from whose name the trainer takes the steps that are done",
        str(step),
        f"Name the folder: --target_path=…/checkpoints/{step}.",
    )
  if not any(path[0] == _MODEL and variable_kinds.is_rng_state(path[1:-1], leaf) for path, leaf in target.leaves.items()):
    raise errors.LayoutError(
        (_MODEL,),
        f"RNG state with keys of {KEY_WORDS} words, which the trainer restores with the weights",
        "none in the source",
        "Pass --init_rngs, and the config of the run.",
    )
