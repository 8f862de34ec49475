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

"""Makes checkpoints of any size in little memory: Linen train states with adamw, of random bits or of normal weights."""

import asyncio
from collections.abc import Iterator
import dataclasses
import functools
import math
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

TREES = 3  # The params, and adamw's mu and nu.
_LAYERS, _ROWS = 16, 1024
_SMALL_LAYERS, _SMALL_WEIGHTS = 101, 66  # 3 * 101 * 66 and two scalars are 20,000 leaves.
_MOST_NUMBERS = 2**20
_BYTES_AT_ONCE = TREES * 128 * 2**20


@dataclasses.dataclass(frozen=True)
class Weight:
  """An array of bfloat16 that is made when it is written.

  Attributes:
    shape: its shape; axis 1 of three is the layer axis.
    number: tells it from all others of its tree.
    tree: the tree that it is of.
    layer: which layer it is, unless it has all.
    layers: how many layers there are, unless it has all.
    is_normal: whether its values are normally distributed, else random bits.
  """

  shape: tuple[int, ...]
  number: int
  tree: int
  layer: int
  layers: int
  is_normal: bool

  @property
  def nbytes(self) -> int:
    return 2 * math.prod(self.shape)

  def make(self) -> np.ndarray:
    """Random numbers: never the same for two layers of a weight, so that they do not compress when stacked."""
    size = math.prod(self.shape)
    begin = TREES * self.number + self.tree + self.layer * size
    return _random(size * self.layers + _MOST_NUMBERS, self.is_normal)[begin : begin + size].reshape(self.shape)


class _WeightHandler(ocp.type_handlers.NumpyHandler):
  """Makes and saves some weights after the other, each with its moments: in life they share data files."""

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    order = sorted(zip(values, infos, args), key=lambda each: (each[0].number, each[0].tree))
    for some in _batches(order):
      values, infos, args = zip(*some)
      for future in await super().serialize([value.make() for value in values], infos, args):
        await asyncio.to_thread(future.result)
    return []

  def memory_size(self, values):
    return [(value.nbytes, value.nbytes) for value in values]


def save(folder: pathlib.Path, *, gib: float, is_scanned: bool, leaf_mib: int, is_normal: bool):
  """Saves a train state as MaxText's Linen trainer arranges it, in OCDBT and zarr 3, which are MaxText's defaults.

  Each leaf is one chunk, with all its layers where they are scanned: so one host writes it.

  Args:
    folder: where to.
    gib: the size of all arrays.
    is_scanned: whether the layers are scanned.
    leaf_mib: about the size of a leaf that is scanned; 0 for 20,000 leaves that are not.
    is_normal: whether the values are normally distributed, else random bits.
  """
  weights = max(1, round(gib * 1024 / leaf_mib / TREES)) if leaf_mib else _SMALL_WEIGHTS
  layers = _LAYERS if leaf_mib else _SMALL_LAYERS
  elements = gib * 2**30 / (2 * TREES * layers * weights)
  rows = _ROWS if leaf_mib else math.isqrt(int(elements))
  shape = (rows, int(elements / rows))

  def layer(tree, i):
    place = (0, 1) if is_scanned else (i, layers)
    return {f"w_{j}": {"kernel": Weight(shape, weights * i + j, tree, *place, is_normal)} for j in range(weights)}

  if is_scanned:
    shape = (shape[0], layers, shape[1])
  decoder = lambda t: {"layers": layer(t, 0)} if is_scanned else {f"layers_{i}": layer(t, i) for i in range(layers)}
  tree = lambda number: {"params": {"decoder": decoder(number)}}
  count = np.array(1, np.int32)
  state = {"params": tree(0), "opt_state": [{"count": count, "mu": tree(1), "nu": tree(2)}, None], "step": count}
  registry = ocp.type_handlers.create_type_handler_registry(
      (Weight, _WeightHandler()), (np.ndarray, ocp.type_handlers.NumpyHandler())
  )
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_zarr3=True, type_handler_registry=registry)
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(folder, args=ocp.args.PyTreeSave(state))


@functools.lru_cache(maxsize=1)
def _random(size, is_normal) -> np.ndarray:
  random = np.random.default_rng(0)
  if is_normal:
    return (0.02 * random.standard_normal(size, np.float32)).astype(ml_dtypes.bfloat16)
  return np.frombuffer(random.bytes(2 * size), ml_dtypes.bfloat16)


def _batches(order) -> Iterator[list[Any]]:
  """Groups of values, with their like, of together at most `_BYTES_AT_ONCE`, or one."""
  batch, nbytes = [], 0
  for each in order:
    if batch and nbytes + each[0].nbytes > _BYTES_AT_ONCE:
      yield batch
      batch, nbytes = [], 0
    batch.append(each)
    nbytes += each[0].nbytes
  yield batch
