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

"""Finding a schedule: which leaves hold which layers, by their names and shapes. No I/O."""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import pipelines
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

LayerStack = layer_stacks.LayerStack
Path = abstract_state.Path
PathOf = layer_stacks.PathOf
Schedule = layer_stacks.Schedule
Variable = leaf_roles.Variable
unlike = layer_stacks.unlike

_MOST_LAYERS = 100_000  # More is damage, and listing the layers would take all memory.


def find(variables: Mapping[Variable, abstract_state.Leaf], param_scan_axis: int, path_of: PathOf) -> Schedule:
  """The schedule of a model's variables, by their names and shapes.

  Layers of unknown order are left out: pipelines that do not show theirs.

  Args:
    variables: the variables and their leaves.
    param_scan_axis: the layer axis of scanned Params.
    path_of: the path that messages give for a variable.

  Raises:
    LayerStackError: a layer is missing, or leaves disagree on the number of layers.
    PathCollisionError: the layers of a group are written in two ways.
  """
  prefixes = {}  # Of the stacks, each with the variables below it.
  for variable in variables:
    if prefix := layer_names.prefix_of(variable.path):
      prefixes.setdefault(prefix, []).append(variable)
  for parent in [prefix for prefix in prefixes if any(other[:-1] == prefix for other in prefixes)]:
    # A block's children may have shared RNG state beside them; anything else is a second way of writing the layers.
    if any(variable.collection == leaf_roles.PARAMS for variable in prefixes[parent]):
      raise layer_stacks.two_ways(path_of(prefixes[parent][0]), parent)
    del prefixes[parent]
  leading = _pipelines(prefixes, variables)
  sizes = {}
  for prefix, below in prefixes.items():
    if not layer_names.is_of_pipeline(prefix) or prefix[0] in leading:
      sizes[prefix] = _sizes(below, variables, _blank(prefix, leading), param_scan_axis, path_of)
  _check_stages(sizes, prefixes, path_of)
  _check_chunks(sizes, prefixes, path_of)
  schedule = tuple(sorted(_stacks(sizes), key=lambda stack: (stack.group, stack.first)))
  module_path = lambda prefix: path_of(next(iter(variables))._replace(path=prefix, subtree=None))
  layer_stacks.check(schedule, lambda prefix: _unboxed(module_path(prefix)))
  return schedule


def _pipelines(prefixes, variables) -> dict[str, int]:
  """The components whose pipeline has a known order, each with how many axes repeats and stages have."""
  leading = {}
  for component in {prefix[0] for prefix in prefixes if layer_names.is_piped(prefix)}:
    names = [it for prefix, below in prefixes.items() if prefix[:2] == (component, "pipeline_module") for it in below]
    has_blocks = any(decoder_families.BLOCK_MARKS.keys() & set(variable.path) for variable in names)
    if not has_blocks and (count := pipelines.leading_axes(variables, names)):
      leading[component] = count
  return leading


def _blank(prefix, leading) -> LayerStack:
  """A stack with the prefix's layer axes, of unknown length."""
  first = leading[prefix[0]] if layer_names.is_piped(prefix) else 0
  axes = (0,) * (first + layer_names.axis_count(prefix))
  return LayerStack(prefix, (), 0, axes, axes, first)


def _check_stages(sizes, prefixes, path_of):
  """Checks that all leaves of a pipeline agree on the number of stages and repeats."""
  piped = {prefix: size for prefix, size in sizes.items() if layer_names.is_piped(prefix)}
  for prefix, size in piped.items():
    first = next(other for other in piped if other[0] == prefix[0])
    if size != piped[first]:
      wanted, found = (" x ".join(map(str, of)) for of in (piped[first], size))
      raise unlike(path_of(prefixes[prefix][0]), f"{wanted} stages, as {'/'.join(first)} has", f"{found} stages")


def _check_chunks(sizes, prefixes, path_of):
  """Checks that engram's layers and the chunks around them follow on each other, and are as long as their names say."""
  ends = {}  # Of each component, the number of layers before the next chunk.
  named = {prefix: found for prefix in sizes if (found := layer_names.numbers(prefix[1]))}
  for prefix, (_, first, last) in sorted(named.items(), key=lambda item: item[1][1]):
    begin, size = ends.get(prefix[0], 0), sizes[prefix] or (1,)
    if first != begin or size != (last - first + 1,):
      raise unlike(
          path_of(prefixes[prefix][0]),
          f"layers from {begin} on, {last - first + 1} of them",
          f"{'/'.join(prefix)} with {size[0]}",
          "Check the names: a chunk's are its first and last layer.",
      )
    ends[prefix[0]] = last + 1


def _unboxed(path: Path) -> Path:
  """The path of a module, which has no box."""
  return path[:-1] if path[-1] == leaf_roles.VALUE else path


def refuse_unknown_order(
    variables: Iterable[Variable],
    schedule: Schedule,
    path_of: PathOf,
    *,
    keeps_pipelines: bool,
):
  """Refuses layers whose order the tree does not show, unless they stay as they are.

  Args:
    variables: the source's variables.
    schedule: their schedule.
    path_of: the path that messages give for a variable.
    keeps_pipelines: whether a pipeline stays as it is.

  Raises:
    LayerStackError: naming a variable of such a layer.
  """
  known = {stack.prefix[0] for stack in schedule if stack.is_piped}
  for variable in variables:
    is_unknown = layer_names.is_of_pipeline(variable.path) and variable.path[0] not in known
    if is_unknown and not keeps_pipelines:
      why = "those of a pipeline without a norm's scale, which would tell the number of its axes, or of blocks of layers"
      raise errors.LayerStackError(
          path_of(variable),
          "layers whose order is known",
          why,
          "Keep the arrangement: leave out --scan_layers, or give the config of the run that wrote it.",
      )


def _sizes(below, variables, stack, param_scan_axis, path_of) -> tuple[int, ...]:
  """The lengths of the layer axes, on which all leaves below a prefix must agree."""
  axis_count, sizes, first = len(stack.sizes), None, None
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
  """How a component's layers are numbered where they are in blocks, or under DeepSeek's old names.

  Attributes:
    dense: how many layers have DeepSeek's old names, before those of `layers/<n>`.
    before: how many layers come before the blocks.
    period: how many layers a block has.
    after: how many layers come before the remainder, which is last.
    piped: how many layers are in a pipeline, before `layers_outside_pipeline`.
    chunked: how many dense layers are in engram's chunks, in whose names the MoE layers are numbered after them.
  """

  dense: int
  before: int
  period: int
  after: int
  piped: int
  chunked: int


def _stacks(sizes: Mapping[Path, tuple[int, ...]]) -> Iterator[LayerStack]:
  """The stacks of these prefixes, whose layer axes have these lengths."""
  for component in dict.fromkeys(prefix[0] for prefix in sizes):
    of = {prefix: size for prefix, size in sizes.items() if prefix[0] == component}
    piped = {prefix: of.pop(prefix) for prefix in list(of) if layer_names.is_piped(prefix)}
    stacks = list(pipelines.found(piped, of)) if piped else []
    yield from stacks
    blocks = {prefix: size for prefix, size in of.items() if len(prefix) > 2 and size and prefix[1] != "layers_remainder"}
    before = sum(
        layer_names.FLAT.sub(r"\1", prefix[1]) == "layers" and not of[prefix] for prefix in of if len(prefix) == 2
    )
    period = _period(blocks)
    after = before * bool(blocks) + period * max((size[0] for size in blocks.values()), default=0)
    dense = sum(layer_names.OLD_DENSE.fullmatch(prefix[1]) is not None for prefix in of)
    piped_layers = sum(math.prod(stack.sizes) for stack in stacks)
    chunks = filter(None, (layer_names.numbers(prefix[1]) for prefix in of))
    chunked = max((last + 1 for group, _, last in chunks if group == "dense_layers"), default=0)
    for prefix, size in of.items():
      yield _stack(prefix, size, _Numbering(dense, before, period, after, piped_layers, chunked))


def _stack(prefix: Path, size: tuple[int, ...], numbering: _Numbering) -> LayerStack:
  """The stack of one prefix, whose layer axes have these lengths."""
  component, name, *child = prefix
  layers = (component, "layers")
  if match := layer_names.OLD_DENSE.fullmatch(name):
    return LayerStack(prefix, (component, "dense_layers"), int(match[1]))
  if match := layer_names.LINEN_REMAINDER.fullmatch(name):
    return LayerStack(prefix, layers, numbering.after + int(match[1]))
  if match := layer_names.OUTSIDE.fullmatch(name):
    before = 0 if match[1] == pipelines.MOE else numbering.piped
    return LayerStack(prefix, (component, match[1]), before + int(match[2] or 0), (1,) * len(size), size)
  if found := layer_names.numbers(name):
    group, first, _ = found
    before = 0 if group == "dense_layers" else numbering.chunked
    return LayerStack(prefix, (component, group), first - before, (1,) * len(size), size)
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
  """The stack of a position in the blocks, or in their remainder."""
  _, name, child = prefix
  if name == "layers_remainder":
    position = 0 if child == "local_layers" else int(child.rpartition("_")[2])
    return LayerStack(prefix, layers, numbering.after + position, (1,) * len(size), size)
  if child == "local_layers":
    return LayerStack(prefix, layers, numbering.before, (numbering.period, 1), size)
  position = numbering.period - 1 if child == "global_layer" else int(child.rpartition("_")[2])
  return LayerStack(prefix, layers, numbering.before + position, (numbering.period,), size)


def _period(blocks) -> int:
  """The number of layers in a block: its positions, or its local layers and one global layer."""
  local = [size[1] for prefix, size in blocks.items() if prefix[2] == "local_layers"]
  return local[0] + 1 if local else sum(layer_names.INTEGER.fullmatch(prefix[2]) is None for prefix in blocks)
