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

"""Tunix checkpoints: unwraps MaxText's own optimizer state.

MaxText hands its model and an optimizer to Tunix, which wraps the optimizer in any of these, in any order: gradient
clipping (`optax.chain(clip, …)`: SFT, RL, DPO), `optax.inject_hyperparams` (RL: it holds the schedule, not adamw) and
`optax.MultiSteps` (DPO always, SFT and RL with micro-batches). What is inside is recognised by its structure.
"""

from collections.abc import Callable, Mapping
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles as roles_lib

Path = abstract_state.Path

_MINI_STEP = "mini_step"
# What the wrappers hold besides the optimizer, and why the target has no place for it.
_MULTI_STEPS = {
    _MINI_STEP: "0 micro-batches since the last update",
    "gradient_step": "Tunix's count of updates",
    "acc_grads": "gradients since the last update: none",
}
_INJECT_HYPERPARAMS = {
    "hyperparams": "the last learning rate",
    "hyperparams_states": "a second count of the schedule",
}
_STEP, _ROOT = ("step",), ("opt_state",)  # Below `optimizer_state`.
_STEP_REASON = "Tunix's count of micro-batches"
_RNG_REASON = "RNG keys of two words where MaxText's have four"

_ADAM = {"count", "mu", "nu"}
_SKIP_STEP = {"count", "grad_norms", "inner_state", "is_skipped", "losses"}
_COUNT = {"count"}
_KEY_WORDS = 4  # Of `unsafe_rbg`, which MaxText's trainers draw from: 0.2.5 refuses keys of another size.


def unwrap(
    roles: roles_lib.Roles, leaves: Mapping[Path, abstract_state.Leaf], params_only: bool
) -> tuple[roles_lib.Roles, dict[Path, str]]:
  """The leaves' roles in MaxText, and the leaves that have none there, each with the reason.

  Args:
    roles: their roles in Tunix's layout.
    leaves: the leaves of the source.
    params_only: whether the optimizer is left out anyway, so that any state will do.

  Raises:
    LayoutError: the weights are LoRA adapters, or MaxText does not have the optimizer.
    StepError: there is an optimizer, and no step.
  """
  _refuse_adapters(roles)
  if params_only:
    return roles, {}
  has_optimizer = any(node_of(role) is not None for role in roles.by_path.values())
  place = _placed(_optimizer_nodes(roles, leaves), roles) if has_optimizer else lambda _: None
  by_path, subtrees, dropped = {}, {}, dict.fromkeys(foreign_rng_state(roles, leaves, _KEY_WORDS), _RNG_REASON)
  for path, role in roles.by_path.items():
    node = node_of(role)
    if node is None:
      by_path |= {path: role} if path not in dropped else {}
    elif isinstance(where := place(node), str):
      dropped[path] = where
    elif isinstance(role, roles_lib.Variable):
      by_path[path] = role._replace(subtree=where)
      subtrees[role.subtree] = where
    elif where is not None:
      by_path[path] = roles_lib.OptimizerLeaf(where)
  masked = frozenset(new for old, new in subtrees.items() if old in roles.masked_subtrees)
  dropped = {path: reason for path, reason in dropped.items() if not abstract_state.is_empty(leaves[path])}
  return roles_lib.Roles(by_path, frozenset(subtrees.values()), masked), dropped


def check_accumulation(dropped: Mapping[Path, str], read: Callable[[Path], Any]):
  """Checks that no gradients wait for further micro-batches, because MaxText has no place for them.

  Raises:
    StepError: there are some.
  """
  for path, reason in dropped.items():
    if reason == _MULTI_STEPS[_MINI_STEP] and (waiting := int(read(path))):
      raise errors.StepError(
          path,
          "0, a step at which all micro-batches are applied",
          f"{waiting}, whose gradients would be lost",
          "Save at such a step, or take the weights alone with --params_only.",
      )


def _refuse_adapters(roles):
  """Refuses adapters, which Tunix saves without the weights that they belong to."""
  for path, role in roles.by_path.items():
    if isinstance(role, roles_lib.Variable) and role.path[-1].endswith(("_lora_a", "_lora_b")):
      raise errors.LayoutError(
          path,
          "whole weights",
          "a LoRA adapter, which is all that Tunix saves of such a run",
          "Convert the model that they were trained on, into which --lora_restore_path merges them.",
      )


def foreign_rng_state(roles: roles_lib.Roles, leaves: Mapping[Path, abstract_state.Leaf], words: int) -> list[Path]:
  """The leaves of RNG streams whose keys are not of `words` words: a trainer takes only keys of its own size."""
  aux = {
      path: role.path
      for path, role in roles.by_path.items()
      if isinstance(role, roles_lib.Variable) and role.collection == layouts.NNX_AUX
  }
  foreign = {
      inner[:-1]
      for path, inner in aux.items()
      if inner[-1] == "key" and tuple(getattr(leaves[path], "shape", ()))[-1:] != (words,)
  }
  return [path for path, inner in aux.items() if inner[:-1] in foreign]


def _optimizer_nodes(roles, leaves) -> set[Path]:
  """The optimizer's leaves and params-like subtrees, as paths below `optimizer_state`."""
  return {
      node
      for path, role in roles.by_path.items()
      if not abstract_state.is_empty(leaves[path]) and (node := node_of(role))
  }


def node_of(role: roles_lib.Role) -> Path | None:
  """The optimizer's node that a role belongs to, as a path below `optimizer_state`; None outside the optimizer."""
  if isinstance(role, roles_lib.OptimizerLeaf):
    return role.path
  subtree = getattr(role, "subtree", None)
  return subtree[:-1] if subtree is not None and subtree[-1] == layouts.BASE else subtree


def _placed(nodes: set[Path], roles: roles_lib.Roles) -> Callable[[Path], Path | str | None]:
  """Where MaxText keeps an optimizer's node: its path, or the reason why it keeps none; None for what holds nothing.

  Raises:
    LayoutError: MaxText does not have this optimizer.
    StepError: it has no step, or the folder has none.
  """
  _check_steps(nodes, roles)
  root, schedule, reasons = _unwrapped_root(nodes)
  new_roots = _adamw_places(nodes, root) or {root: ()}
  if schedule is not None:
    new_roots[schedule] = ("2", "count")

  def place(node):
    for prefix, reason in reasons.items():
      if node[: len(prefix)] == prefix:
        return reason
    for prefix, new in new_roots.items():
      if node[: len(prefix)] == prefix:
        return (*new, *node[len(prefix) :])
    return None

  places = [place(node) for node in sorted(nodes)]
  kept = [where for where in places if isinstance(where, tuple)]
  if len(set(kept)) < len(kept) or not is_maxtexts(set(kept)):
    raise _unknown(nodes)
  return place


def _check_steps(nodes, roles):
  """Checks that the optimizer has its own step, and that the folder's name is one."""
  if _STEP not in nodes:
    raise errors.StepError(
        (layouts.TUNIX_ITEMS[1], *_STEP), "the optimizer's step", "none", "The checkpoint is damaged: use another step."
    )
  if roles_lib.Step() not in roles.by_path.values():
    raise errors.StepError(
        _STEP,
        "the step as the name of the source's folder, as Tunix writes it",
        "none",
        "Give the step's folder under its own name, or --params_only.",
    )


def _unwrapped_root(nodes: set[Path]) -> tuple[Path, Path | None, dict[Path, str]]:
  """The root of the wrapped optimizer, the count of a wrapper's schedule, and what of the wrappers is left out."""
  root: Path = _ROOT
  schedule: Path | None = None
  reasons: dict[Path, str] = {_STEP: _STEP_REASON}
  while True:
    names = _children(nodes, root)
    if names == {*_MULTI_STEPS, "inner_opt_state"}:
      reasons |= {(*root, name): reason for name, reason in _MULTI_STEPS.items()}
      root = (*root, "inner_opt_state")
    elif schedule is None and _is_inject_hyperparams(names):
      reasons |= {(*root, name): reason for name, reason in _INJECT_HYPERPARAMS.items()}
      root, schedule = (*root, "inner_state"), (*root, "count")
    elif _is_wrapping_chain(nodes, root, schedule):
      root = (*root, *names)
    else:
      return root, schedule, reasons


def _is_inject_hyperparams(names) -> bool:
  """Whether these are its fields; in older optax, schedules have no state of their own there."""
  return {"count", "hyperparams", "inner_state"} <= names <= {"count", "inner_state", *_INJECT_HYPERPARAMS}


def _is_wrapping_chain(nodes, root, schedule) -> bool:
  """Whether a chain has a single member with a state, which is an optimizer rather than a part of one.

  An adam state alone is adam_pax, which is not a chain, behind a clip. In the first place it is adamw's; so it is when a
  wrapper holds the schedule.
  """
  names = _children(nodes, root)
  if len(names) != 1 or not _is_chain(names):
    return False
  name = min(names)
  inner = _children(nodes, (*root, name))
  return inner != _COUNT and not (inner == _ADAM and (name == "0" or schedule is not None))


def _adamw_places(nodes, root) -> dict[Path, Path] | None:
  """Where MaxText's adamw keeps the members of a chain of adam and, after it, the schedule; None for other chains."""
  names = _children(nodes, root)
  if not names or not _is_chain(names):
    return None
  adam, *others = sorted(names, key=int)
  if _children(nodes, (*root, adam)) != _ADAM or len(others) > 1:
    return None
  if any(_children(nodes, (*root, other)) != _COUNT for other in others):
    return None
  places: dict[Path, Path] = {(*root, other): ("2",) for other in others}
  return places | {(*root, adam): ("0",)}


def is_maxtexts(nodes: set[Path], root: Path = ()) -> bool:
  """Whether MaxText's `optimizers.get_optimizer` makes an optimizer with this state."""
  names = _children(nodes, root)
  if names == _SKIP_STEP:
    return is_maxtexts(nodes, (*root, "inner_state"))
  if names == {"inner_states"}:
    inner = _children(nodes, (*root, "inner_states"))
    is_mask = "trainable" in inner <= {"trainable", "frozen"}
    return inner == {"muon", "adam"} or (
        is_mask and is_maxtexts(nodes, (*root, "inner_states", "trainable", "inner_state"))
    )
  if names == _ADAM:  # adam_pax
    return True
  members = {name: _children(nodes, (*root, name)) for name in names}
  return members in ({"0": _ADAM, "2": _COUNT}, {"1": _COUNT})  # adamw, sgd


def _children(nodes, root) -> set[str]:
  return {node[len(root)] for node in nodes if layouts.below(node, root)}


def _is_chain(names) -> bool:
  return all(name.isdigit() for name in names)


def _unknown(nodes) -> errors.LayoutError:
  found = ["/".join(node[len(_ROOT) :]) for node in sorted(nodes - {_STEP})]
  return errors.LayoutError(
      (layouts.TUNIX_ITEMS[1], *_ROOT),
      "an optimizer that MaxText has, with a schedule of the learning rate: adamw, adam_pax, sgd, muon",
      ", ".join(found[:8]) or "no state",
      "MaxText cannot go on with it: take the weights alone with --params_only.",
  )
