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

"""Schedules: which leaves hold which layers of the model, as `LayerStack` records.

A schedule is a tuple of stacks that holds each layer of each group exactly once. Every arrangement is one: scanned layers
are a stack with a layer axis, blocks that repeat are a stack for each position in the block, and layers that are not
scanned are stacks without an axis.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
import dataclasses
import itertools
import math
import re

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path
Variable = leaf_roles.Variable
PathOf = Callable[[Variable], Path]

FLAT, NESTED = "flat", "nested"  # `layers_<n>` and `layers/<n>`.
_MOST_LAYERS = 100_000  # A shape that says more is damaged; listing its layers would take all memory.


@dataclasses.dataclass(frozen=True)
class LayerStack:
  """Layers that are held by the leaves below one prefix.

  Attributes:
    prefix: the path above a layer's own variables, inside the model.
    group: the layers that are numbered together: `("decoder", "layers")`, `("decoder", "moe_layers")`.
    first: the number in the group of the layer at index 0 of every axis.
    strides: for each layer axis, how many layers further the next index is.
    sizes: the length of each layer axis.
  """

  prefix: Path
  group: Path
  first: int
  strides: tuple[int, ...] = ()
  sizes: tuple[int, ...] = ()

  @property
  def is_scanned(self) -> bool:
    """Whether only a scanned model has this stack; what is left over after its blocks may have no layer axis."""
    name = self.prefix[1] if len(self.prefix) > 1 else ""
    return bool(self.sizes) or name == "layers_remainder" or layer_names.LINEN_REMAINDER.fullmatch(name) is not None

  def layer(self, index: tuple[int, ...]) -> int:
    """The number in the group of the layer at `index`."""
    return self.first + sum(stride * i for stride, i in zip(self.strides, index))

  def indices(self) -> Iterator[tuple[int, ...]]:
    """All indices along the layer axes, in C order."""
    return itertools.product(*map(range, self.sizes))

  def layers(self) -> Iterator[int]:
    """The numbers in the group of all its layers, in C order of their indices."""
    return map(self.layer, self.indices())

  def axes(self, variable: Variable, rank: int, param_scan_axis: int) -> tuple[int, ...]:
    """The layer axes of a leaf whose layers have this rank.

    A Param has them at `param_scan_axis`, or last where its rank is too small; every other variable has them first, as
    MaxText's `nnx_scan` and Linen's `nn.scan` put them.
    """
    start = min(param_scan_axis, rank) if variable.collection == leaf_roles.PARAMS else 0
    return tuple(range(start, start + len(self.sizes)))


Schedule = tuple[LayerStack, ...]


def plain(group: Path, count: int) -> Schedule:
  """All layers of a group in one stack."""
  return (LayerStack(group, group, 0, (1,), (count,)),)


def unscanned(group: Path, count: int, naming: str) -> Schedule:
  """Each layer of a group for itself."""
  component, name = group
  prefix = lambda n: (component, f"{name}_{n}") if naming == FLAT else (component, name, str(n))
  return tuple(LayerStack(prefix(n), group, n) for n in range(count))


def layer_counts(schedule: Schedule) -> dict[Path, int]:
  """The number of layers of each group."""
  counts = {}
  for stack in schedule:
    last = stack.layer(tuple(size - 1 for size in stack.sizes))
    counts[stack.group] = max(counts.get(stack.group, 0), last + 1)
  return counts


def is_scanned(schedule: Schedule, paths: Iterable[Path]) -> bool | None:
  """What MaxText's `scan_layers` says of a model of this schedule; None if it has no layers that could be scanned."""
  if any(stack.is_scanned for stack in schedule) or any(map(layer_names.has_unknown_order, paths)):
    return True
  return False if schedule else None


def find(variables: Mapping[Variable, abstract_state.Leaf], param_scan_axis: int, path_of: PathOf) -> Schedule:
  """The schedule that the names and shapes of a model's variables tell.

  Args:
    variables: the variables and their leaves.
    param_scan_axis: the layer axis of scanned Params.
    path_of: the path that messages give for a variable.

  Raises:
    LayerStackError: a layer is missing, or leaves disagree on the number of layers.
    PathCollisionError: the layers of a group are written in two ways.
  """
  prefixes = {}  # The stacks' prefixes, each with the variables below it.
  for variable in variables:
    if prefix := layer_names.prefix_of(variable.path):
      prefixes.setdefault(prefix, []).append(variable)
  for parent in [prefix for prefix in prefixes if any(other[:-1] == prefix for other in prefixes)]:
    # RNG state that a block's children share stands beside them; anything else would be a second way of writing.
    if any(variable.collection == leaf_roles.PARAMS for variable in prefixes[parent]):
      raise _two_ways(path_of(prefixes[parent][0]), parent)
    del prefixes[parent]
  sizes = {}
  for prefix, below in prefixes.items():
    sizes[prefix] = _sizes(below, variables, layer_names.axis_count(prefix), param_scan_axis, path_of)
  schedule = tuple(sorted(_stacks(sizes), key=lambda stack: (stack.group, stack.first)))
  check(schedule, lambda prefix: _unboxed(path_of(dataclasses.replace(next(iter(variables)), path=prefix, subtree=None))))
  return schedule


def check(schedule: Schedule, path_of: Callable[[Path], Path]):
  """Checks that each layer of each group is held exactly once.

  Raises:
    LayerStackError: a layer is missing.
    PathCollisionError: a layer is held twice.
  """
  held = {}
  for stack in schedule:
    for index in stack.indices():
      other = held.setdefault((stack.group, stack.layer(index)), stack)
      if other is not stack:
        raise _two_ways(path_of(stack.prefix), stack.group)
  for group, count in layer_counts(schedule).items():
    for n in range(count):
      if (group, n) not in held:
        some = next(stack for stack in schedule if stack.group == group)
        raise errors.LayerStackError(
            path_of((*some.prefix[:-1], re.sub(r"\d+$", str(n), some.prefix[-1]))),
            f"the layers 0 to {count - 1} of {'/'.join(group)}",
            f"no layer {n}",
            "The checkpoint is damaged, or its layers are numbered in a way that needs the model's config.",
        )


def _unboxed(path: Path) -> Path:
  """The path of a module: boxes stand around leaves alone."""
  return path[:-1] if path[-1] == leaf_roles.VALUE else path


def refuse_unknown_order(variables: Iterable[Variable], path_of: PathOf):
  """Refuses models whose layers stand in an order that the tree does not tell.

  Raises:
    LayerStackError: naming a variable of such a layer.
  """
  for variable in variables:
    if layer_names.has_unknown_order(variable.path):
      raise errors.LayerStackError(
          path_of(variable),
          "layers whose order is known",
          "those of a pipeline, or of engram's chunks",
          "Keep the arrangement: leave out --scan_layers.",
      )


def _sizes(below, variables, axis_count, param_scan_axis, path_of) -> tuple[int, ...]:
  """The lengths of the layer axes, on which all leaves below a prefix agree."""
  stack, sizes, first = LayerStack((), (), 0, (0,) * axis_count, (0,) * axis_count), None, None
  for variable in below if axis_count else ():
    leaf = variables[variable]
    if abstract_state.is_empty(leaf):
      continue
    shape = tuple(getattr(leaf, "shape", ()))
    if len(shape) < axis_count:
      raise unlike(path_of(variable), f"{axis_count} layer axes", f"shape {shape}")
    axes = stack.axes(variable, len(shape) - axis_count, param_scan_axis)
    found = tuple(shape[axis] for axis in axes)
    if sizes is None:
      sizes, first = found, variable
      if math.prod(sizes) > _MOST_LAYERS:
        raise unlike(path_of(variable), f"at most {_MOST_LAYERS} layers", str(math.prod(sizes)))
    elif found != sizes:
      numbers = lambda values: " x ".join(map(str, values))
      wanted = f"{numbers(sizes)} layers, as {'/'.join(path_of(first))} has on its layer axis"
      raise unlike(path_of(variable), wanted, f"{numbers(found)} on axis {numbers(axes)} of {shape}")
  return sizes if sizes is not None else ()


@dataclasses.dataclass(frozen=True)
class _Numbering:
  """How the layers of a component are numbered where they are written in blocks, or by DeepSeek's old names.

  Attributes:
    dense: the number of layers under DeepSeek's old names, which come before those of `layers/<n>`.
    before: the number of layers before the blocks.
    period: the number of layers in a block.
    after: the number of layers before the remainder, which comes last.
  """

  dense: int
  before: int
  period: int
  after: int


def _stacks(sizes: Mapping[Path, tuple[int, ...]]) -> Iterator[LayerStack]:
  """The stacks of these prefixes, whose axes have these lengths."""
  for component in dict.fromkeys(prefix[0] for prefix in sizes):
    of = {prefix: size for prefix, size in sizes.items() if prefix[0] == component}
    blocks = {prefix: size for prefix, size in of.items() if len(prefix) > 2 and size and prefix[1] != "layers_remainder"}
    before = sum(
        layer_names.FLAT.sub(r"\1", prefix[1]) == "layers" and not of[prefix] for prefix in of if len(prefix) == 2
    )
    period = _period(blocks)
    after = before * bool(blocks) + period * max((size[0] for size in blocks.values()), default=0)
    dense = sum(layer_names.OLD_DENSE.fullmatch(prefix[1]) is not None for prefix in of)
    for prefix, size in of.items():
      yield _stack(prefix, size, _Numbering(dense, before, period, after))


def _stack(prefix: Path, size: tuple[int, ...], numbering: _Numbering) -> LayerStack:
  """The stack of one prefix, whose layer axes have these lengths."""
  component, name, *child = prefix
  layers = (component, "layers")
  if match := layer_names.OLD_DENSE.fullmatch(name):
    return LayerStack(prefix, (component, "dense_layers"), int(match[1]))
  if match := layer_names.LINEN_REMAINDER.fullmatch(name):
    return LayerStack(prefix, layers, numbering.after + int(match[1]))
  if match := layer_names.FLAT.fullmatch(name):
    return LayerStack(prefix, (component, match[1]), int(match[2]))
  if not child:
    return LayerStack(prefix, (component, name), 0, (1,), size)
  if layer_names.INTEGER.fullmatch(child[0]):
    is_moe = numbering.dense and name == "layers"
    group = (component, "moe_layers" if is_moe else name)
    return LayerStack(prefix, group, int(child[0]) - (numbering.dense if is_moe else 0))
  return _block_stack(prefix, size, layers, numbering)


def _block_stack(prefix, size, layers, numbering) -> LayerStack:
  """The stack of a position in the blocks, or in the remainder after them."""
  _, name, child = prefix
  if name == "layers_remainder":
    position = 0 if child == "local_layers" else int(child.rpartition("_")[2])
    return LayerStack(prefix, layers, numbering.after + position, (1,) * len(size), size)
  if child == "local_layers":
    return LayerStack(prefix, layers, numbering.before, (numbering.period, 1), size)
  position = numbering.period - 1 if child == "global_layer" else int(child.rpartition("_")[2])
  return LayerStack(prefix, layers, numbering.before + position, (numbering.period,), size)


def _period(blocks) -> int:
  """The number of layers in a block: its positions, or its local layers and the global one."""
  local = [size[1] for prefix, size in blocks.items() if prefix[2] == "local_layers"]
  return local[0] + 1 if local else sum(layer_names.INTEGER.fullmatch(prefix[2]) is None for prefix in blocks)


def _two_ways(path, group) -> errors.PathCollisionError:
  return errors.PathCollisionError(
      path, f"the layers of {'/'.join(group)} written in one way", "a second one", "Remove the leaves that do not belong."
  )


REMEDY = "Layers that differ cannot be stacked or unstacked: check the checkpoint and --param_scan_axis."


def unlike(path, expected, found, remedy=REMEDY) -> errors.LayerStackError:
  """The refusal of layers that are not alike."""
  return errors.LayerStackError(path, expected, found, remedy)
