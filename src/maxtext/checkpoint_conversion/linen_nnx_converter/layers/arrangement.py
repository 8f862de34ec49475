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

"""Arranging layers: from one schedule to another."""

import collections
from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses

import jax

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import restacking
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path
Variable = leaf_roles.Variable
LayerStack = layer_stacks.LayerStack
Piece = restacking.Piece
Schedule = layer_stacks.Schedule
CollectionOf = Callable[[Variable], str]

_KEEP = "Keep the arrangement: leave out --scan_layers."


@dataclasses.dataclass(frozen=True)
class Arranged:
  """A variable of the target, its leaf, and the move of variables that makes it; None for an empty node."""

  variable: Variable
  move: leaf_moves.Move | None
  leaf: abstract_state.Leaf


# What a layer's leaf is, apart from which layer it is in: its collection, optimizer subtree, and path inside the layer.
_Key = tuple[str, Path | None, Path]


def target_schedule(
    source: Schedule,
    scan_layers: bool | None,
    naming: str,
    model: Schedule | None = None,
    *,
    keeps_pipelines: bool = False,
) -> Schedule:
  """The schedule of the target.

  Where no model gives it, `scan_layers` leaves layers that are scanned already as they are, blocks included, and stacks
  all others plainly, those of a pipeline too.

  Args:
    source: the schedule of the source.
    scan_layers: whether the target's layers are scanned; None keeps what each group is.
    naming: how to write layers that are not scanned, `flat` or `nested`.
    model: the schedule that the model's config gives for its decoder.
    keeps_pipelines: whether a decoder with a pipeline stays as it is unless the model gives its schedule.

  Raises:
    LayerStackError: the source has another number of layers than the model.
  """
  counts, wanted = layer_stacks.layer_counts(source), layer_stacks.layer_counts(model or ())
  for group in dict.fromkeys((*wanted, *(group for group in counts if model and group[0] == "decoder"))):
    if counts.get(group, 0) != wanted.get(group, 0):
      raise errors.LayerStackError(
          group,
          f"{wanted.get(group, 0)} layers, as the config says",
          f"{counts.get(group, 0)} in the checkpoint",
          "Give the config of the model that this is a checkpoint of.",
      )
  target, kept = list(model or ()), {stack.prefix[0] for stack in source if stack.is_piped and keeps_pipelines}
  for group, count in counts.items():
    if group in wanted:
      continue
    stacks = [stack for stack in source if stack.group == group]
    is_scanned = any(stack.is_scanned for stack in stacks) and not any(stack.is_piped for stack in stacks)
    if group[0] in kept or (is_scanned and scan_layers is not False):
      target += stacks
    else:
      target += layer_stacks.plain(group, count) if scan_layers else layer_stacks.unscanned(group, count, naming)
  return tuple(target)


def arrange(
    variables: Mapping[Variable, abstract_state.Leaf],
    source: Schedule,
    target: Schedule,
    *,
    param_scan_axis: int,
    path_of: layer_stacks.PathOf,
    collection_of: CollectionOf = lambda variable: variable.collection,
) -> list[Arranged]:
  """Rearranges the layers of `variables`. Variables outside layers, and of stacks that stay, are copied.

  Args:
    variables: the source's variables and their leaves.
    source: their schedule.
    target: the schedule to write, of the same layers.
    param_scan_axis: the layer axis of scanned Params, in the source and in the target.
    path_of: the path of a variable for messages.
    collection_of: the collection of a variable in the target.

  Raises:
    LayerStackError: layers to be stacked differ.
  """
  prefixes, kept = {stack.prefix: stack for stack in source}, {stack.prefix for stack in {*source} & {*target}}
  arranged, layers = [], collections.defaultdict(dict)
  for variable, leaf in variables.items():
    collection, stack = collection_of(variable), _stack_of(variable, prefixes)
    # Params have other layer axes than other variables.
    if stack is None or (stack.prefix in kept and collection == variable.collection):
      move = None if abstract_state.is_empty(leaf) else leaf_moves.copy(variable)
      arranged.append(Arranged(variable._replace(collection=collection), move, leaf))
      continue
    held = _held(variable, leaf, stack, param_scan_axis)
    if 0 in stack.sizes:
      shape = f"shape {tuple(leaf.shape)}"
      raise layer_stacks.unlike(path_of(variable), "at least one layer to take out", shape, _KEEP)
    for index in stack.indices():
      key = collection, variable.subtree, variable.path[len(stack.prefix) :]
      layers[stack.group, stack.layer(index)][key] = held, index
  mixed = _mixed(source) | _mixed(target)
  for stack in target:
    of_stack = [layers[stack.group, n] for n in stack.layers()]
    arranged += _stack_leaves(stack, of_stack, param_scan_axis, path_of, stack.group in mixed)
  return arranged


def _mixed(schedule) -> set[Path]:
  """The groups with layers inside and outside a pipeline, which are therefore along different axes."""
  groups = ({stack.group for stack in schedule if stack.is_piped == is_piped} for is_piped in (True, False))
  return set.intersection(*groups)


def _stack_of(variable: Variable, prefixes: Mapping[Path, LayerStack]) -> LayerStack | None:
  """The stack whose prefix, of two to four keys, the variable is below."""
  for n in (4, 3, 2):
    if stack := prefixes.get(variable.path[:n]):
      return stack
  return None


def _held(variable, leaf, stack, param_scan_axis) -> restacking.Held:
  shape = tuple(getattr(leaf, "shape", ()))
  axes = stack.axes(variable, len(shape) - len(stack.sizes), param_scan_axis)
  return restacking.Held(variable, leaf, stack, axes, leaf_moves.remove(shape, axes))


def _stack_leaves(stack, layers: list[dict[_Key, Piece]], param_scan_axis, path_of, is_mixed) -> Iterator[Arranged]:
  """The leaves of one stack of the target: those of its layers, which must be alike."""
  for key in dict.fromkeys(key for layer in layers for key in layer):
    pieces = _alike(key, layers, path_of)
    held, _ = pieces[0]
    collection, subtree, rest = key
    variable = Variable(collection, (*stack.prefix, *rest), subtree)
    if layer_names.prefix_of(variable.path) != stack.prefix:
      path = path_of(held.variable)
      raise layer_stacks.unlike(path, f"a name that {'/'.join(stack.prefix)} can have below it", "a layer's", _KEEP)
    if abstract_state.is_empty(held.leaf):
      yield Arranged(variable, None, held.leaf)
      continue
    move = restacking.move(pieces, stack.axes(variable, len(held.shape), param_scan_axis), stack.sizes, is_mixed)
    is_as_it_was = move.kind == "copy"
    shape = () if is_as_it_was else move.shape(held.leaf.shape)
    yield Arranged(variable, move, held.leaf if is_as_it_was else jax.ShapeDtypeStruct(shape, held.leaf.dtype))


def _alike(key, layers, path_of) -> list[Piece]:
  """Every layer's piece of one leaf, all of the first one's shape and dtype."""
  first = next(layer[key][0] for layer in layers if key in layer)
  like = "/".join(path_of(first.variable))
  for layer in layers:
    if key not in layer:
      other = next(iter(layer.values()))[0]
      path = path_of(first.variable._replace(path=(*other.stack.prefix, *key[2])))
      shared = "NNX keeps a variable that layers share once: leave it out with --nnx_aux=drop."
      remedy = shared if key[0] == leaf_roles.NNX_AUX else layer_stacks.REMEDY
      raise layer_stacks.unlike(path, f"a leaf in every layer, as {like}", "none", remedy)
    held = layer[key][0]
    if not held.is_like(first):
      raise layer_stacks.unlike(path_of(held.variable), f"{first}, as {like} has", str(held))
  return [layer[key] for layer in layers]


def check_one_role(variables: Iterable[Variable], schedule: Schedule, path_of: layer_stacks.PathOf):
  """Checks that across the layers of a group, a leaf is either always a Param or never.

  Raises:
    LayerStackError: naming a leaf whose counterpart in another layer is of another kind.
  """
  prefixes = {stack.prefix: stack for stack in schedule}
  first_of = {}
  for variable in variables:
    stack = _stack_of(variable, prefixes)
    if stack is None or variable.subtree is not None:
      continue
    first = first_of.setdefault((stack.group, variable.path[len(stack.prefix) :]), variable)
    kinds = {first.collection, variable.collection}
    if len(kinds) > 1 and leaf_roles.NNX_AUX in kinds:
      wanted = f"{first.collection}, as {'/'.join(path_of(first))} is"
      raise layer_stacks.unlike(path_of(variable), wanted, variable.collection)


def refuse_blocks(arranged: Iterable[Arranged], paths: Mapping[leaf_roles.Role, Path]):
  """Refuses to stack the decoder's layers plainly where MaxText would scan them in blocks, or in chunks.

  Raises:
    ConfigError: naming the first leaf that shows it, by its path in `paths`.
  """
  for item in arranged:
    if item.move is not None and item.move.stacked and item.variable.path[0] == "decoder":
      for mark in decoder_families.BLOCK_MARKS.keys() & set(item.variable.path):
        raise decoder_families.unknown_blocks(paths[item.move.sources[0]], mark)


def refuse_unproven(source: Schedule, decoder: decoder_families.Decoder):
  """Refuses a source whose layers are arranged as in neither of the two models that prove the decoder's order.

  Raises:
    ConfigError: they are.
  """
  if decoder.proven and {stack for stack in source if stack.group[0] == "decoder"} not in map(set, decoder.proven):
    found = "layers as the installed MaxText's models have them in neither arrangement"
    raise decoder_families.unknown_order(("decoder",), found, decoder)


def refuse_new_arrangement(
    arranged: Iterable[Arranged], paths: Mapping[leaf_roles.Role, Path], decoder: decoder_families.Decoder
):
  """Refuses to rearrange layers whose order the config does not determine, or to leave them outside its pipeline.

  Raises:
    ConfigError: naming the first such leaf by its path in `paths`.
  """
  arranged = list(arranged)
  if decoder.pipeline and not any(layer_names.is_of_pipeline(item.variable.path) for item in arranged):
    raise decoder_families.unknown_order(("decoder", "pipeline_module"), "layers outside a pipeline", decoder)
  for item in arranged:
    if item.move is not None and (item.move.stacked or item.move.taken):
      what = "layers to stack" if item.move.stacked else "layers to unstack"
      raise decoder_families.unknown_order(paths[item.move.sources[0]], what, decoder)
