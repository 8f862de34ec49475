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

"""Where a target goes, and what may be there.

What a path means depends on what is there, and on its name only if nothing is. `--overwrite` replaces one checkpoint of
the shape that is written, and nothing else: whatever else would be lost is named.
"""

from collections.abc import Collection
import os

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files

Location = locations.Location

_CHECKPOINTS = "checkpoints"  # MaxText's name for the folder of a run's steps.
_INDICATOR = "orbax.checkpoint"  # Orbax v1's file in the folders that it saves.
# What Orbax writes into a pytree's folder, and the converter.
_OF_A_PYTREE = locations.STEP_FILES | {
    locations.METADATA,
    *("_sharding", "_strings.json", "array_metadatas", "checkpoint", "d", "manifest.ocdbt"),
    *(_INDICATOR, locations.DIGESTS, *layouts.TUNIX_ITEMS),
}
_STORE_OF_A_PROCESS = "ocdbt.process_"
_MOST_NAMES = 5  # Listed in a message.


def find_target(
    path: str | os.PathLike[str], source: Location, *, for_release: bool = False, split: tuple[str, ...] = ()
) -> Location:
  """The place with the source's shape: `<path>/<step>/items`, or `<path>` for a pytree by itself.

  A path that already names the step or the items folder, as `…/checkpoints/2` or `…/2/items`, is taken as it is. Tunix's
  step N is MaxText's N - 1: Tunix counts finished steps, MaxText counts from 0.

  Args:
    path: where to.
    source: the source.
    for_release: whether a MaxText release will resume from it, so that its item is MaxText's `items`.
    split: the names of the pytrees over which the target is split, for Tunix.

  Raises:
    StepError: MaxText has no such step, or Tunix would not count it.
    TargetError: the step has another item with the name of the target's.
    PathNameError: the path has a name that marks what was never committed.
  """
  path = locations.absolute(path)
  if locations.is_temporary(os.fspath(path)):
    raise errors.PathNameError(
        path, "a path that no reader takes for an unfinished one", path.name, "Choose another --target_path."
    )
  if remote_files.is_remote(path):
    source_files.check_readable(path)
  if split:
    return _find_split(path, source, split)
  if source.step_folder is None:
    return Location(path)
  item = locations.ITEMS if source.split or for_release else source.items.name
  if not _holds_steps(path) and path.name in (item, locations.ITEMS):
    item, step_folder = path.name, path.parent
  elif source.step is None or _is_meant_as_a_step(path, item, source.step):
    step_folder = path
  else:
    step_folder = path / step_name(source)
  _refuse_taken((item,), source, f"Convert {item}, or give neither a config nor a release.")
  return Location(step_folder / item, step_folder)


def _find_split(path, source, split) -> Location:
  """Tunix's step, whose folder's name is the number of finished steps."""
  _refuse_unnumbered(source)
  _refuse_taken(split, source, "Leave out --target_layout.")
  name = _renumbered(source.name, int(source.name) + 1)
  step_folder = path if _is_meant_as_a_step(path, split[0], int(name)) else path / name
  target = Location(step_folder, step_folder, split)
  _refuse_unnumbered(target)
  return target


def _refuse_unnumbered(location):
  if not locations.is_step(location.name):
    expected = "a step's folder, named by its number, as these trainers' are"
    raise errors.StepError(location.final, expected, location.name, "Give it under its number.")


def _refuse_taken(items, source, remedy):
  """Refuses a source whose other items have the names that its train state gets in the target."""
  if taken := sorted({sibling.name for sibling in source.siblings()} & set(items)):
    raise errors.TargetError(
        source.final / taken[0],
        f"no other item of the name that {source.items.name} gets in the target",
        "one",
        remedy,
    )


def _renumbered(name: str, step: int) -> str:
  """The step, padded with zeros like the name of another one."""
  return str(step).zfill(len(name) if name.startswith("0") else 0)


def step_name(source: Location) -> str:
  """The name of the step's folder if the path does not give one: the source's, or MaxText's for Tunix's.

  Raises:
    StepError: MaxText has no such step.
  """
  if not source.split:
    return source.name
  if source.updates < 1:
    raise errors.StepError(
        source.final, "a step of Tunix, at least 1", str(source.updates), "Use another step of this run."
    )
  return _renumbered(source.name, source.updates - 1)


def notes(path: str | os.PathLike[str], source: Location, target: Location) -> tuple[str, ...]:
  """Notes for a person: on a step that the target's path names, and on the items that are copied."""
  found = []
  if source.step is not None and target.step is not None and locations.absolute(path) == target.final:
    found.append(f"step {source.name} becomes step {target.name}, as --target_path names it")
  if items := [sibling.name for sibling in source.siblings() if sibling.is_dir()]:
    found.append(f"with {', '.join(items)}")
  return tuple(found)


def check_apart(source_path, source: Location, target_path, target: Location):
  """Refuses a target that overlaps the source, or whose name is too long.

  Raises:
    TargetError: one of these.
  """
  atomic_target.check_name(target.final)
  given, wanted = locations.absolute(source_path), locations.absolute(target_path)
  for inner, outer in ((wanted, given), (given, wanted), (target.final, source.final)):
    if inner == outer or outer in inner.parents:
      raise errors.TargetError(
          wanted, "a target apart from the source", f"{inner} inside {outer}" if inner != outer else "the source itself"
      )


def check_free(target: Location, *, overwrite: bool, carried: Collection[str] = ()):
  """Refuses a place that cannot be made, or that holds something that must not be replaced. An empty folder may be.

  Args:
    target: the place.
    overwrite: whether one checkpoint may be replaced.
    carried: the names of the items that the target gets besides its pytree.

  Raises:
    TargetError: one of these.
  """
  final = target.final
  if not _is_free(final):
    if atomic_target.is_left(final):
      found = "what a conversion is making, or was when it was killed"
      raise errors.TargetError(final, "nothing there yet", found, "If none is under way, go on from there with --resume.")
    if not overwrite:
      raise errors.TargetError(
          final, "nothing there yet", "an existing path", "Choose another --target_path or pass --overwrite."
      )
    if found := _in_the_way(target, carried):
      raise errors.TargetError(
          final,
          f"one checkpoint to replace, a {'pytree' if target.step_folder is None else 'step'}, and nothing else",
          found,
          "Choose another --target_path, or move away by hand what stands there.",
      )
  if not remote_files.is_remote(final):
    _check_writable(final)


def can_link(source: epath.Path, target: epath.Path) -> bool:
  """Whether files in a folder can be linked to a place: both are local and on one file system."""
  if remote_files.is_remote(source) or remote_files.is_remote(target):
    return False
  return os.stat(source).st_dev == os.stat(nearest(target)).st_dev


def nearest(final: epath.Path) -> epath.Path:
  """The nearest existing folder above a place."""
  return next(parent for parent in final.parents if parent.exists())


def _check_writable(final):
  ancestor = nearest(final)
  if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
    raise errors.TargetError(final, "a place that can be written", f"{ancestor}, which is no writable folder")


def _is_free(final) -> bool:
  return not _is_link(final) and (not final.exists() or (final.is_dir() and not remote_files.children(final)))


def _is_link(path) -> bool:
  return not remote_files.is_remote(path) and os.path.islink(path)


def _is_meant_as_a_step(path, item, step) -> bool:
  """Whether a path that does not end in the item's name is the step's own."""
  if _holds_steps(path):
    return False
  if _is_checkpoint(path, item):
    return True  # To be replaced, or refused.
  if not locations.is_step(path.name):
    return False
  return int(path.name) == step or path.parent.name == _CHECKPOINTS or _holds_steps(path.parent)


def _holds_steps(folder) -> bool:
  """Whether a folder holds steps: a folder in it that is named by digits is a checkpoint."""
  return any(_is_checkpoint(child) for child in _steps(folder))


def _steps(folder) -> list[epath.Path]:
  steps = (child for child in remote_files.children(folder) if locations.is_step(child.name))
  return sorted(steps, key=lambda child: int(child.name))


def _is_checkpoint(folder, item: str = locations.ITEMS) -> bool:
  """Whether Orbax saved a step or a pytree here; before 0.11 it wrote no metadata of the step."""
  names = {child.name for child in remote_files.children(folder)}
  places = {item, locations.ITEMS, *locations.STATE_ITEMS, *layouts.TUNIX_ITEMS} & names
  is_marked = bool({locations.STEP_METADATA, locations.METADATA} & names)
  return is_marked or any((folder / place / locations.METADATA).exists() for place in places)


def _in_the_way(target, carried) -> str:
  """What is at the target besides one checkpoint of its shape; "" if nothing is."""
  final = target.final
  if _is_link(final):
    return f"a symbolic link to {os.readlink(final)}"
  if not final.is_dir():
    return "a file"
  names = {child.name for child in remote_files.children(final)}
  if steps := [step.name for step in _steps(final) if _is_checkpoint(step)]:
    return f"a folder of steps: {_listed(steps)}"
  if target.step_folder is None:
    if locations.is_in_step_folder(final):
      return f"an item of the step {final.parent}"
    return _beside_a_pytree(final, names)
  if locations.METADATA in names:
    return "a pytree that stands alone"
  items = [pytree.items for pytree in target.pytrees]
  if strange := names - {item.name for item in items} - {_INDICATOR, *carried} - locations.STEP_FILES:
    return f"{_listed(strange)}, which the target will not have"
  return next(filter(None, map(_in_an_items_way, items)), "")


def _in_an_items_way(item) -> str:
  """What is wrong with an item of a step, or in it besides its pytree; "" if nothing is."""
  if not item.is_dir():
    return f"no folder {item.name}"
  found = _beside_a_pytree(item, {child.name for child in remote_files.children(item)})
  return f"in {item.name}, {found}" if found else ""


def _beside_a_pytree(folder, names) -> str:
  """What is in a folder besides a pytree that Orbax saved."""
  if locations.METADATA not in names:
    return f"no {locations.METADATA}, but {_listed(names)}"
  strange = {name for name in names - _OF_A_PYTREE if not name.startswith(_STORE_OF_A_PROCESS)}
  if strange:
    strange -= _leaf_names(folder)
  return f"{_listed(strange)}, which is no part of a checkpoint" if strange else ""


def _leaf_names(folder) -> set[str]:
  """The names of the arrays' folders, without OCDBT; none if the metadata cannot be parsed."""
  try:
    entries = source_files.read_json(folder / locations.METADATA)["tree_metadata"].values()
    return {".".join(str(key["key"]) for key in entry["key_metadata"]) for entry in entries}
  except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
    return set()


def _listed(names) -> str:
  names = sorted(names, key=lambda name: (len(name), name) if locations.is_step(name) else (0, name))
  return ", ".join(names[:_MOST_NAMES]) + (f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else "")
