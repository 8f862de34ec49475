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

"""The structure of an optimizer's state: its chains and its empty nodes.

Linen keeps optax's own tree: a chain is a list, and a transformation without state leaves an empty node. NNX keeps only
the leaves: a chain is a dict keyed by the index, and empty states are absent. (A `MaskedNode` is kept: in both it takes
the place of a leaf.) So from NNX to Linen, lists and empty nodes are put back. Gaps show in the indices; what does not
show is known of optax's own states, listed below.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path

_MOST_PLACES = 1000  # A larger index is damage; filling the places before it would take all memory.


class Kind(NamedTuple):
  """An optimizer that is recognised by the fields of its state.

  Attributes:
    name: its name; adamw and adam_pax have adam's fields.
    chain_length: how long its chain is where only the first transformation has a state: adamw(constant), muon's inner
      chain with a constant learning rate, sgd(constant, momentum).
  """

  name: str
  chain_length: int


KINDS = {
    frozenset({"count", "mu", "nu"}): Kind("adam", 3),
    frozenset({"count", "mu", "ns_coeffs"}): Kind("muon", 4),
    frozenset({"trace"}): Kind("sgd with momentum", 2),
}

# Named states with a field that can be empty: (fields that identify the state, the empty field's path, its value).
_EMPTY_FIELDS = (
    (frozenset({"count", "hyperparams", "inner_state"}), ("hyperparams_states",), {}),  # inject_hyperparams
    (frozenset({"mini_step", "gradient_step", "acc_grads"}), ("skip_state",), ()),  # MultiSteps
    # MaxText's trainable_parameters_mask: multi_transform({"trainable": …, "frozen": set_to_zero()})
    (frozenset({"trainable"}), ("frozen", "inner_state"), None),
)

# The fields of optax's states that do not have the weights' shapes: factored, projected, one number per layer, one number
# per index of an axis, a history.
_WITHOUT_WEIGHTS_SHAPES = {
    frozenset({"count", "v_row", "v_col", "v"}): "adafactor",
    frozenset({"count", "base_optimizer_state", "projector"}): "galore",
    frozenset({"count", "params", "updates", "diff_params_memory", "diff_updates_memory", "weights_memory"}): "lbfgs",
    frozenset({"count", "mu", "nu"}): "novograd",
    frozenset({"mu", "nu"}): "sm3",
}


def without_weights_shapes(opt_path: Path, leaves: Mapping[Path, abstract_state.Leaf]) -> str | None:
  """The name of the optimizer that the leaf at `opt_path` belongs to, if its state does not have the weights' shapes.

  Args:
    opt_path: the path, below `opt_state`, of a leaf that does not follow the weights.
    leaves: all leaves of the optimizer, by such paths.
  """
  children = _children(leaves)
  names = (_WITHOUT_WEIGHTS_SHAPES.get(frozenset(children[opt_path[:i]])) for i in range(len(opt_path)))
  name = next(filter(None, names), None)
  # These two share adam's fields, but hold numbers, and a list for each weight.
  if name == "novograd" and any(getattr(leaf, "shape", ()) for path, leaf in leaves.items() if "nu" in path):
    return None
  if name == "sm3" and not all(_is_index(path[-1]) for path in leaves if "mu" in path):
    return None
  return name


def linen_structure(
    opt_paths: Iterable[Path], subtrees: Iterable[Path], empty_nodes: Mapping[Path, Any]
) -> tuple[dict[Path, Any], frozenset[Path]]:
  """The empty nodes and the lists of a Linen optimizer state.

  Args:
    opt_paths: the paths of the optimizer's leaves below `opt_state`, as NNX has them.
    subtrees: its params-like subtrees, below which nothing is a chain.
    empty_nodes: the empty nodes that an earlier conversion recorded of this very state.

  Returns:
    The empty nodes by path, and the paths of the lists, both below `opt_state`.
  """
  subtrees = set(subtrees)
  nodes = {_cut(path, subtrees) for path in opt_paths}
  if nodes == {()}:  # The whole opt_state is empty.
    return {}, frozenset()
  if not nodes:  # sgd without a schedule, or no optimizer at all: every place is empty.
    return dict(empty_nodes), frozenset({path[:-1] for path in empty_nodes if path[-1:] == ("0",)})
  inner = {path[:i] for path in nodes for i in range(len(path))}
  taken = inner | nodes
  empties = {
      path: leaf
      for path, leaf in empty_nodes.items()
      if path not in taken and not any(path[:i] in nodes for i in range(len(path)))
  }
  children = _children(nodes | set(empties))
  for path, names in list(children.items()):
    empties |= {p: leaf for p, leaf in _missing_fields(path, names, children) if p not in empties}
  children = _children(nodes | set(empties))
  lists = {path for path, names in children.items() if all(map(_is_index, names))}
  for path in lists:
    for index in range(_chain_length(path, children)):
      if str(index) not in children[path]:
        empties[(*path, str(index))] = None
  return empties, frozenset(lists)


def decay_mask(subtrees: Iterable[Path]) -> dict[Path, None]:
  """The empty state of adamw's weight decay where it has a mask: `1/inner_state`, in place of 1.

  Args:
    subtrees: the params-like subtrees, which show where adamw's chain is. Muon's inner adam has no such mask.
  """
  chains = {path[:-2] for path in subtrees if path[-2:] == ("0", "nu") and path[-4:-3] != ("adam",)}
  return {(*chain, "1", "inner_state"): None for chain in chains}


def bare_subtrees(subtrees: Iterable[Path]) -> frozenset[Path]:
  """The params-like subtrees that MaxText's NNX trainers save without a collection level.

  Their `train_state_nnx` knows `mu` and `nu` at the top or in the outer chain; nested optimizers stay as in NNX.
  """
  has_level = lambda path: path[-1] in ("mu", "nu") and (len(path) == 1 or (len(path) == 2 and path[0].isdigit()))
  return frozenset(path for path in subtrees if not has_level(path))


def nnx_trainer_structure(opt_paths: Iterable[Path]) -> tuple[dict[Path, Any], frozenset[Path]]:
  """The empty nodes and the lists of an optimizer state as MaxText's NNX trainers save it: the outer chain alone.

  Args:
    opt_paths: the paths of the optimizer's leaves below `opt_state`, as NNX has them.
  """
  names = {path[0] for path in opt_paths if path}
  if not names or not all(map(_is_index, names)):
    return {}, frozenset()
  places = map(str, range(_length((), names)))
  return {(place,): None for place in places if place not in names}, frozenset({()})


def _cut(path, subtrees) -> Path:
  """The path, cut off at the params-like subtree that it leads into, if it does."""
  return next((path[:i] for i in range(len(path)) if path[:i] in subtrees), path)


def _children(paths) -> dict[Path, set[str]]:
  """The names of the children of every inner node."""
  children = {}
  for path in paths:
    for i, name in enumerate(path):
      children.setdefault(path[:i], set()).add(name)
  return children


def _missing_fields(path, names, children):
  """The empty fields that optax's state at `path` has and NNX leaves out."""
  for fields, field, leaf in _EMPTY_FIELDS:
    is_transform = "trainable" not in fields or path[-1:] == ("inner_states",)
    if fields <= names and field[0] not in names and is_transform:
      yield (*path, *field), leaf


def _chain_length(path, children) -> int:
  """The number of places of the chain at `path`."""
  names = children[path]
  length = _length(path, names)
  kind = KINDS.get(frozenset(children.get((*path, "0"), ()))) if names == {"0"} else None
  return max(length, kind.chain_length) if kind else length


def _is_index(name) -> bool:
  return name.isascii() and name.isdigit() and (name == "0" or name[0] != "0")


def _length(path, names) -> int:
  """The length of a chain, or of a list, with these indices."""
  last = max(map(int, names))
  if last >= _MOST_PLACES:
    raise errors.LayoutError(
        ("opt_state", *path, str(last)),
        f"at most {_MOST_PLACES} transformations in a chain",
        f"one at {last}",
        "The checkpoint is damaged: use another step.",
    )
  return last + 1
