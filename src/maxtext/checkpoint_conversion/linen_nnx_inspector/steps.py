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

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files


@dataclasses.dataclass(frozen=True)
class Step:
  """A step: its folder's name, the bytes of its files, and what is wrong with it; "" if nothing is."""

  name: str
  nbytes: int
  problem: str


@dataclasses.dataclass(frozen=True)
class Steps:
  """The steps of a folder, by number, including unfinished ones."""

  path: str
  steps: tuple[Step, ...]

  @property
  def problems(self) -> tuple[str, ...]:
    return tuple(step.problem for step in self.steps if step.problem)

  def lines(self) -> Iterator[str]:
    """The list for a person."""
    yield errors.escaped(f"{self.path}  ({folding.count(len(self.steps), 'step')})")
    width = max(len(step.name) for step in self.steps)
    for step in self.steps:
      said = step.problem or "whole, as far as its metadata tell"
      yield errors.escaped(f"  {step.name:>{width}}  {folding.size(step.nbytes):>11}  {said}")


def listed(path: str | os.PathLike[str]) -> Steps:
  """The steps of the checkpoints folder at `path`.

  Raises:
    NotACheckpointError: it holds no step.
  """
  folder = locations.absolute(path)
  children = remote_files.children(folder) if folder.is_dir() else []
  steps = [child for child in children if locations.is_step(_number(child)) and child.is_dir()]
  if not steps:
    locations.find_source(path)  # This refuses it if there is nothing, or nothing readable.
    raise errors.NotACheckpointError(folder, "a folder of steps", "none", "Leave out --steps.")
  steps.sort(key=lambda step: (int(_number(step)), step.name))
  return Steps(os.fspath(folder), tuple(Step(step.name, _nbytes(step), _problem(step)) for step in steps))


def _number(step) -> str:
  """The number of a step's folder: the first part of its name while Orbax was still writing it."""
  return step.name.partition(".")[0] if locations.is_temporary(step.name) else step.name


def _problem(step) -> str:
  """What a step lacks, or "" if it is whole."""
  try:
    location = locations.find_source(step)
    location.step_metadata()
    opening.check_whole(opening.open_source(location))
    return ""
  except errors.ConversionError as e:
    return str(e)


def _nbytes(folder) -> int:
  """The bytes of all files below a folder."""
  children = remote_files.children(folder)
  return sum(_nbytes(child) if child.is_dir() else child.stat().length for child in children)
