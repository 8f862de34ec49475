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
are a stack with a layer axis, repeating blocks are one stack per position in the block, and unscanned layers are stacks
without an axis.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools
import re

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path
Variable = leaf_roles.Variable
PathOf = Callable[[Variable], Path]

FLAT, NESTED = "flat", "nested"  # `layers_<n>` and `layers/<n>`.


@dataclasses.dataclass(frozen=True)
class LayerStack:
  """The layers held by the leaves below one prefix.

  Attributes:
    prefix: the path above a layer's own variables, inside the model.
    group: the layers that are numbered together: `("decoder", "layers")`, `("decoder", "moe_layers")`.
    first: the number, in the group, of the layer at index 0 of every axis.
    strides: for each layer axis, by how many layers one index advances.
    sizes: the length of each layer axis.
    leading: how many layer axes, those of a pipeline, come before all other axes.
  """

  prefix: Path
  group: Path
  first: int
  strides: tuple[int, ...] = ()
  sizes: tuple[int, ...] = ()
  leading: int = 0

  @property
  def is_piped(self) -> bool:
    """Whether its layers are in a pipeline."""
    return layer_names.is_piped(self.prefix)

  @property
  def is_scanned(self) -> bool:
    """Whether only a scanned model has this stack; layers left over after blocks may have no layer axis."""
    name = self.prefix[1] if len(self.prefix) > 1 else ""
    is_one_layer = layer_names.LINEN_REMAINDER.fullmatch(name) or layer_names.ENGRAM.fullmatch(name)
    return bool(self.sizes) or name == "layers_remainder" or is_one_layer is not None

  def layer(self, index: tuple[int, ...]) -> int:
    """The number, in the group, of the layer at `index`."""
    return self.first + sum(stride * i for stride, i in zip(self.strides, index))

  def indices(self) -> Iterator[tuple[int, ...]]:
    """All indices along the layer axes, in C order."""
    return itertools.product(*map(range, self.sizes))

  def layers(self) -> Iterator[int]:
    """The numbers, in the group, of all its layers, in C order of their indices."""
    return map(self.layer, self.indices())

  def axes(self, variable: Variable, rank: int, param_scan_axis: int) -> tuple[int, ...]:
    """The layer axes of a leaf of which one layer has this rank.

    A Param has them at `param_scan_axis`, or last if its rank is too small; every other variable has them first, where
    MaxText's `nnx_scan` and Linen's `nn.scan` put them. A pipeline's come first in every variable.
    """
    start = min(param_scan_axis, rank) if variable.collection == leaf_roles.PARAMS else 0
    scanned = range(self.leading + start, start + len(self.sizes))
    return (*range(self.leading), *scanned)


Schedule = tuple[LayerStack, ...]


def plain(group: Path, count: int) -> Schedule:
  """All layers of a group in one stack."""
  return (LayerStack(group, group, 0, (1,), (count,)),)


def unscanned(group: Path, count: int, naming: str) -> Schedule:
  """One stack per layer of a group."""
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
  """What MaxText's `scan_layers` is for a model of this schedule.

  None if no layers could be scanned, or if there is a pipeline, which is written alike whatever `scan_layers` is.
  """
  paths = {path[:2] for path in paths}  # Only these two keys matter below.
  if any(map(layer_names.is_of_pipeline, paths)):
    return None
  if any(stack.is_scanned for stack in schedule):
    return True
  return False if schedule else None


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
        raise two_ways(path_of(stack.prefix), stack.group)
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


def two_ways(path, group) -> errors.PathCollisionError:
  return errors.PathCollisionError(
      path, f"the layers of {'/'.join(group)} written in one way", "a second one", "Remove the leaves that do not belong."
  )


REMEDY = "Layers that differ cannot be stacked or unstacked: check the checkpoint and --param_scan_axis."


def unlike(path, expected, found, remedy=REMEDY) -> errors.LayerStackError:
  """The refusal of layers that differ."""
  return errors.LayerStackError(path, expected, found, remedy)
