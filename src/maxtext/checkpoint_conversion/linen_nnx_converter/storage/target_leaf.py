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

"""The leaves that Orbax is given to save: what is stored how, and written by us."""

from collections.abc import Mapping
import dataclasses
import itertools
import json
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

Path = abstract_state.Path


@dataclasses.dataclass(frozen=True)
class TargetLeaf:
  """A leaf that Orbax is given to save, whose bytes are written by `framing.save`'s `stream` or `put_encoded`.

  Attributes:
    path: its path.
    shape: its shape.
    dtype: its dtype.
    chunk_shape: the shape of its chunks.
    write_shape: what Orbax's array metadata has as the shape of what a device wrote at once.
    sharding: Orbax's JSON of its sharding, or None.
    ext_metadata: Orbax's further metadata.
    compression: what Orbax's array metadata says of the compression.
    is_streamed: whether `stream` writes it.
  """

  path: Path
  shape: tuple[int, ...]
  dtype: np.dtype
  chunk_shape: tuple[int, ...]
  write_shape: tuple[int, ...]
  sharding: str | None
  ext_metadata: Any
  compression: Mapping[str, Any]
  is_streamed: bool

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * self.dtype.itemsize


# One class for each value type, siblings: Orbax's registry finds a handler by `issubclass`.
class ArrayLeaf(TargetLeaf):
  pass


class NumpyLeaf(TargetLeaf):
  pass


class ScalarLeaf(TargetLeaf):
  pass


_LEAF_TYPES = {reader.JAX_ARRAY: ArrayLeaf, reader.NUMPY_ARRAY: NumpyLeaf, reader.SCALAR: ScalarLeaf}


def target_leaves(
    plan: plan_lib.Plan, source: reader.Checkpoint, routes: Mapping[Path, leaf_routes.Route]
) -> dict[Path, Any]:
  """The leaves to save: what is stored how, as the plan makes it of what the source has stored.

  A target leaf has the chunks of its source leaf: of a layer's, with one layer to a chunk, where layers are stacked. So
  each source chunk is decoded once, no target chunk is written twice, and what is stacked can be sliced by reference.
  """
  leaves = dict(plan.target.leaves)
  for path, route in routes.items():
    move = plan.moves[path]
    origin = source.stored[move.sources[0]]
    written = (route.way != leaf_routes.Way.RESUMED and origin.write_shape) or origin.chunk_shape
    value_type = origin.value_type
    if value_type == reader.SCALAR and move.kind != "copy":
      value_type = reader.NUMPY_ARRAY
    leaves[path] = _LEAF_TYPES[value_type](
        path,
        shape=tuple(plan.target.leaves[path].shape),
        dtype=np.dtype(plan.target.leaves[path].dtype),
        chunk_shape=move.across(origin.chunk_shape, itertools.repeat(1)),
        write_shape=move.across(written, itertools.repeat(1)),
        sharding=origin.sharding and _moved_sharding(origin.sharding, move, len(origin.shape)),
        ext_metadata=origin.ext_metadata,
        compression=origin.compression,
        is_streamed=route.way == leaf_routes.Way.STREAMED,
    )
  return leaves


def _moved_sharding(text: str, move, rank) -> str:
  """Orbax's JSON of a sharding, with the layer axis, which is not sharded, put in or taken out."""
  document = json.loads(text)
  if move.kind == "copy" or "partition_spec" not in document:
    return text
  spec = document["partition_spec"]
  document["partition_spec"] = move.across([*spec, *[None] * (rank - len(spec))], itertools.repeat(None))
  return json.dumps(document)
