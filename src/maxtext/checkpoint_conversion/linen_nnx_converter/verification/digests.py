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

"""Digests of leaves, and the file beside the target's `_METADATA` that keeps them.

A leaf is cut into blocks, and its digest is the SHA-256 of the blocks' SHA-256s in C order. A block is hashed as its
decoded elements in C order, so a digest does not depend on codecs, OCDBT or zarr. Blocks are the chunks where the digest
is taken, so they can be read in any order, each once, in memory that does not grow with the array. Their shape is kept
with the digest, and anyone can compute it again from an `array`, however that is chunked:

  digest = hashlib.sha256()
  for i in np.ndindex(*(-(-size // step) for size, step in zip(array.shape, block))):
    part = array[tuple(slice(n * step, (n + 1) * step) for n, step in zip(i, block))]
    digest.update(hashlib.sha256(part.tobytes()).digest())
"""

import asyncio
from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import itertools
import json
import math
from typing import Any

from etils import epath
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded

Path = abstract_state.Path

FILE = locations.DIGESTS

_MEANING = "sha256 of the sha256s of the blocks' elements, blocks and elements in C order"
_SIZE = hashlib.sha256().digest_size


@dataclasses.dataclass(frozen=True)
class Digest:
  """The digest of a leaf.

  Attributes:
    shape: the leaf's shape.
    dtype: the name of its dtype.
    block: the shape of the blocks; the last ones end where the array does.
    sha256: the digest, in hexadecimal.
  """

  shape: tuple[int, ...]
  dtype: str
  block: tuple[int, ...]
  sha256: str


class LeafHash:
  """Computes a leaf's digest from boxes of it, in any order and in several threads."""

  def __init__(self, shape: tuple[int, ...], block: tuple[int, ...]):
    self._shape, self._block = shape, tuple(max(1, step) for step in block)
    self._grid = tuple(-(-size // step) for size, step in zip(self._shape, self._block))
    self._blocks = bytearray(_SIZE * math.prod(self._grid))
    self._seen = bytearray(math.prod(self._grid))

  def has_whole_blocks(self, box: decoded.Box) -> bool:
    """Whether a box cuts no block."""
    sides = zip(box, self._block, self._shape)
    return all(low % step == 0 and (high % step == 0 or high == size) for (low, high), step, size in sides)

  def add(self, box: decoded.Box, values: np.ndarray):
    """Hashes the blocks of a box of whole blocks."""
    for start in itertools.product(*(range(low, high, step) for (low, high), step in zip(box, self._block))):
      inside = [slice(at - low, at - low + step) for at, (low, _), step in zip(start, box, self._block)]
      place = tuple(at // step for at, step in zip(start, self._block))
      number = int(np.ravel_multi_index(place, self._grid)) if place else 0
      elements = np.ascontiguousarray(values[tuple(inside)])  # No copy, as `tobytes` makes, of what lies so already.
      block = hashlib.sha256(elements.reshape(-1).view(np.uint8)).digest()
      self._blocks[number * _SIZE : (number + 1) * _SIZE] = block
      self._seen[number] = 1

  def is_begun(self) -> bool:
    """Whether a box has been added."""
    return any(self._seen)

  def is_whole(self) -> bool:
    """Whether all boxes have been added."""
    return all(self._seen)

  def parts(self) -> dict[int, str]:
    """The SHA-256 of each block that was added, in hexadecimal, by number."""
    of = lambda number: self._blocks[number * _SIZE : (number + 1) * _SIZE].hex()
    return {number: of(number) for number, seen in enumerate(self._seen) if seen}

  def merge(self, parts: Mapping[str, str]):
    """Adds blocks that another process has hashed."""
    for number, block in ((int(number), bytes.fromhex(digits)) for number, digits in parts.items()):
      self._blocks[number * _SIZE : (number + 1) * _SIZE] = block
      self._seen[number] = 1

  def digest(self, dtype: np.dtype) -> Digest:
    """The digest, once all boxes have been added."""
    if not self.is_whole():
      raise ValueError(f"{self._seen.count(0)} blocks of a leaf were never read")
    return Digest(self._shape, str(dtype), self._block, hashlib.sha256(self._blocks).hexdigest())


class Collector:
  """Computes the digests of many leaves while they are read."""

  def __init__(self, leaves: Mapping[Path, Any], blocks: Mapping[Path, tuple[int, ...]]):
    """Begins without any digest.

    Args:
      leaves: leaves with a `shape` and a `dtype`.
      blocks: the block shapes of those that will be read.
    """
    self._leaves = leaves
    self._hashes = {path: LeafHash(leaves[path].shape, block) for path, block in blocks.items()}
    self._cut: set[Path] = set()

  def add(self, path: Path, box: decoded.Box, values: np.ndarray):
    """Adds the values in a box of a leaf."""
    if self._hashes[path].has_whole_blocks(box):
      self._hashes[path].add(box, values)
    else:
      self._cut.add(path)

  def parts(self) -> dict[str, Any]:
    """What was read so far, to be merged with what other processes read."""
    read = {".".join(path): leaf.parts() for path, leaf in self._hashes.items() if leaf.is_begun()}
    return {"read": read, "cut": sorted(".".join(path) for path in self._cut)}

  def merge(self, parts: Mapping[str, Any]):
    """Adds what another process has read of the same leaves."""
    paths = {".".join(path): path for path in self._hashes}
    self._cut.update(paths[name] for name in parts["cut"])
    for name, some in parts["read"].items():
      self._hashes[paths[name]].merge(some)

  def digests(self) -> dict[Path, Digest]:
    """The digests of leaves that were read whole, in boxes of whole blocks."""
    whole = {path: leaf for path, leaf in self._hashes.items() if path not in self._cut and leaf.is_whole()}
    return {path: leaf.digest(self._leaves[path].dtype) for path, leaf in whole.items()}


async def take(
    array: Any, block: tuple[int, ...], *, memory_budget: memory.Budget, on_read: Callable[[int], None]
) -> Digest:
  """Reads an array and computes its digest.

  Args:
    array: a `ts.TensorStore`.
    block: the shape of the blocks.
    memory_budget: what may be held; a block is held whole.
    on_read: called with the bytes read.
  """
  leaf, dtype = LeafHash(array.shape, block), array.dtype.numpy_dtype
  for box in decoded.boxes(array.shape, [max(1, step) for step in block], memory_budget.box // dtype.itemsize):
    values = await array[decoded.as_slices(box)].read()
    await asyncio.to_thread(leaf.add, box, values)
    on_read(values.nbytes)
  return leaf.digest(dtype)


def write(folder: epath.Path, digests: Mapping[str, Digest]):
  """Writes the file of a pytree's digests into its folder."""
  leaves = {name: dataclasses.asdict(digest) for name, digest in digests.items()}
  (folder / FILE).write_text(json.dumps({"digest": _MEANING, "leaves": leaves, "sha256": _checksum(leaves)}))


def read(folder: epath.Path) -> dict[str, Digest]:
  """Reads the file of a pytree's digests.

  Raises:
    NotACheckpointError: there is none.
    VerificationError: it is damaged.
  """
  path = folder / FILE
  if not path.exists():
    raise errors.NotACheckpointError(
        folder,
        f"{FILE}, the digests that the converter keeps with a target that it verifies",
        "none",
        "Nothing was verified: compare it with its source, or convert anew with --verify=full.",
    )
  try:
    document = source_files.read_json(path)
    if document["digest"] != _MEANING or document["sha256"] != _checksum(document["leaves"]):
      raise ValueError("digests that are not those that were written")
    return {
        name: Digest(tuple(leaf["shape"]), leaf["dtype"], tuple(leaf["block"]), leaf["sha256"])
        for name, leaf in document["leaves"].items()
    }
  except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
    errors.check_access(path, e)
    raise errors.VerificationError(
        path, "the digests that were written", f"{e}"[:200], "The disk is not to be trusted."
    ) from e


def _checksum(leaves) -> str:
  return hashlib.sha256(json.dumps(leaves, sort_keys=True).encode()).hexdigest()
