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

"""Names of layers: which part of a path says that a variable is of a layer, or of a stack of them."""

import re

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path

INTEGER = re.compile(r"0|[1-9]\d*")
FLAT = re.compile(r"((?:.*_)?layers)_(0|[1-9]\d*)")
OLD_DENSE = re.compile(r"dense_layer_(0|[1-9]\d*)")  # NNX DeepSeek up to MaxText 0.2.3.
LINEN_REMAINDER = re.compile(r"Gemma4DecoderLayerToLinen_(0|[1-9]\d*)")
_STACK = re.compile(r"(?:.*_)?layers")
_UNSTACKED_COMPONENTS = frozenset({"vision_encoder", "audio_encoder"})  # MaxText never scans its towers.
# A block's children, one for each position in it; Qwen3-Next's and Qwen3.5's are singular.
_BLOCK_CHILD = re.compile(r"layers?_(0|[1-9]\d*)")
# Layers in an order that neither names nor shapes tell.
_UNKNOWN_ORDER = re.compile(
    r"pipeline_module|(?:.*_)?layers_outside_pipeline(?:_\d+)?|(?:.*_)?layers_(?:engram_\d+|\d+_\d+)"
)


def prefix_of(path: Path) -> Path | None:
  """The prefix of the layer stack that a variable belongs to, or None."""
  if len(path) < 3 or path[0] in _UNSTACKED_COMPONENTS or has_unknown_order(path):
    return None
  name, below = path[1], path[2] if len(path) > 3 else ""
  if FLAT.fullmatch(name) or OLD_DENSE.fullmatch(name) or LINEN_REMAINDER.fullmatch(name):
    return path[:2]
  is_child = _BLOCK_CHILD.fullmatch(below) or below in ("local_layers", "global_layer")
  if name in ("layers", "scanned_blocks", "layers_remainder") and is_child:
    return path[:3]
  if not _STACK.fullmatch(name):
    return None
  return path[:3] if INTEGER.fullmatch(below) else path[:2]


def axis_count(prefix: Path) -> int:
  """The number of layer axes of the leaves below a prefix."""
  component, name, *child = prefix
  if name == "layers_remainder":
    return 1 if child == ["local_layers"] else 0
  if child == ["local_layers"]:
    return 2
  is_one_layer = FLAT.fullmatch(name) or OLD_DENSE.fullmatch(name) or LINEN_REMAINDER.fullmatch(name)
  return 0 if is_one_layer or (child and INTEGER.fullmatch(child[0])) else 1


def has_unknown_order(path: Path) -> bool:
  """Whether it is of layers in an order that the tree does not tell."""
  return len(path) > 1 and _UNKNOWN_ORDER.fullmatch(path[1]) is not None
