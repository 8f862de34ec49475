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

"""Arranging layers: from one schedule into another."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses

import jax

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import families
from maxtext.checkpoint_conversion.linen_nnx_converter import plan
from maxtext.checkpoint_conversion.linen_nnx_converter import roles
from maxtext.checkpoint_conversion.linen_nnx_converter import schedules

Path = abstract_state.Path
Variable = roles.Variable
LayerStack = schedules.LayerStack
Schedule = schedules.Schedule
CollectionOf = Callable[[Variable], str]


@dataclasses.dataclass(frozen=True)
class Arranged:
  """A variable of the target: what it is made of, and its leaf.

  The sources of the move are variables, not yet their paths. The move of an empty node is None.
  """

  variable: Variable
  move: plan.Move | None
  leaf: abstract_state.Leaf


@dataclasses.dataclass(frozen=True)
class _Piece:
  """One layer's leaf: where it stands in the source.

  Attributes:
    variable: the source variable.
    stack: the stack that it belongs to.
    index: the layer's index along the layer axes.
  """

  variable: Variable
  stack: LayerStack
  index: tuple[int, ...]


# What a layer's leaf is, apart from the layer: its collection, its optimizer subtree, its path inside the layer.
_Key = tuple[str, Path | None, Path]


def target_schedule(source: Schedule, scan_layers: bool | None, naming: str, model: Schedule | None = None) -> Schedule:
  """The schedule of the target.

  Where no model gives it, layers that are scanned already stay as they are for `scan_layers`, blocks among them, and
  others are stacked plainly.

  Args:
    source: the schedule of the source.
    scan_layers: whether the target's layers are scanned; None keeps what each group is.
    naming: how to write layers that are not scanned, `flat` or `nested`.
    model: the schedule that the model's config gives for its decoder.

  Raises:
    LayerStackError: the source has another number of layers than the model.
  """
  counts, wanted = schedules.layer_counts(source), schedules.layer_counts(model or ())
  for group in dict.fromkeys((*wanted, *(group for group in counts if model and group[0] == "decoder"))):
    if counts.get(group, 0) != wanted.get(group, 0):
      raise errors.LayerStackError(
          group,
          expected=f"{wanted.get(group, 0)} layers, as the config says",
          found=f"{counts.get(group, 0)} in the checkpoint",
          remedy="Give the config of the model that this is a checkpoint of.",
      )
  target = list(model or ())
  for group, count in counts.items():
    if group in wanted:
      continue
    stacks = [stack for stack in source if stack.group == group]
    is_scanned = any(stack.is_scanned for stack in stacks)
    if is_scanned and scan_layers is not False:
      target += stacks
    else:
      target += schedules.plain(group, count) if scan_layers else schedules.unscanned(group, count, naming)
  return tuple(target)


def arrange(
    variables: Mapping[Variable, abstract_state.Leaf],
    source: Schedule,
    target: Schedule,
    *,
    param_scan_axis: int,
    path_of: schedules.PathOf,
    collection_of: CollectionOf = lambda variable: variable.collection,
) -> list[Arranged]:
  """Arranges the layers of `variables` anew. Variables outside layers are copied.

  Args:
    variables: the source's variables and their leaves.
    source: their schedule.
    target: the schedule to write; it holds the same layers.
    param_scan_axis: the layer axis of scanned Params, in the source and in the target.
    path_of: the path that messages give for a variable.
    collection_of: the collection of a variable in the target.

  Raises:
    LayerStackError: layers to be stacked are not alike, or the way is too far for one conversion.
  """
  prefixes = {stack.prefix: stack for stack in source}
  arranged, layers = [], {}
  for variable, leaf in variables.items():
    stack = _stack_of(variable, prefixes)
    if stack is None:
      moved = dataclasses.replace(variable, collection=collection_of(variable))
      arranged.append(Arranged(moved, None if abstract_state.is_empty(leaf) else plan.Copy(variable), leaf))
      continue
    key = collection_of(variable), variable.subtree, variable.path[len(stack.prefix) :]
    for index in stack.indices():
      layers.setdefault((stack.group, stack.layer(index)), {})[key] = _Piece(variable, stack, index)
  maker = _Maker(variables, layers, param_scan_axis, path_of)
  for stack in target:
    arranged += maker.leaves(stack)
  return arranged


def _stack_of(variable: Variable, prefixes: Mapping[Path, LayerStack]) -> LayerStack | None:
  """The stack below whose prefix, of three keys or of two, the variable stands."""
  return prefixes.get(variable.path[:3]) or prefixes.get(variable.path[:2])


class _Maker:
  """Makes the target's leaves of the layers' leaves."""

  def __init__(self, variables, layers, param_scan_axis, path_of):
    self._variables, self._layers = variables, layers
    self._param_scan_axis, self._path_of = param_scan_axis, path_of

  def leaves(self, stack: LayerStack) -> Iterable[Arranged]:
    """The leaves of one stack of the target: all that its layers have, which they must have alike."""
    layers = [self._layers[stack.group, stack.layer(index)] for index in stack.indices()]
    for key in dict.fromkeys(key for layer in layers for key in layer):
      collection, subtree, rest = key
      pieces = [self._piece(layer, layers, key, stack, index) for layer, index in zip(layers, stack.indices())]
      variable = Variable(collection, (*stack.prefix, *rest), subtree)
      if schedules.prefix_of(variable.path) != stack.prefix:
        path, remedy = self._path_of(pieces[0].variable), "Keep the arrangement: leave out --scan_layers."
        raise schedules.unlike(path, f"a name that {'/'.join(stack.prefix)} can have below it", "a layer's", remedy)
      leaf = self._variables[pieces[0].variable]
      if abstract_state.is_empty(leaf):
        yield Arranged(variable, None, leaf)
        continue
      shape = self._layer_shape(pieces[0])
      axes = stack.axes(variable, len(shape), self._param_scan_axis)
      move = self._move(pieces, stack, axes)
      if not isinstance(move, plan.Copy):
        leaf = jax.ShapeDtypeStruct(plan.insert(shape, axes, stack.sizes), leaf.dtype)
      yield Arranged(variable, move, leaf)

  def _piece(self, layer, layers, key, stack, index) -> _Piece:
    """A layer's leaf, which must be like the first one's."""
    first = next(other[key] for other in layers if key in other)
    if key not in layer:
      self._refuse_missing(first, stack.layer(index), key)
    piece = layer[key]
    wanted, found = self._described(first), self._described(piece)
    if wanted != found:
      like = "/".join(self._path_of(first.variable))
      raise schedules.unlike(self._path_of(piece.variable), f"{wanted}, as {like} has", found)
    return piece

  def _refuse_missing(self, first, number, key):
    holder = next(iter(self._layers[first.stack.group, number].values()))
    path = self._path_of(dataclasses.replace(first.variable, path=(*holder.stack.prefix, *key[2])))
    shared = "NNX keeps a variable that layers share once: leave it out with --nnx_aux=drop."
    remedy = shared if key[0] == roles.NNX_AUX else schedules.REMEDY
    raise schedules.unlike(path, f"a leaf in every layer, as {'/'.join(self._path_of(first.variable))}", "none", remedy)

  def _axes(self, piece) -> tuple[int, ...]:
    """The layer axes of a piece's source leaf."""
    rank = len(getattr(self._variables[piece.variable], "shape", ())) - len(piece.stack.sizes)
    return piece.stack.axes(piece.variable, rank, self._param_scan_axis)

  def _layer_shape(self, piece) -> tuple[int, ...]:
    return plan.remove(getattr(self._variables[piece.variable], "shape", ()), self._axes(piece))

  def _described(self, piece) -> str:
    leaf = self._variables[piece.variable]
    return f"{self._layer_shape(piece)} {leaf.dtype}" if abstract_state.is_array(leaf) else repr(leaf)

  def _move(self, pieces, stack, axes) -> plan.Move:
    """How the pieces, in C order, make a leaf of the stack."""
    sources = list(dict.fromkeys(piece.variable for piece in pieces))
    indices = [piece.index for piece in pieces]
    own = self._axes(pieces[0])
    if len(sources) == 1 and indices == list(pieces[0].stack.indices()) and (pieces[0].stack.sizes == stack.sizes):
      rank = len(self._variables[sources[0]].shape) - len(axes)
      order = plan.insert(plan.remove(range(rank + len(axes)), own), axes, own)
      return plan.Copy(sources[0]) if own == axes else plan.Transpose(sources[0], order)
    if not stack.sizes:
      return plan.Slice(sources[0], own, indices[0])
    if not any(indices):
      return plan.Stack(tuple(sources), axes, stack.sizes)
    return self._block_move(pieces, stack, axes, sources, indices, own)

  def _block_move(self, pieces, stack, axes, sources, indices, own) -> plan.Move:
    """Between blocks written by position and blocks whose local layers are one leaf: one axis is put in or taken out."""
    if len(stack.sizes) == 2 and len(own) == 1:
      by_position = [sources[j] for j in range(stack.sizes[1])] if len(sources) == stack.sizes[1] else []
      if [p.variable for p in pieces] == by_position * stack.sizes[0] and indices == [
          (b,) for b in range(stack.sizes[0]) for _ in by_position
      ]:
        return plan.Stack(tuple(by_position), axes[1:], stack.sizes[1:])
    if len(stack.sizes) == 1 and len(own) == 2 and len(sources) == 1:
      positions = {index[1] for index in indices}
      if len(positions) == 1 and [index[0] for index in indices] == list(range(pieces[0].stack.sizes[0])):
        return plan.Slice(sources[0], own[1:], (positions.pop(),))
    raise schedules.unlike(
        self._path_of(pieces[0].variable),
        f"layers in an order that {'/'.join(stack.prefix)} can take over",
        "another one",
        "Convert with --scan_layers=False first, then stack the result.",
    )


def check_one_role(variables: Iterable[Variable], schedule: Schedule, path_of: schedules.PathOf):
  """Across the layers of a group, the same leaf is always a Param or never.

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
    if len(kinds) > 1 and roles.NNX_AUX in kinds:
      wanted = f"{first.collection}, as {'/'.join(path_of(first))} is"
      raise schedules.unlike(path_of(variable), wanted, variable.collection)


def refuse_blocks(arranged: Iterable[Arranged], paths: Mapping[roles.Role, Path]):
  """Refuses to stack the decoder's layers plainly where MaxText would scan them in blocks, or in chunks.

  Raises:
    ConfigError: naming the first leaf that tells, by its path among `paths`.
  """
  for item in arranged:
    if isinstance(item.move, plan.Stack) and item.variable.path[0] == "decoder":
      for mark in families.BLOCK_MARKS.keys() & set(item.variable.path):
        raise families.unknown_blocks(paths[item.move.sources[0]], mark)


def refuse_new_arrangement(arranged: Iterable[Arranged], paths: Mapping[roles.Role, Path], decoder: families.Decoder):
  """Refuses to stack or unstack layers whose order the model's config does not tell.

  Raises:
    ConfigError: naming the first leaf, by its path among `paths`, that would be.
  """
  for item in arranged:
    if isinstance(item.move, plan.Stack):
      raise families.unknown_order(paths[item.move.sources[0]], "layers to stack", decoder)
    if isinstance(item.move, plan.Slice):
      raise families.unknown_order(paths[item.move.source], "layers to unstack", decoder)
