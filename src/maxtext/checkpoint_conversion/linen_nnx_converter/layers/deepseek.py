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

"""How DeepSeek 2, 3 and 3.2 and Kimi write their layers: dense layers, then MoE layers, each numbered from 0."""

from collections.abc import Collection, Iterable, Iterator
import itertools

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks

LayerStack = layer_stacks.LayerStack

_DENSE, _MOE = ("decoder", "dense_layers"), ("decoder", "moe_layers")


def schedule(
    dense: int, moe: int, scan_layers: bool, engram_layers: Collection[int], *, is_nested: bool
) -> Iterator[LayerStack]:
  """The schedule.

  Args:
    dense: how many layers are dense.
    moe: how many are MoE layers.
    scan_layers: whether they are scanned.
    engram_layers: the layers with engram, by their numbers in the whole decoder.
    is_nested: whether unscanned layers have the names that NNX gave them up to MaxText 0.2.3.
  """
  for group, count, before in ((_DENSE, dense, 0), (_MOE, moe, dense)):
    if scan_layers and engram_layers:
      yield from _chunks(group, range(before, before + count), engram_layers)
    elif scan_layers:
      yield from layer_stacks.plain(group, count) if count else ()
    elif not is_nested:
      yield from layer_stacks.unscanned(group, count, layer_stacks.FLAT)
    elif group == _DENSE:
      yield from (LayerStack(("decoder", f"dense_layer_{n}"), group, n) for n in range(count))
    else:
      yield from (LayerStack(("decoder", "layers", str(before + n)), group, n) for n in range(count))


def refuse_lost_engram(paths: Iterable[tuple[str, ...]], release: tuple[int, ...]):
  """Refuses engram in unscanned layers, for a release's NNX trainer, whose unscanned model has none.

  Args:
    paths: the paths of the target's variables in the model.
    release: the release.

  Raises:
    ConfigError: naming the first of them.
  """
  for path in paths:
    if "engram" in path and not layer_names.ENGRAM.fullmatch(path[1]):
      version = ".".join(map(str, release))
      raise errors.ConfigError(
          path,
          f"scanned layers, for MaxText {version}'s unscanned NNX model has no engram",
          "unscanned ones",
          "Pass --scan_layers=True.",
      )


def _chunks(group, layers, engram_layers) -> Iterator[LayerStack]:
  """Each layer with engram by itself, and those between two of them in a stack, named after its first and last one."""
  component, name = group
  for engram, run in itertools.groupby(layers, key=lambda n: n if n in engram_layers else None):
    first, *rest = run
    if engram is not None:
      yield LayerStack((component, f"{name}_engram_{engram}"), group, engram - layers[0])
    else:
      chunk = f"{name}_{first}_{first + len(rest)}"
      yield LayerStack((component, chunk), group, first - layers[0], (1,), (1 + len(rest),))
