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

"""Layer stacks: which leaves belong to the layers of a stack, and how the stack is written.

MaxText writes a stack of layers in one of three arrangements:

  scanned   `decoder/layers/W`, one leaf for all layers, with a layer axis
  flat      `decoder/layers_<n>/W`, a leaf for each layer: unscanned Linen, and NNX since MaxText 0.2.4
  nested    `decoder/layers/<n>/W`, the same under integer keys: unscanned NNX up to MaxText 0.2.3

and likewise `dense_layers`, `moe_layers` and any other name that ends in `layers`, in each component of the model.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import re

import jax

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter import plan
from maxtext.checkpoint_conversion.linen_nnx_converter import roles

Path = abstract_state.Path
Variable = roles.Variable
PathOf = Callable[[Variable], Path]

SCANNED, FLAT, NESTED = "scanned", "flat", "nested"

_STACK_NAME = re.compile(r"(?:.*_)?layers")
_FLAT_NAME = re.compile(r"((?:.*_)?layers)_(0|[1-9]\d*)")
_INTEGER = re.compile(r"0|[1-9]\d*")
_UNSTACKED_COMPONENTS = frozenset({"vision_encoder", "audio_encoder"})  # MaxText never scans its towers.
# Children of a scanned stack that hold only some of its layers, in blocks: Gemma 3, Llama 4, Qwen3-Next and others.
_BLOCK_CHILD = re.compile(r"layers?_\d+|local_layers|global_layer")
# Modules whose layers are stacked in a way that their names do not tell: Gemma 3 and 4, DeepSeek 4, pipelines.
_BLOCK_MODULE = re.compile(r"layers_remainder|scanned_blocks|pipeline_module|Gemma4DecoderLayerToLinen_\d+")

_REMEDY = "Layers that differ cannot be stacked or unstacked: check the checkpoint and --param_scan_axis."


@dataclasses.dataclass(frozen=True)
class LayerPath:
  """A variable's path as a place in a layer stack.

  Attributes:
    stack: component and name of the stack: `("decoder", "layers")`.
    arrangement: how the stack is written: `scanned`, `flat` or `nested`.
    index: the layer, or None where the leaf holds all of them.
    rest: the path inside the layer.
  """

  stack: Path
  arrangement: str
  index: int | None
  rest: Path

  def path(self) -> Path:
    """The path that this place is written as."""
    component, name = self.stack
    if self.arrangement == SCANNED:
      return (component, name, *self.rest)
    if self.arrangement == FLAT:
      return (component, f"{name}_{self.index}", *self.rest)
    return (component, name, str(self.index), *self.rest)


@dataclasses.dataclass(frozen=True)
class Arranged:
  """A variable of the target: what it is made of, and its leaf. The move of an empty node is None."""

  variable: Variable
  move: plan.Move | None
  leaf: abstract_state.Leaf


def parse(path: Path) -> LayerPath | None:
  """The place of a variable's path in a layer stack, or None if it is in none."""
  if len(path) < 3 or path[0] in _UNSTACKED_COMPONENTS:
    return None
  if match := _FLAT_NAME.fullmatch(path[1]):
    return LayerPath((path[0], match[1]), FLAT, int(match[2]), path[2:])
  if not _STACK_NAME.fullmatch(path[1]):
    return None
  if len(path) > 3 and _INTEGER.fullmatch(path[2]):
    return LayerPath(path[:2], NESTED, int(path[2]), path[3:])
  return LayerPath(path[:2], SCANNED, None, path[2:])


def layer_axis(variable: Variable, rank: int, param_scan_axis: int) -> int:
  """The layer axis of a scanned leaf whose layers have this rank.

  A Param has it at `param_scan_axis`, or last where its rank is too small; every other variable has it first, as
  MaxText's `nnx_scan` and Linen's `nn.scan` put them.
  """
  return min(param_scan_axis, rank) if variable.collection == layouts.PARAMS else 0


def arrange(
    variables: Mapping[Variable, abstract_state.Leaf],
    *,
    scan_layers: bool | None,
    unscanned: str,
    param_scan_axis: int,
    path_of: PathOf,
) -> list[Arranged]:
  """Arranges the layer stacks among `variables` anew.

  Args:
    variables: the source's variables and their leaves.
    scan_layers: whether the target's layers are scanned; None keeps what each stack is.
    unscanned: `flat` or `nested`, how the target writes layers that are not scanned.
    param_scan_axis: the layer axis of scanned Params, in the source and in the target.
    path_of: the path in the source that messages give for a variable.

  Raises:
    LayerStackError: a layer is missing, layers are not alike, or the stack's blocks cannot be told from its names.
    PathCollisionError: one stack is written in two arrangements.
  """
  places = {variable: parse(variable.path) for variable in variables}
  _check_arrangements(places, path_of)
  _check_layers(places, path_of)
  _check_one_role(places, path_of)
  if scan_layers is False:
    _refuse_blocks(places, path_of)
  sizes = _stack_sizes(variables, places, param_scan_axis, path_of) if scan_layers is False else {}
  arranged, layers = [], {}
  for variable, place in places.items():
    leaf = variables[variable]
    if place is None or (place.arrangement == SCANNED and scan_layers is not False):
      arranged.append(_copied(variable, variable.path, leaf))
    elif place.arrangement == SCANNED:
      arranged += _sliced(variable, place, leaf, unscanned, sizes[place.stack], param_scan_axis)
    elif not scan_layers:
      path = dataclasses.replace(place, arrangement=unscanned).path()
      arranged.append(_copied(variable, path, leaf))
    else:
      key = dataclasses.replace(variable, path=dataclasses.replace(place, arrangement=SCANNED, index=None).path())
      layers.setdefault(key, {})[place.index] = variable
  counts = _layer_counts(places)
  for stacked, by_index in layers.items():
    arranged.append(_stacked(stacked, by_index, variables, places, counts, param_scan_axis, path_of))
  return arranged


def is_scanned(paths: Iterable[Path]) -> bool | None:
  """What MaxText's `scan_layers` says of a model with variables of these paths; None if it has no layer stack."""
  scanned = None
  for path in paths:
    place = parse(path)
    if (place is not None and place.arrangement == SCANNED) or any(map(_BLOCK_MODULE.fullmatch, path[1:2])):
      return True
    scanned = False if place is not None else scanned
  return scanned


def _copied(variable, path, leaf) -> Arranged:
  move = None if abstract_state.is_empty(leaf) else plan.Copy(variable)
  return Arranged(dataclasses.replace(variable, path=path), move, leaf)


def _sliced(variable, place, leaf, unscanned, size, param_scan_axis) -> Iterator[Arranged]:
  """The layers of a scanned leaf."""
  axis = None if abstract_state.is_empty(leaf) else layer_axis(variable, len(leaf.shape) - 1, param_scan_axis)
  for index in range(size):
    path = dataclasses.replace(place, arrangement=unscanned, index=index).path()
    layer = dataclasses.replace(variable, path=path)
    if axis is None:
      yield Arranged(layer, None, leaf)
    else:
      move = plan.Slice(variable, axis, index)
      yield Arranged(layer, move, jax.ShapeDtypeStruct(plan.result_shape(move, leaf.shape), leaf.dtype))


def _stacked(stacked, by_index, variables, places, counts, param_scan_axis, path_of) -> Arranged:
  """The scanned leaf of these layers; every layer must have it, alike."""
  first = by_index[min(by_index)]
  for index in range(counts[places[first].stack]):
    if index not in by_index:
      path = dataclasses.replace(places[first], index=index).path()
      missing = path_of(dataclasses.replace(first, path=path))
      is_aux = stacked.collection == roles.NNX_AUX
      remedy = "NNX keeps a variable that layers share once: leave it out with --nnx_aux=drop." if is_aux else _REMEDY
      raise _unlike(missing, f"a leaf in every layer, as {'/'.join(path_of(first))}", "none", remedy)
    _check_alike(first, by_index[index], variables, path_of)
  leaf = variables[first]
  if abstract_state.is_empty(leaf):
    return Arranged(stacked, None, leaf)
  axis = layer_axis(stacked, len(leaf.shape), param_scan_axis)
  move = plan.Stack(tuple(by_index[index] for index in sorted(by_index)), axis)
  return Arranged(stacked, move, jax.ShapeDtypeStruct(plan.result_shape(move, leaf.shape), leaf.dtype))


def _check_alike(first, other, variables, path_of):
  """Two layers' leaves have one shape and dtype, or are the same empty node."""
  found, wanted = plan.described(variables[other]), plan.described(variables[first])
  if found != wanted:
    raise _unlike(path_of(other), f"{wanted}, as {'/'.join(path_of(first))} has", found)


def _check_arrangements(places, path_of):
  """A stack is written in one arrangement."""
  first_of = {}
  for variable, place in places.items():
    if place is None:
      continue
    first = first_of.setdefault(place.stack, variable)
    if places[first].arrangement != place.arrangement:
      raise errors.PathCollisionError(
          path_of(variable),
          expected=f"the layers of {'/'.join(place.stack)} written in one way, {places[first].arrangement} as "
          f"{'/'.join(path_of(first))} is",
          found=place.arrangement,
          remedy="Remove the leaves that do not belong.",
      )


def _check_layers(places, path_of):
  """The layers of an unscanned stack are 0, 1, 2, … without a gap."""
  for stack, count in _layer_counts(places).items():
    present = {place.index: variable for variable, place in places.items() if place is not None and place.stack == stack}
    for index in range(count):
      if index not in present:
        last = present[max(present)]
        path = dataclasses.replace(places[last], index=index, rest=()).path()
        raise errors.LayerStackError(
            path_of(dataclasses.replace(last, path=path)),
            expected=f"the layers 0 to {count - 1} of {'/'.join(stack)}",
            found="none of this number",
            remedy="The checkpoint is damaged, or its layers are numbered in a way that needs the model's config.",
        )


def _check_one_role(places, path_of):
  """Across the layers of a stack, the same leaf is always a Param or never."""
  collections = {}
  for variable, place in places.items():
    if place is None or variable.subtree is not None:
      continue
    first = collections.setdefault((place.stack, place.rest), variable)
    kinds = {first.collection, variable.collection}
    if len(kinds) > 1 and layouts.NNX_AUX in kinds:
      raise _unlike(path_of(variable), f"{first.collection}, as {'/'.join(path_of(first))} is", variable.collection)


def _layer_counts(places) -> dict[Path, int]:
  """The number of layers of each unscanned stack."""
  counts = {}
  for place in places.values():
    if place is not None and place.index is not None:
      counts[place.stack] = max(counts.get(place.stack, 0), place.index + 1)
  return counts


def _stack_sizes(variables, places, param_scan_axis, path_of) -> dict[Path, int]:
  """The number of layers of each scanned stack, on which all its leaves agree."""
  sizes, first_of = {}, {}
  for variable, place in places.items():
    leaf = variables[variable]
    if place is None or place.arrangement != SCANNED or abstract_state.is_empty(leaf):
      continue
    if not getattr(leaf, "shape", ()):
      raise _unlike(path_of(variable), "a layer axis", "a scalar")
    axis = layer_axis(variable, len(leaf.shape) - 1, param_scan_axis)
    first = first_of.setdefault(place.stack, variable)
    if sizes.setdefault(place.stack, leaf.shape[axis]) != leaf.shape[axis]:
      found = f"{leaf.shape[axis]} on axis {axis} of {tuple(leaf.shape)}"
      wanted = f"{sizes[place.stack]} layers, as {'/'.join(path_of(first))} has on its layer axis"
      raise _unlike(path_of(variable), wanted, found)
  return sizes


def _refuse_blocks(places, path_of):
  """Without the model's config, layers scanned in blocks cannot be unstacked."""
  for variable, place in places.items():
    in_block = place is not None and place.arrangement == SCANNED and _BLOCK_CHILD.fullmatch(place.rest[0])
    if in_block or any(_BLOCK_MODULE.fullmatch(key) for key in variable.path[1:2]):
      raise errors.LayerStackError(
          path_of(variable),
          expected="a plain stack of layers",
          found="layers scanned in blocks, whose order the names do not tell",
          remedy="Keep the layers scanned: leave out --scan_layers=False.",
      )


def _unlike(path, expected, found, remedy=_REMEDY) -> errors.LayerStackError:
  return errors.LayerStackError(path, expected=expected, found=found, remedy=remedy)
