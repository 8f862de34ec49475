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

"""How each decoder family of MaxText writes its layers, by release and trainer.

Seen in the abstract states of MaxText 0.2.3, 0.2.4 and 0.2.5; the order inside a block is that of its `…ScannableBlock`.
A family that is scanned as one plain stack needs no row here, but every family is in `DECODER_BLOCKS`.
"""

from collections.abc import Iterator
import dataclasses

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import deepseek
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import pipelines

LayerStack = layer_stacks.LayerStack
Release = tuple[int, ...]

_LAYERS = ("decoder", "layers")

# MaxText's `DecoderBlockType`s in 0.2.3, 0.2.4 and 0.2.5, each with the first release known to have it.
DECODER_BLOCKS: dict[str, Release] = {
    **dict.fromkeys(("default", "llama2", "mistral", "mixtral", "gpt3", "gpt_oss", "simple", "simple_mlp"), (0,)),
    **dict.fromkeys(("deepseek", "gemma", "gemma2", "gemma3", "gemma4", "gemma4_small", "llama4", "olmo3"), (0,)),
    **dict.fromkeys(("qwen2", "qwen3", "qwen3_moe", "qwen3_custom_moe", "qwen3_next", "qwen3_5"), (0,)),
    **dict.fromkeys(("deepseek4", "envy"), (0, 2, 4)),
}


@dataclasses.dataclass(frozen=True)
class Decoder:
  """What a model's config says of its decoder's layers.

  Attributes:
    block: MaxText's `decoder_block`: `llama2`, `gemma3`, …
    num_layers: `num_decoder_layers`; Gemma 2 counts pairs.
    num_dense_layers: `first_num_dense_layers`, of DeepSeek.
    num_hash_layers: `first_num_hash_layers`, of DeepSeek 4.
    cycle: `inhomogeneous_layer_cycle_interval`, the length of a block where the family does not fix it.
    model_name: `model_name`, by which MaxText decides which variables are Params.
    engram_layers: `engram_layers`, of DeepSeek: those that are not scanned.
    known_order: whether the config determines which leaf holds which layers.
    pipeline: their pipeline, or None.
    proven: for a block that is not in this table, the schedules, unscanned and scanned, that MaxText's models prove.
  """

  block: str
  num_layers: int
  num_dense_layers: int = 0
  num_hash_layers: int = 0
  cycle: int = 1
  model_name: str = ""
  engram_layers: tuple[int, ...] = ()
  known_order: bool = True
  pipeline: pipelines.Pipeline | None = None
  proven: tuple[layer_stacks.Schedule, layer_stacks.Schedule] | None = None


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Scanned layers that repeat in blocks.

  Attributes:
    module: the module that holds the blocks.
    position: the name of a layer's place in the block, with `{}` for its number; None where the last is `global_layer`
      and all others are in `local_layers`, with an axis of their own.
    period: the number of layers in a block; None is the config's cycle.
    remainder: the path of a left-over layer, with `{}` for its number, or of their stack; None where none can be.
  """

  module: str
  position: str | None
  period: int | None = None
  remainder: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Row:
  """The blocks of some decoder families, from a release on.

  Attributes:
    decoder_blocks: the families.
    trainer: `linen` or `nnx`, or None for both.
    since: the first release that writes them so; the latest row that applies counts.
    blocks: how they are written.
  """

  decoder_blocks: tuple[str, ...]
  trainer: str | None
  since: Release
  blocks: Blocks


_REMAINDER = ("layers_remainder", "layers_{}")
_STACKED_REMAINDER = ("layers_remainder", "local_layers")
_LINEN_REMAINDER = ("Gemma4DecoderLayerToLinen_{}",)

# A release that writes a family differently is one more row.
ROWS = (
    Row(("llama4", "gpt_oss", "olmo3", "envy"), None, (0,), Blocks("layers", "layers_{}")),
    Row(("qwen3_next", "qwen3_5"), None, (0,), Blocks("layers", "layer_{}")),
    Row(("qwen3_next",), None, (0, 2, 5), Blocks("layers", None, remainder=_STACKED_REMAINDER)),
    Row(("gemma3",), None, (0,), Blocks("layers", "layers_{}", 6, _REMAINDER)),
    Row(("gemma4",), "linen", (0,), Blocks("scanned_blocks", "layers_{}", 6, _LINEN_REMAINDER)),
    Row(("gemma4",), "nnx", (0,), Blocks("scanned_blocks", "layers_{}", 6, _REMAINDER)),
    Row(("gemma4",), "linen", (0, 2, 4), Blocks("scanned_blocks", None, 6, _LINEN_REMAINDER)),
    Row(("gemma4",), "nnx", (0, 2, 4), Blocks("scanned_blocks", None, 6, _STACKED_REMAINDER)),
    Row(("deepseek4",), None, (0,), Blocks("scanned_blocks", "layers_{}", 2)),
)

# Submodules that only families scanned in blocks have in their layers: without a config, these give them away.
BLOCK_MARKS = {
    "engram": ("deepseek with engram",),
    "GptOssAttention": ("gpt_oss",),
    "Llama4MoEBlock_0": ("llama4",),
    "input_layernorm": ("qwen3_next", "qwen3_5"),
    "mhc_attention": ("deepseek4", "deepseek with engram"),
    "post_ffw_norm": ("gemma3", "gemma4", "envy"),
    "post_mlp_layer_norm": ("olmo3",),
}

# Before this release, NNX numbered its layers under integer keys and had no pipelines.
FLAT_NNX_SINCE = (0, 2, 4)


@dataclasses.dataclass(frozen=True)
class FormerParam:
  """A Param that a release turned into another Variable, with its layer axis first and without moments.

  Attributes:
    since: the first release in which it is not a Param.
    model_names: the prefixes of the names of models with it.
    groups: the layers that may have it, in which it is refused where no config gives the model's name.
    path: the end of its path.
  """

  since: Release
  model_names: tuple[str, ...]
  groups: tuple[str, ...]
  path: tuple[str, ...]


# DeepSeek-V3's routing bias, a `MoEBiasVar` (`GateLogit` in MaxText's `layers/moe.py`).
FORMER_PARAMS = (
    FormerParam((0, 2, 5), ("deepseek3", "kimi-k2"), ("moe_layers", "mtp_block", "pipeline_module"), ("gate", "bias")),
)


def is_former_param(path: tuple[str, ...], decoder: Decoder | None, release: Release) -> bool:
  """Whether the Param of this path is not a Param in the release.

  Raises:
    ConfigError: this depends on the model's name, and there is no config; or its layer axis is unknown.
  """
  for former in FORMER_PARAMS:
    if release < former.since or path[-len(former.path) :] != former.path:
      continue
    if decoder is not None:
      is_former = decoder.model_name.startswith(former.model_names)
      if is_former and not decoder.known_order:
        raise unknown_order(path, "a variable whose layer axis moves", decoder)
      return is_former
    if any(part.startswith(former.groups) for part in path[:2]):
      raise errors.ConfigError(
          path,
          "the model's name, which decides whether this is a Param",
          "no config",
          "Give the model's config: base.yml model_name=…",
      )
  return False


def for_release(decoder: Decoder, release: Release) -> Decoder:
  """The decoder; its order is unknown if its block is not in the release, or not in this table."""
  is_known = decoder.proven is not None or DECODER_BLOCKS.get(decoder.block, release + (1,)) <= release
  if decoder.pipeline:  # MaxText pipelines whole blocks, or one kind of layer where the model has several.
    is_plain = not decoder.engram_layers and not any(decoder.block in row.decoder_blocks for row in ROWS)
    is_known &= release >= FLAT_NNX_SINCE and is_plain
  return dataclasses.replace(decoder, known_order=decoder.known_order and is_known)


def unknown_order(path: tuple[str, ...], found: str, decoder: Decoder) -> errors.ConfigError:
  """The refusal to guess at what is unknown of an unknown decoder block, or a pipeline of blocks."""
  return errors.ConfigError(
      path,
      "the arrangement kept, since none is known for a decoder_block new to the release, or a pipeline of blocks",
      f"{found}, of decoder_block={decoder.block}{' in a pipeline' if decoder.pipeline else ''}",
      "Give scan_layers as the checkpoint has it, and the release that wrote it.",
  )


def unknown_blocks(path: tuple[str, ...], mark: str) -> errors.ConfigError:
  """The refusal to stack layers that MaxText scans in blocks, because only a config says how long these are."""
  return errors.ConfigError(
      path,
      f"the model's config, for layers with {mark} are scanned in blocks ({', '.join(BLOCK_MARKS[mark])})",
      "none",
      "Give it, base.yml model_name=…, or pass --scan_layers=False.",
  )


def refuse_later_variable(path: tuple[str, ...], release: Release):
  """Refuses NNX state that an older release keeps as a Param, whose moments no longer exist.

  Raises:
    ConfigError: the release is one of those.
  """
  for former in FORMER_PARAMS:
    is_one = path[-len(former.path) :] == former.path and any(part.startswith(former.groups) for part in path[:2])
    if is_one and release < former.since:
      raise errors.ConfigError(
          path,
          f"a Param with moments, as MaxText {'.'.join(map(str, release))} keeps it",
          "a variable that is no Param and has none",
          f"Convert for {'.'.join(map(str, former.since))} or later.",
      )


def schedule(decoder: Decoder, scan_layers: bool, trainer: str, release: Release) -> layer_stacks.Schedule:
  """The schedule of a decoder as a release of MaxText writes it.

  Args:
    decoder: the decoder.
    scan_layers: whether its layers are scanned.
    trainer: whose names to use, `linen` or `nnx`.
    release: the release, such as `(0, 2, 4)`.

  Raises:
    LayerStackError: MaxText itself would lose the layers left over after the blocks.
  """
  dense = decoder.num_dense_layers if decoder.block == "deepseek" else None
  if decoder.pipeline is not None:
    return pipelines.schedule(decoder.pipeline, decoder.num_layers, dense, scan_layers, trainer)
  if dense is not None:
    counts, is_nested = (dense, decoder.num_layers - dense), trainer == "nnx" and release < FLAT_NNX_SINCE
    return tuple(deepseek.schedule(*counts, scan_layers, decoder.engram_layers, is_nested=is_nested))
  if not scan_layers:
    naming = layer_stacks.NESTED if trainer == "nnx" and release < FLAT_NNX_SINCE else layer_stacks.FLAT
    return layer_stacks.unscanned(_LAYERS, decoder.num_layers, naming)
  blocks = _blocks(decoder.block, trainer, release)
  return tuple(_in_blocks(decoder, blocks)) if blocks else layer_stacks.plain(_LAYERS, decoder.num_layers)


def _blocks(block, trainer, release) -> Blocks | None:
  """The latest row that applies."""
  rows = [row for row in ROWS if block in row.decoder_blocks and row.trainer in (None, trainer) and row.since <= release]
  return max(rows, key=lambda row: row.since).blocks if rows else None


def _in_blocks(decoder, blocks) -> Iterator[LayerStack]:
  """The layers before the blocks, the blocks, and what is left over."""
  before, period = decoder.num_hash_layers, blocks.period or decoder.cycle
  count, left = divmod(decoder.num_layers - before, period)
  if left and blocks.remainder is None:
    raise errors.LayerStackError(
        ("decoder", blocks.module),
        f"a number of layers that blocks of {period} can hold, as {decoder.block} is scanned",
        f"{decoder.num_layers - before}",
        "MaxText would silently lose the rest: keep --scan_layers=False.",
    )
  yield from layer_stacks.unscanned(_LAYERS, before, layer_stacks.FLAT)
  module = ("decoder", blocks.module)
  if count and blocks.position is None:
    yield LayerStack((*module, "local_layers"), _LAYERS, before, (period, 1), (count, period - 1))
    yield LayerStack((*module, "global_layer"), _LAYERS, before + period - 1, (period,), (count,))
  elif count:
    for j in range(period):
      yield LayerStack((*module, blocks.position.format(j)), _LAYERS, before + j, (period,), (count,))
  if left:
    yield from _left_over(blocks.remainder, before + count * period, left)


def _left_over(path, first, count) -> Iterator[LayerStack]:
  if path == _STACKED_REMAINDER:
    yield LayerStack(("decoder", *path), _LAYERS, first, (1,), (count,))
  else:
    for r in range(count):
      yield LayerStack(("decoder", *(name.format(r) for name in path)), _LAYERS, first + r)
