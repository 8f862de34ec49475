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

"""Pipelines: how MaxText writes layers that are spread over stages, and what of that a checkpoint's tree shows.

A microbatch passes the stages in turn, each of one or more layers, and in a circular pipeline all of them again with each
repeat's own layers. Layer `(repeat * stages + stage) * layers_per_stage + l` of the pipeline is at (repeat, stage), the
first axes of every leaf; a pipeline that is not circular has no axis of repeats.
"""

from collections.abc import Iterable, Iterator, Mapping
import dataclasses
import math

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

LayerStack = layer_stacks.LayerStack
Path = abstract_state.Path

DENSE, MOE = "dense_layers", "moe_layers"  # DeepSeek's; only the MoE layers are pipelined.


@dataclasses.dataclass(frozen=True)
class Pipeline:
  """What a model's config says of its pipeline.

  Attributes:
    stages: the number of stages, over all slices.
    repeats: `num_pipeline_repeats`; above 1, the pipeline is circular.
    layers_per_stage: `num_layers_per_pipeline_stage`.
    scans_stages: `scan_layers_per_stage`, which stacks the layers of a stage.
  """

  stages: int
  repeats: int = 1
  layers_per_stage: int = 1
  scans_stages: bool = False

  @property
  def count(self) -> int:
    """How many layers it has."""
    return self.stages * self.repeats * self.layers_per_stage


def schedule(
    pipeline: Pipeline, num_layers: int, num_dense: int | None, scan_layers: bool, trainer: str
) -> layer_stacks.Schedule:
  """The schedule of a decoder with a pipeline.

  Args:
    pipeline: the pipeline.
    num_layers: the number of all layers.
    num_dense: for DeepSeek, the number of dense layers; they, and the MoE layers outside, come before the pipeline. None
      for other decoders, whose layers outside come after it.
    scan_layers: whether layers outside are scanned; MaxText's Linen model always scans them.
    trainer: whose names to use, `linen` or `nnx`.
  """
  is_moe, is_stacked = num_dense is not None, scan_layers or trainer == "linen"
  outside = num_layers - (num_dense or 0) - pipeline.count
  group = ("decoder", MOE if is_moe else "layers")
  name = MOE if is_moe and trainer == "linen" else f"{group[1]}_outside_pipeline"
  dense = _outside(("decoder", DENSE), DENSE, 0, num_dense or 0, is_stacked)
  others = _outside(group, name, 0 if is_moe else pipeline.count, outside, is_stacked)
  return (*dense, *_stacks(pipeline, group, outside if is_moe else 0), *others)


def _outside(group, name, first, count, is_stacked) -> layer_stacks.Schedule:
  """A group's layers outside the pipeline, under a name of their own."""
  if is_stacked:
    return (LayerStack((group[0], name), group, first, (1,), (count,)),) if count else ()
  return tuple(LayerStack((group[0], f"{name}_{n}"), group, first + n) for n in range(count))


def _stacks(pipeline: Pipeline, group: Path, first: int) -> Iterator[LayerStack]:
  """The stacks of a pipeline whose first layer is number `first` in the group."""
  module, count = (group[0], *layer_names.PIPELINE_LAYERS), pipeline.layers_per_stage
  sizes = (pipeline.stages,) if pipeline.repeats == 1 else (pipeline.repeats, pipeline.stages)
  if count == 1:
    yield _stack(module, group, first, sizes, count)
  elif pipeline.scans_stages:
    yield _stack((*module, layer_names.SCANNED_STAGE), group, first, (*sizes, count), count)
  else:
    for j in range(count):
      yield _stack((*module, f"layers_{j}"), group, first + j, sizes, count)


def found(sizes: Mapping[Path, tuple[int, ...]], outside: Mapping[Path, tuple[int, ...]]) -> Iterator[LayerStack]:
  """The stacks of a pipeline that was found.

  Args:
    sizes: the lengths of the layer axes, by prefix.
    outside: the same of the decoder's other layers.
  """
  is_moe = any(prefix[1].startswith((DENSE, MOE)) for prefix in outside)
  before = sum(math.prod(size) for prefix, size in outside.items() if prefix[1].startswith(MOE)) if is_moe else 0
  group = (next(iter(sizes))[0], MOE if is_moe else "layers")
  is_scanned = any(layer_names.is_scanned_stage(prefix) for prefix in sizes)
  count = next(iter(sizes.values()))[-1] if is_scanned else len(sizes)
  for prefix, size in sizes.items():
    position = 0 if is_scanned or len(prefix) == 3 else int(prefix[3].rpartition("_")[2])
    yield _stack(prefix, group, before + position, size, count)


def _stack(prefix, group, first, sizes, layers_per_stage) -> LayerStack:
  """A stack with leading axes of repeats and stages, and one of a stage's layers if these are scanned."""
  leading = len(sizes) - layer_names.is_scanned_stage(prefix)
  strides = [layers_per_stage * math.prod(sizes[axis + 1 : leading]) for axis in range(leading)]
  return LayerStack(prefix, group, first, (*strides, *(1,) * (len(sizes) - leading)), sizes, leading)


def leading_axes(variables: Mapping[leaf_roles.Variable, abstract_state.Leaf], names: Iterable[leaf_roles.Variable]):
  """How many axes of repeats and stages, 1 or 2, leaves below a pipeline have; None if they do not show it.

  The scale of a norm, which every layer has, has one axis more. Other shapes would leave open which axes are layers'.
  """
  ranks = set()
  for variable in names:
    is_weight = variable.collection == leaf_roles.PARAMS and variable.subtree is None
    if is_weight and variable.path[-1] == "scale" and abstract_state.is_array(variables[variable]):
      ranks.add(len(variables[variable].shape) - 1 - layer_names.is_scanned_stage(variable.path))
  return next(iter(ranks)) if ranks in ({1}, {2}) else None
