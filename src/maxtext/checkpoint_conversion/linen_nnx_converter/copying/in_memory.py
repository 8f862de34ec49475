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

"""Carries out a plan on arrays in memory, NumPy's or JAX's, or on `jax.ShapeDtypeStruct`s."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path


def apply(plan: plan_lib.Plan, leaves: Mapping[Path, Any]) -> dict[Path, Any]:
  """The target's leaves, made of the source's. Copied leaves are the very same objects.

  A `jax.ShapeDtypeStruct` keeps its sharding; if it is stacked, sliced or transposed, only a `NamedSharding`, whose spec
  is None for a new axis.
  """
  moved = {path: _moved(move, leaves, plan.target.leaves[path]) for path, move in plan.moves.items()}
  return {path: moved.get(path, leaf) for path, leaf in plan.target.leaves.items()}


def _moved(move, leaves, target):
  """The target leaf, as an array of the source's kind."""
  sources = [leaves[source] for source in move.sources]
  if any(isinstance(source, jax.ShapeDtypeStruct) for source in sources):
    return _moved_struct(move, sources, target)
  if abstract_state.is_array(target):
    sources = [_cast(path, source, target.dtype) for path, source in zip(move.sources, sources)]
  if move.kind == "copy":
    return sources[0]
  return _on_bits(lambda arrays: _made(move, dict(zip(move.sources, arrays))), sources)


def _cast(path, source, dtype):
  return source if source.dtype == dtype else abstract_state.checked_cast(path, source, dtype)


def _made(move, arrays):
  """The target leaf, made of arrays that are all NumPy's or partly JAX's."""
  pieces = []
  for source, index in move.pieces:
    inside: list[Any] = [slice(None)] * arrays[source].ndim
    for axis, at in zip(move.axes(source), index):
      inside[axis] = at
    piece = arrays[source][tuple(inside)] if index else arrays[source]
    pieces.append(piece.transpose(move.order) if move.order else piece)
  if not move.stacked:
    return pieces[0]
  library: Any = jnp if any(isinstance(piece, jax.Array) for piece in pieces) else np
  stacked = library.stack(pieces).reshape(*move.sizes, *pieces[0].shape)
  return library.moveaxis(stacked, tuple(range(len(move.stacked))), move.stacked)


def _moved_struct(move, sources, target) -> jax.ShapeDtypeStruct:
  """The target leaf: the source's if it is copied, otherwise with its sharding rearranged like its axes."""
  if move.kind == "copy":
    same = sources[0].dtype == target.dtype
    return sources[0] if same else jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sources[0].sharding)
  sharding = getattr(sources[0], "sharding", None)
  if not isinstance(sharding, jax.sharding.NamedSharding) or any(s.sharding != sharding for s in sources[1:]):
    return target
  along = (*sharding.spec, *(None,) * (len(sources[0].shape) - len(sharding.spec)))
  spec = jax.sharding.PartitionSpec(*move.across(along, (None,) * len(target.shape)))
  sharding = jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
  return jax.ShapeDtypeStruct(target.shape, target.dtype, sharding=sharding)


def _on_bits(function, arrays):
  """Applies `function` to the bits of floating JAX arrays, because XLA on CPUs changes payloads of bfloat16 NaNs."""
  dtype = arrays[0].dtype
  if not (any(isinstance(array, jax.Array) for array in arrays) and jnp.issubdtype(dtype, jnp.floating)):
    return function(arrays)
  bits = jnp.dtype(f"uint{jnp.finfo(dtype).bits}")
  return jax.lax.bitcast_convert_type(function([jax.lax.bitcast_convert_type(array, bits) for array in arrays]), dtype)
