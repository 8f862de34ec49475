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

"""Names of layers: the part of a path that says that a variable belongs to a layer or a stack of layers."""

import functools
import re

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path

_NUMBER = r"(0|[1-9]\d{0,99})"  # One of thousands of digits is no layer's, and Python would not read it.
INTEGER = re.compile(_NUMBER)
FLAT = re.compile(rf"((?:.*_)?layers)_{_NUMBER}")
OLD_DENSE = re.compile(rf"dense_layer_{_NUMBER}")  # NNX DeepSeek up to MaxText 0.2.3.
LINEN_REMAINDER = re.compile(rf"Gemma4DecoderLayerToLinen_{_NUMBER}")
_STACK = re.compile(r"(?:.*_)?layers")
_UNSTACKED_COMPONENTS = frozenset({"vision_encoder", "audio_encoder"})  # MaxText never scans its towers.
# A block's children, one per position; Qwen3-Next's and Qwen3.5's are in the singular.
_BLOCK_CHILD = re.compile(rf"layers?_{_NUMBER}")
# The layers of a pipeline, those of a scanned stage, and those before or after a pipeline.
PIPELINE_LAYERS, SCANNED_STAGE = ("pipeline_module", "layers"), "scanned_layers"
OUTSIDE = re.compile(rf"((?:.*_)?layers)_outside_pipeline(?:_{_NUMBER})?")
# DeepSeek's layer with engram, and a chunk of the layers between two of those, by their numbers in the whole decoder.
ENGRAM = re.compile(rf"(dense_layers|moe_layers)_engram_{_NUMBER}")
_CHUNK = re.compile(rf"(dense_layers|moe_layers)_{_NUMBER}_{_NUMBER}")


@functools.lru_cache(maxsize=2**16)
def _match(pattern: re.Pattern[str], name: str) -> re.Match[str] | None:
  """The match of a name; many paths share theirs."""
  return pattern.fullmatch(name)


def prefix_of(path: Path) -> Path | None:
  """The prefix of the layer stack that a variable belongs to, if any."""
  if len(path) < 3 or path[0] in _UNSTACKED_COMPONENTS:
    return None
  name, below = path[1], path[2] if len(path) > 3 else ""
  if is_piped(path):
    is_in_stage = len(path) > 4 and (_match(_BLOCK_CHILD, path[3]) or path[3] == SCANNED_STAGE)
    return path[:4] if is_in_stage else path[:3]
  if _match(OUTSIDE, name) or _match(_CHUNK, name) or _match(ENGRAM, name):
    return path[:2]
  if _match(FLAT, name) or _match(OLD_DENSE, name) or _match(LINEN_REMAINDER, name):
    return path[:2]
  is_child = _match(_BLOCK_CHILD, below) or below in ("local_layers", "global_layer")
  if name in ("layers", "scanned_blocks", "layers_remainder") and is_child:
    return path[:3]
  if not _match(_STACK, name):
    return None
  return path[:3] if _match(INTEGER, below) else path[:2]


def axis_count(prefix: Path) -> int:
  """How many layer axes leaves below a prefix have, not counting a pipeline's stages and repeats."""
  component, name, *child = prefix
  if is_piped(prefix):
    return int(is_scanned_stage(prefix))
  if match := _match(OUTSIDE, name):
    return int(match[2] is None)
  if name == "layers_remainder":
    return 1 if child == ["local_layers"] else 0
  if child == ["local_layers"]:
    return 2
  is_one_layer = _match(FLAT, name) or _match(ENGRAM, name) or _match(OLD_DENSE, name) or _match(LINEN_REMAINDER, name)
  return 0 if is_one_layer or (child and _match(INTEGER, child[0])) else 1


def is_piped(path: Path) -> bool:
  """Whether the path is inside a pipeline."""
  return path[1:3] == PIPELINE_LAYERS


def is_scanned_stage(path: Path) -> bool:
  """Whether the path is inside a pipeline stage whose layers are stacked."""
  return is_piped(path) and path[3:4] == (SCANNED_STAGE,)


def is_of_pipeline(path: Path) -> bool:
  """Whether the path is inside a pipeline, or of the layers outside one."""
  return len(path) > 1 and (path[1] == PIPELINE_LAYERS[0] or _match(OUTSIDE, path[1]) is not None)


def numbers(name: str) -> tuple[str, int, int] | None:
  """Of a module with engram or of a chunk: its group's name, and the decoder's first and last layer that it has."""
  if match := _match(ENGRAM, name):
    return match[1], int(match[2]), int(match[2])
  if match := _match(_CHUNK, name):
    return match[1], int(match[2]), int(match[3])
  return None
