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

"""The steps of a checkpoints folder: how large each is, and whether it is whole."""

from collections.abc import Iterator
import dataclasses
import os
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files


@dataclasses.dataclass(frozen=True)
class Step:
  """A step: its folder's name, the bytes of its files, and what is wrong with it, or ""."""

  name: str
  nbytes: int
  problem: str


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a folder, by their numbers."""

  path: str
  steps: tuple[Step, ...]

  @property
  def problems(self) -> tuple[str, ...]:
    return tuple(step.problem for step in self.steps if step.problem)

  def lines(self) -> Iterator[str]:
    """The list for a person."""
    yield f"{self.path}  ({len(self.steps)} steps)"
    for step in self.steps:
      yield f"  {step.name:>8}  {step.nbytes / 2**20:>12,.1f} MiB  {step.problem or 'whole, as far as its metadata tell'}"

  def as_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def listed(path: str | os.PathLike[str]) -> Steps:
  """The steps of the checkpoints folder at `path`.

  Raises:
    NotACheckpointError: it holds no step.
  """
  folder = locations.absolute(path)
  locations.find_source(path)
  steps = [child for child in remote_files.children(folder) if locations.is_step(child.name) and child.is_dir()]
  if not steps:
    raise errors.NotACheckpointError(folder, "a folder of steps", "none", "Leave out --steps.")
  steps.sort(key=lambda step: int(step.name))
  return Steps(os.fspath(folder), tuple(Step(step.name, _nbytes(step), _problem(step)) for step in steps))


def _problem(step) -> str:
  """What stands in the way of opening a step; ""."""
  try:
    opening.open_source(locations.find_source(step))
    return ""
  except errors.ConversionError as e:
    return str(e)


def _nbytes(folder) -> int:
  """The bytes of all files below a folder."""
  children = remote_files.children(folder)
  return sum(_nbytes(child) if child.is_dir() else child.stat().length for child in children)
