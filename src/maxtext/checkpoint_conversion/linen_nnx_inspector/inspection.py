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

"""What a checkpoint is, as far as its metadata say. Of its arrays only the step is read."""

from collections.abc import Iterator, Mapping
import dataclasses
import math
import os
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_finding
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles
from maxtext.checkpoint_conversion.linen_nnx_converter.state import optimizer_tree
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import chunk_keys
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import training_engine
from maxtext.checkpoint_conversion.linen_nnx_inspector import model as model_lib
from maxtext.checkpoint_conversion.linen_nnx_inspector import readers as readers_lib

Path = abstract_state.Path
Variable = leaf_roles.Variable

_SCAN_AXES = (1, 0, 2)  # MaxText's default first; a wrong axis rarely fits the tree.


@dataclasses.dataclass(frozen=True)
class Amount:
  """Leaves of one part and dtype, their elements, and their size in bytes."""

  leaves: int = 0
  elements: int = 0
  nbytes: int = 0


@dataclasses.dataclass(frozen=True)
class Storage:
  """How the arrays are stored: the kind of store, its chunks, their size in bytes, and the files that hold them."""

  kind: str
  chunks: int
  nbytes: int
  files: int


@dataclasses.dataclass(frozen=True)
class Inspection:
  """What a checkpoint is. What could not be determined is None or empty, and among `problems`.

  Attributes:
    path: the folder of its pytree.
    step: the number of its step, from the state itself, else from its folder.
    item: the name of its item, unless it is the one that MaxText looks for.
    items: the other items of the step.
    layout: its state layout, and the trainer as far as the tree shows it.
    layers: how each group of layers is arranged.
    scan_axis: the layer axis of scanned Params; None if there are none.
    families: the decoder families that have such layers, if the tree shows them.
    optimizer: its names, as far as its states show them.
    optimizer_states: the fields of each of its states, by path below `opt_state`.
    amounts: what there is, by part and dtype. Parts are `params`, `opt_state`, `step`, `nnx_aux`, other collections.
    rng_leaves: the keys and counts of RNG streams.
    rng_streams: the names of these streams.
    storage: how the arrays are stored.
    readers: which trainers read it.
    record: the record of the converter that wrote it.
    model: how it differs from the model of a config, if there is one.
    sizes: the bytes of every leaf, by path.
    leaves: every leaf's shape and dtype, or what it is, by path.
    problems: why no more can be said, a line each.
  """

  path: str
  step: int | None = None
  item: str | None = None
  items: tuple[str, ...] = ()
  layout: str | None = None
  layers: tuple[str, ...] = ()
  scan_axis: int | None = None
  families: tuple[str, ...] = ()
  optimizer: tuple[str, ...] = ()
  optimizer_states: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
  amounts: Mapping[tuple[str, str], Amount] = dataclasses.field(default_factory=dict)
  rng_leaves: int = 0
  rng_streams: tuple[str, ...] = ()
  storage: Storage | None = None
  readers: tuple[readers_lib.Reader, ...] = ()
  record: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  model: model_lib.Model | None = None
  sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
  leaves: Mapping[str, str] = dataclasses.field(default_factory=dict)
  problems: tuple[str, ...] = ()


@abstract_state.uncollected()
def inspect_checkpoint(path: str | os.PathLike[str], config: Any = None) -> Inspection:
  """Says what the checkpoint at `path` is.

  Args:
    path: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    config: a MaxText config with whose model to compare it.

  Raises:
    ConversionError: there is no checkpoint. What is wrong with an existing one is among the `problems` of the result.
  """
  location = locations.find_source(path)
  is_other = location.step_folder is not None and not location.split and location.items.name != locations.ITEMS
  found = Inspection(os.fspath(location.items), location.step, location.items.name if is_other else None)
  found = dataclasses.replace(found, items=tuple(item.name for item in location.siblings()))
  return _with_all(found, (_with_record, _with_state), location, config)


def _with_all(found, looks, *seen) -> Inspection:
  """The inspection with what each of the looks adds, or why it could not."""
  for look in looks:
    try:
      found = look(found, *seen)
    except errors.ConversionError as e:
      found = dataclasses.replace(found, problems=(*found.problems, str(e)))
  return found


def _with_record(found, location, _) -> Inspection:
  record = location.custom_metadata().get(locations.RECORD)
  return dataclasses.replace(found, record=record if isinstance(record, dict) else {})


def _with_state(found, location, config) -> Inspection:
  """What its metadata say, as far as they are whole."""
  checkpoint = opening.open_source(location)
  leaves = {"/".join(path): leaf for path, leaf in checkpoint.state.leaves.items()}
  said = {path: plan_lib.described(leaf) for path, leaf in leaves.items()}
  sizes = {path: _nbytes(leaf) for path, leaf in leaves.items()}
  found = dataclasses.replace(found, storage=_storage(checkpoint), leaves=said, sizes=sizes)
  with_model = lambda found, *_: dataclasses.replace(found, model=model_lib.compare(checkpoint.state, config))
  looks = _with_roles, _with_readers, *(() if config is None else (with_model,))
  return _with_all(found, looks, location, checkpoint)


def _with_roles(found, location, checkpoint) -> Inspection:
  """What the tree shows: layout, parts, step, optimizer and layers."""
  leaves, layout = checkpoint.state.leaves, layouts.detect(checkpoint.state)
  roles = {
      path: role
      for path, role in leaf_roles.read(checkpoint.state, layout).by_path.items()
      if not abstract_state.is_empty(leaves[path])
  }
  variables = {role: leaves[path] for path, role in roles.items() if isinstance(role, Variable)}
  rngs = [role.path for role, leaf in variables.items() if variable_kinds.is_rng_state(role.path, leaf)]
  marks = decoder_families.BLOCK_MARKS.keys() & {key for variable in variables for key in variable.path}
  optimizer, states = _optimizer(leaves, roles)
  found = dataclasses.replace(
      found,
      layout=_layout(layout, variables, {} if found.problems else location.custom_metadata()),
      amounts=_amounts(leaves, roles),
      optimizer=optimizer,
      optimizer_states=states,
      families=tuple(sorted({family for mark in marks for family in decoder_families.BLOCK_MARKS[mark]})),
      rng_leaves=len(rngs),
      rng_streams=tuple(sorted({path[-2] for path in rngs})),
  )
  return _with_all(found, (_with_step, _with_layers), checkpoint, roles)


def _with_readers(found, location, checkpoint) -> Inspection:
  """Which trainers read it, if it is whole."""
  opening.check_whole(checkpoint)
  if found.layout is None or found.problems:
    return found
  if location.under_way:
    return dataclasses.replace(found, problems=(*found.problems, f"saved inside a step: {location.under_way}"))
  return dataclasses.replace(found, readers=tuple(readers_lib.find(checkpoint.state, location, found.scan_axis)))


def _layout(layout, variables, custom_metadata) -> str:
  """The layout, and whose it is if the tree shows it."""
  if layouts.is_tunix(layout) and training_engine.is_engine(custom_metadata):
    return f"{layout}, of MaxText's training engine"
  has_aux = layout.framework == "linen" and any(variable.collection == layouts.NNX_AUX for variable in variables)
  return f"{layout} with nnx_aux, of an NNX trainer" if has_aux else str(layout)


def _amounts(leaves, roles) -> dict[tuple[str, str], Amount]:
  """What there is, by part and dtype."""
  amounts = {}
  for path, role in roles.items():
    leaf, is_array = leaves[path], abstract_state.is_array(leaves[path])
    size = math.prod(leaf.shape) if is_array else 1
    key = _part(role), str(leaf.dtype) if is_array else type(leaf).__name__
    old = amounts.get(key, Amount())
    amounts[key] = Amount(old.leaves + 1, old.elements + size, old.nbytes + _nbytes(leaf))
  return amounts


def _nbytes(leaf) -> int:
  return math.prod(leaf.shape) * leaf.dtype.itemsize if abstract_state.is_array(leaf) else 0


def _part(role) -> str:
  if isinstance(role, leaf_roles.Step):
    return "step"
  if isinstance(role, Variable) and role.subtree is None:
    return role.collection
  return "apart" if isinstance(role, leaf_roles.Apart) else "opt_state"


def _optimizer(leaves, roles) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
  """The names that its states suggest, and the fields of each state by path."""
  others = {role.path: leaves[path] for path, role in roles.items() if isinstance(role, leaf_roles.OptimizerLeaf)}
  variables = [(path, role) for path, role in roles.items() if isinstance(role, Variable)]
  moments = {(role.subtree, role.path): leaves[path] for path, role in variables if role.subtree}
  subtrees = {subtree[:-1] if subtree[-1] == layouts.BASE else subtree for subtree, _ in moments}
  fields = {}
  for path in sorted({*others, *subtrees} - {()}):
    fields.setdefault(path[:-1], []).append(path[-1])
  everything = others | {(*subtree, *path): leaf for (subtree, path), leaf in moments.items()}
  one_of_each = {path[:2]: path for path in everything}.values()
  names = set(filter(None, (optimizer_tree.without_weights_shapes(path, everything) for path in one_of_each)))
  kinds = optimizer_tree.KINDS.items()
  names = names or {kind.name for found in fields.values() for known, kind in kinds if known <= set(found)}
  return tuple(sorted(names)), {"/".join(path): tuple(found) for path, found in fields.items()}


def _with_step(found, checkpoint, roles) -> Inspection:
  """The step that the state holds, or else the folder's."""
  for path in (path for path, role in roles.items() if isinstance(role, leaf_roles.Step)):
    leaf = checkpoint.state.leaves[path]
    if isinstance(leaf, int):
      return dataclasses.replace(found, step=leaf)
    if abstract_state.is_array(leaf) and tuple(leaf.shape) == () and leaf.dtype.kind in "iu":
      return dataclasses.replace(found, step=int(checkpoint.read(path)))
  return found


def _with_layers(found, checkpoint, roles) -> Inspection:
  """How the layers are arranged, along the first axis that makes sense."""
  paths = {role: path for path, role in roles.items() if isinstance(role, Variable)}
  variables = {role: checkpoint.state.leaves[path] for role, path in paths.items()}
  arrays = {role: leaf for role, leaf in variables.items() if abstract_state.is_array(leaf)}
  if not arrays:
    return found
  failure = None
  for axis in _SCAN_AXES:
    try:
      schedule = layer_finding.find(arrays, axis, lambda role: paths.get(role, role.path))
    except errors.LayerStackError as e:
      failure = failure or e
      continue
    is_scanned = any(len(stack.sizes) > stack.leading for stack in schedule)
    return dataclasses.replace(found, layers=tuple(_layers(schedule, axis)), scan_axis=axis if is_scanned else None)
  assert failure is not None
  raise failure


def _layers(schedule, axis) -> Iterator[str]:
  """How the layers of each group are arranged."""
  for group, count in layer_stacks.layer_counts(schedule).items():
    stacks = [stack for stack in schedule if stack.group == group]
    scanned = [stack for stack in stacks if stack.sizes]
    how = "unscanned"
    if any(stack.is_piped for stack in stacks):
      how = f"in a pipeline, {' x '.join(map(str, stacks[0].sizes))}"
    elif scanned:
      how = f"scanned along axis {axis}" + (f", in {len(scanned)} stacks" if len(scanned) > 1 else "")
    yield f"{'/'.join(group)}: {count} {how}"


def _storage(checkpoint: reader.Checkpoint) -> Storage:
  """How the arrays are stored."""
  values, chunks = checkpoint.index.values, [np.empty((0, 3), np.int64)]
  for leaf in checkpoint.stored.values():
    if below := values.arrays.get(leaf.name):  # Otherwise it is held in memory.
      document = below.rows_of[f"/{chunk_keys.DOCUMENT_NAMES[leaf.document['zarr_format']]}"]
      chunks.append(np.delete(below.rows, document, axis=0))
  rows, kind = np.concatenate(chunks), f"{'OCDBT' if checkpoint.use_ocdbt else 'files'}, zarr {2 + checkpoint.use_zarr3}"
  files = {values.files[number] for number in np.unique(rows[:, 0])} - {""}  # Small values are in the tree itself.
  return Storage(kind, len(rows), int(rows[:, 2].sum()), len(files | checkpoint.index.tree_files))
