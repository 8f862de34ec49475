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

"""Loading and saving whole pytrees: what Python programs call."""

import os
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import targets

PathLike = str | os.PathLike[str]


@remote_files.answered
def load_checkpoint(path: PathLike) -> Any:
  """Loads the pytree of a checkpoint into host memory, whole: nested dicts and lists of NumPy arrays.

  If Tunix has split the state, the items' names are the top-level keys.

  Raises:
    ConversionError: there is no finished checkpoint at `path`.
  """
  location = locations.find_source(path, "path")
  source_files.survey(location.final)
  opening.open_source(location)  # Orbax must not read what this refuses.
  if location.split:
    return {name: opening.restore(location.items / name) for name in location.split}
  return opening.restore(location.items)


@remote_files.answered
def save_checkpoint(state: Any, path: PathLike) -> None:
  """Saves a pytree of arrays as a folder of its own.

  Raises:
    TargetError: something is at `path` already.
  """
  directory = locations.absolute(path)
  targets.check_free(locations.Location(directory), overwrite=False)
  orbax_writer.check_target(directory, use_ocdbt=True)
  opening.save_tree(directory, state)
