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

"""Kinds of variables that are not Params. They are known by their paths, because checkpoints do not keep types."""

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path

# Flax's fp8 dot products keep a scale and a history of maxima for each operand (`flax.linen.fp8_ops`).
FP8 = "_overwrite_with_gradient"
_FP8_NAMES = frozenset(
    f"{operand}_{kind}" for operand in ("input", "kernel", "output_grad") for kind in ("scale", "amax_history")
)
# Modules that hold RNG streams: MaxText's `train_state_nnx._NNX_RNG_STATE_KEYS`, and the name that a Linen module
# wrapped by `nnx.bridge.to_nnx` gives to that state.
_WRAPPED_RNGS = "to_nnx__rngs"
_STRIPPED = frozenset({"rngs", "dropout"})
_RNG_MODULES = _STRIPPED | {_WRAPPED_RNGS}
_BATCH_STATISTICS = frozenset({"mean", "var"})  # `nnx.BatchNorm`'s `BatchStat` variables.

# Linen collections named after MaxText's Variable types, whose variables NNX keeps beside the Params at the same paths:
# DeepSeek-V4's table of token ids and its routing bias.
_TOKEN_TABLE, _ROUTING_BIAS = "Tid2EidVar", "MoEBiasVar"


def is_rng_state(path: Path, leaf: abstract_state.Leaf) -> bool:
  """Whether it is the key or count of an RNG stream: by name and dtype, because a module's name alone proves nothing."""
  if not _RNG_MODULES & set(path[:-1]) or path[-1] not in ("key", "count"):
    return False
  dtype = str(getattr(leaf, "dtype", ""))
  return dtype == "uint32" or dtype.startswith("key<")


def is_batch_statistic(path: Path) -> bool:
  """Whether it is the mean or the variance of a batch normalization."""
  return path[-1] in _BATCH_STATISTICS


def linen_collection(path: Path) -> str | None:
  """The Linen collection of an NNX variable that is not a Param; None where Linen models have none."""
  if path[-1] in _FP8_NAMES and "fp8" in "".join(path[-2:-1]).lower():
    return FP8
  return _TOKEN_TABLE if path[-1] == "tid2eid" else None


def is_nnx_variable(collection: str, path: Path, is_trained: bool) -> bool:
  """Whether NNX keeps a variable of this Linen collection beside the Params.

  Only names that lead back to the collection count. The routing bias has none of its own: only the lack of moments shows
  that it is not a Param.
  """
  return collection == linen_collection(path) or (is_trained and collection == _ROUTING_BIAS)


def is_misplaced(path: Path) -> bool:
  """Whether only MaxText 0.2.3's NNX trainer saves such a variable among the params."""
  return linen_collection(path) == FP8 or _WRAPPED_RNGS in path[:-1]


def is_stripped(path: Path) -> bool:
  """Whether MaxText 0.2.3's NNX trainer, which goes by names and not by types, leaves it out when it saves."""
  return bool(_STRIPPED & set(path))
