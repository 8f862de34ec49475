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

"""How each target leaf is stored, by the plan and how the source is stored."""

from collections.abc import Mapping
import itertools
import json
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf

Path = abstract_state.Path

_LEAF_TYPES = {
    reader.JAX_ARRAY: target_leaf.ArrayLeaf,
    reader.NUMPY_ARRAY: target_leaf.NumpyLeaf,
    reader.SCALAR: target_leaf.ScalarLeaf,
}


def target_leaves(
    plan: plan_lib.Plan, source: reader.Checkpoint, routes: Mapping[Path, leaf_routes.Route]
) -> dict[Path, Any]:
  """The leaves to give to Orbax: arrays as `TargetLeaf`s, and all others as they are."""
  leaves = dict(plan.target.leaves)
  for path, route in routes.items():
    move = plan.moves[path]
    origin = source.stored[move.sources[0]]
    is_kept = route.way in (leaf_routes.Way.REFERENCE, leaf_routes.Way.RAW)
    written = origin.write_shape if is_kept else None
    value_type = origin.value_type
    if value_type == reader.SCALAR and move.kind != "copy":
      value_type = reader.NUMPY_ARRAY
    leaves[path] = _LEAF_TYPES[value_type](
        path,
        shape=tuple(plan.target.leaves[path].shape),
        dtype=np.dtype(plan.target.leaves[path].dtype),
        chunk_shape=route.chunk_shape,
        write_shape=move.across(written, itertools.repeat(1)) if written is not None else route.chunk_shape,
        sharding=origin.sharding and _moved_sharding(origin.sharding, move, len(origin.shape)),
        ext_metadata=origin.ext_metadata,
        compression=origin.compression,
        is_streamed=route.way == leaf_routes.Way.STREAMED,
    )
  return leaves


def _moved_sharding(text: str, move, rank) -> str:
  """Orbax's JSON of a sharding, with unsharded layer axes inserted or removed."""
  document = json.loads(text)
  if move.kind == "copy" or "partition_spec" not in document:
    return text
  spec = document["partition_spec"]
  document["partition_spec"] = move.across([*spec, *[None] * (rank - len(spec))], itertools.repeat(None))
  return json.dumps(document)
