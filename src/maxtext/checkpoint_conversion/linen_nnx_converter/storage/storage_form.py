# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""How the arrays of a target are stored, where that differs from the source."""

import dataclasses
import sys
from typing import Any, Self

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader


@dataclasses.dataclass(frozen=True)
class StorageForm:
  """How the arrays of a target are stored.

  Attributes:
    use_ocdbt: whether they go into an OCDBT store.
    use_zarr3: whether they are zarr 3.
    compression: `zstd` or `none`; None leaves encoded chunks as they are, and uses zstd for the others.
    chunk_byte_size: the wanted, and largest, size of a chunk; None keeps the source's chunks, except small ones that are
      streamed.
    data_file_size: bytes per OCDBT data file; None is Orbax's choice for what is written, and leaves files that are
      linked or copied as they are.
  """

  use_ocdbt: bool
  use_zarr3: bool
  compression: str | None = None
  chunk_byte_size: int | None = None
  data_file_size: int | None = None

  @classmethod
  def of(cls, options: Any, source: reader.Checkpoint) -> Self:
    """What an `options.Options` asks for, or else what the source is.

    Raises:
      OptionError: a size of data files is given, but there will be no new ones.
    """
    use_ocdbt = source.use_ocdbt if options.use_ocdbt is None else options.use_ocdbt
    use_zarr3 = source.use_zarr3 if options.use_zarr3 is None else options.use_zarr3
    size = options.target_data_file_size
    if size is not None and (not use_ocdbt or options.copy_mode == "link"):
      found = "--copy_mode=link" if use_ocdbt else "a target without OCDBT"
      raise errors.OptionError("--target_data_file_size", "new data files of OCDBT", found, "Leave one of them out.")
    return cls(use_ocdbt, use_zarr3, options.compression, options.chunk_byte_size, size)

  @property
  def most_chunk_bytes(self) -> int:
    """The largest size of a chunk; a data file holds whole chunks."""
    return min(self.chunk_byte_size or sys.maxsize, self.data_file_size or sys.maxsize)
