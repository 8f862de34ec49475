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

"""The leaves given to Orbax, whose bytes the converter writes."""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

Path = abstract_state.Path


@dataclasses.dataclass(frozen=True)
class TargetLeaf:
  """A leaf given to Orbax, whose bytes are written by the `stream` or `put_encoded` of `orbax_writer.Content`.

  Attributes:
    path: its path.
    shape: its shape.
    dtype: its dtype.
    chunk_shape: the shape of its chunks.
    write_shape: for Orbax's array metadata, the shape that a device wrote at once.
    sharding: Orbax's JSON of its sharding, or None.
    ext_metadata: Orbax's further metadata.
    compression: for Orbax's array metadata, what they say of the compression.
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


# One class per value type, and siblings, because Orbax's registry finds handlers by `issubclass`.
class ArrayLeaf(TargetLeaf):
  pass


class NumpyLeaf(TargetLeaf):
  pass


class ScalarLeaf(TargetLeaf):
  pass
