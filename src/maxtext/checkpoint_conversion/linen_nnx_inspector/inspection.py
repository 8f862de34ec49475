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

"""What a checkpoint is, as far as its metadata tell. No array is read but the step."""

import collections
from collections.abc import Iterator, Mapping
import dataclasses
import math
import os
import shlex
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_finding
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles
from maxtext.checkpoint_conversion.linen_nnx_converter.state import optimizer_tree
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

Path = abstract_state.Path
Variable = leaf_roles.Variable

RECORD = "linen_nnx_converter"  # The converter's record in Orbax's custom metadata.
RELEASES = (("0.2.3", "linen"), ("0.2.3", "nnx"), ("0.2.4", "linen"), ("0.2.4", "nnx"), ("0.2.5", "nnx"))
# By the fields of a state of optax's, or of MaxText's; those of adam are adamw's and adam_pax's too.
_OPTIMIZERS = {
    frozenset({"count", "mu", "nu"}): "adam",
    frozenset({"count", "mu", "ns_coeffs"}): "muon",
    frozenset({"trace"}): "sgd with momentum",
}


@dataclasses.dataclass(frozen=True)
class Amount:
  """Leaves of one part and dtype, their elements, and their size in bytes."""

  leaves: int = 0
  elements: int = 0
  nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class Reader:
  """A trainer of a release: whether it reads the checkpoint as it is, else what to do, or why it cannot."""

  release: str
  trainer: str
  as_it_is: bool = False
  command: str | None = None
  refusal: str | None = None


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What a checkpoint is. What could not be told is None or empty, and among `problems`.

  Attributes:
    path: the folder of its pytree.
    step: the number of its step, by the state itself, else by its folder.
    items: the other items of the step.
    layout: its state layout.
    layers: for each group of layers, how it is arranged.
    optimizer: what the optimizer's states are, and the moments that it keeps of the weights.
    amounts: what there is, by part and dtype. Parts are `params`, `optimizer`, `step`, `nnx_aux`, other collections.
    rng_leaves: the keys and counts of RNG streams.
    storage: how the arrays are stored.
    readers: which trainers read it.
    record: what the converter put on record when it wrote it.
    leaves: every leaf: its path, and its shape and dtype or what it is.
    problems: what stands in the way of saying more, a line each.
  """

  path: str
  step: int | None = None
  items: tuple[str, ...] = ()
  layout: str | None = None
  layers: tuple[str, ...] = ()
  optimizer: str | None = None
  amounts: Mapping[tuple[str, str], Amount] = dataclasses.field(default_factory=dict)
  rng_leaves: int = 0
  storage: str | None = None
  readers: tuple[Reader, ...] = ()
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()


def inspect_checkpoint(path: str | os.PathLike[str]) -> Inspection:
  """Says what the checkpoint at `path` is.

  Args:
    path: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.

  Raises:
    ConversionError: there is no checkpoint. What is wrong with one that is there is among the `problems` of the result.
  """
  location = locations.find_source(path)
  found = Inspection(os.fspath(location.items), location.step)
  try:
    found = dataclasses.replace(
        found, items=tuple(item.name for item in location.siblings()), record=_record(location.custom_metadata())
    )
    checkpoint = opening.open_source(location)
    leaves = {"/".join(path): plan_lib.described(leaf) for path, leaf in checkpoint.state.leaves.items()}
    found = dataclasses.replace(found, storage=_storage(checkpoint), leaves=leaves)
    found = _with_roles(found, checkpoint)
    if location.under_way:
      return _with_problem(found, f"saved inside a step: {location.under_way}")
    return dataclasses.replace(found, readers=tuple(_readers(checkpoint.state, location)))
  except errors.ConversionError as e:
    return _with_problem(found, str(e))


def _with_problem(found, problem) -> Inspection:
  return dataclasses.replace(found, problems=(*found.problems, problem))


def _record(custom_metadata) -> Mapping[str, Any]:
  record = custom_metadata.get(RECORD)
  return record if isinstance(record, dict) else {}


def _with_roles(found, checkpoint) -> Inspection:
  """What the tree tells: layout, parts, step, optimizer and layers."""
  state = checkpoint.state
  layout = layouts.detect(state)
  roles = leaf_roles.read(state, layout).by_path
  found = dataclasses.replace(
      found,
      layout=str(layout),
      step=_step(checkpoint, roles, found.step),
      amounts=_amounts(state.leaves, roles),
      optimizer=_optimizer(state.leaves, roles),
      rng_leaves=sum(
          isinstance(role, Variable) and variable_kinds.is_rng_state(role.path, state.leaves[path])
          for path, role in roles.items()
      ),
  )
  try:
    return dataclasses.replace(found, layers=tuple(_layers(state.leaves, roles)))
  except errors.ConversionError as e:
    return _with_problem(found, str(e))


def _part(role) -> str:
  if isinstance(role, leaf_roles.Step):
    return "step"
  if isinstance(role, Variable) and role.subtree is None:
    return role.collection
  return "apart" if isinstance(role, leaf_roles.Apart) else "optimizer"


def _amounts(leaves, roles) -> dict[tuple[str, str], Amount]:
  """What there is, by part and dtype."""
  amounts = {}
  for path, role in roles.items():
    leaf = leaves[path]
    if abstract_state.is_empty(leaf):
      continue
    is_array = abstract_state.is_array(leaf)
    size, itemsize = (math.prod(leaf.shape), leaf.dtype.itemsize) if is_array else (1, 0)
    key = _part(role), str(leaf.dtype) if is_array else type(leaf).__name__
    old = amounts.get(key, Amount())
    amounts[key] = Amount(old.leaves + 1, old.elements + size, old.nbytes + size * itemsize)
  return amounts


def _step(checkpoint, roles, of_folder) -> int | None:
  """The step that the state holds; that of the folder where it holds none, or one that cannot be read."""
  for path, role in roles.items():
    leaf = checkpoint.state.leaves[path]
    if isinstance(role, leaf_roles.Step):
      return int(checkpoint.read(path)) if abstract_state.is_array(leaf) else leaf
  return of_folder


def _optimizer(leaves, roles) -> str | None:
  """The optimizer's states, and its params-like subtrees."""
  moments = collections.Counter("/".join(r.subtree) for r in roles.values() if isinstance(r, Variable) and r.subtree)
  states = {path: role for path, role in roles.items() if isinstance(role, leaf_roles.OptimizerLeaf)}
  others = {role.path: leaves[path] for path, role in states.items() if not abstract_state.is_empty(leaves[path])}
  paths = {*others, *(tuple(name.split("/")) for name in moments)}
  fields = {path[:-1]: frozenset(p[-1] for p in paths if p[:-1] == path[:-1]) for path in paths if path}
  names = {name for found in fields.values() for known, name in _OPTIMIZERS.items() if known <= found}
  names |= set(filter(None, (optimizer_tree.without_weights_shapes(path, others) for path in others)))
  if not paths:
    return None
  kept = ", ".join(f"{name} of {number} leaves" for name, number in sorted(moments.items())) or "no moments"
  return f"{', '.join(sorted(names)) or 'of an unknown kind'}: {kept}"


def _layers(leaves, roles) -> Iterator[str]:
  """How the layers of each group are arranged."""
  variables = {role: leaves[path] for path, role in roles.items() if isinstance(role, Variable)}
  variables = {role: leaf for role, leaf in variables.items() if abstract_state.is_array(leaf)}
  if not variables:
    return
  paths = {role: path for path, role in roles.items() if isinstance(role, Variable)}
  schedule = layer_finding.find(variables, 1, lambda role: paths.get(role, role.path))
  for group, count in layer_stacks.layer_counts(schedule).items():
    stacks = [stack for stack in schedule if stack.group == group]
    scanned = [stack for stack in stacks if stack.sizes]
    how = "one by one" if not scanned else "scanned" if len(scanned) == 1 else f"scanned, in {len(scanned)} stacks"
    if any(stack.is_piped for stack in stacks):
      how = f"in a pipeline, {' x '.join(map(str, stacks[0].sizes))}"
    yield f"{'/'.join(group)}: {count} {how}"


def _storage(checkpoint: reader.Checkpoint) -> str:
  """How the arrays are stored."""
  values = checkpoint.index.values.values()
  files = {value.file for value in values if value.inline is None}
  chunks = len(values) - len(checkpoint.stored)  # Each array has a document besides.
  nbytes = sum(value.nbytes for value in values)
  kind = f"{'OCDBT' if checkpoint.use_ocdbt else 'files'}, zarr {3 if checkpoint.use_zarr3 else 2}"
  return f"{kind}: {chunks:,} chunks in {len(files):,} files, {nbytes / 2**20:,.1f} MiB"


def _readers(state, location) -> Iterator[Reader]:
  """Which trainers read it as it is, and how it becomes what the others read."""
  is_named = location.step_folder is None or location.items.name == locations.ITEMS  # Under which MaxText looks for it.
  for release, trainer in RELEASES:
    run = planner.Run(releases.parse(release), trainer)
    try:
      plan = planner.plan_conversion(state, options_lib.PlanOptions.of(maxtext_release=release), run)
    except errors.ConversionError as e:
      yield Reader(release, trainer, refusal=str(e))
      continue
    if is_named and _changes_nothing(plan):
      yield Reader(release, trainer, as_it_is=True)
      continue
    of_trainer = releases.find(run.release).trainer if run.release else trainer
    config = "" if of_trainer == trainer else " base.yml model_name=… enable_nnx=True pure_nnx=True pure_nnx_decoder=True"
    target = f"--target_path=… --maxtext_release={release}{config}"
    yield Reader(
        release, trainer, command=f"linen-nnx-converter --source_path={shlex.quote(os.fspath(location.items))} {target}"
    )


def _changes_nothing(plan: plan_lib.Plan) -> bool:
  """Whether the target is the source, leaf by leaf and node by node."""
  same = lambda leaf, other: plan_lib.described(leaf) == plan_lib.described(other)
  source, target = plan.source, plan.target
  return (
      source.leaves.keys() == target.leaves.keys()
      and source.lists == target.lists
      and all(same(leaf, source.leaves[path]) for path, leaf in target.leaves.items())
      and all(move.kind == "copy" and move.sources == [path] for path, move in plan.moves.items())
  )
