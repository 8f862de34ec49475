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

"""Where a checkpoint stands: the spellings of a path that users have at hand.

`…/checkpoints` (its latest step), `…/checkpoints/2`, `…/checkpoints/2/items`, or a folder that is itself a pytree. A step
of Tunix has `model_params` and `optimizer_state` in place of `items`.
"""

import dataclasses
import json
import os
from typing import Any

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import key_values
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter import staging

_ITEMS = "items"  # MaxText's name for the item that holds the train state.
_METADATA = "_METADATA"
_STEP_METADATA = "_CHECKPOINT_METADATA"
_PROCESS_METADATA = "process_metadata"
_TEMPORARY = ".orbax-checkpoint-tmp"
# Files of a step folder that are no items: Orbax writes them anew.
_STEP_FILES = frozenset({_STEP_METADATA, "commit_success.txt"})


@dataclasses.dataclass(frozen=True)
class Location:
  """A checkpoint's place.

  Attributes:
    items: the folder of the pytree, or of the pytrees over which the train state is split.
    step_folder: the folder that holds it and its sibling items; None where the pytree stands alone.
    split: the names of the pytrees over which Tunix splits the train state; () where it is one pytree.
    step: the number of the step, where the step folder's name is one.
  """

  items: epath.Path
  step_folder: epath.Path | None = None
  split: tuple[str, ...] = ()

  @property
  def step(self) -> int | None:
    if self.step_folder is None or not _is_step(self.step_folder.name):
      return None
    return int(self.step_folder.name)

  @property
  def final(self) -> epath.Path:
    """The folder that appears or is replaced as a whole."""
    return self.step_folder or self.items

  def siblings(self) -> list[epath.Path]:
    """The other items of the step, such as `iter`."""
    if self.step_folder is None:
      return []
    own = set(layouts.TUNIX_ITEMS) if self.split else {self.items.name}
    return sorted(p for p in remote_files.children(self.step_folder) if p.name not in _STEP_FILES | own)

  def step_metadata(self) -> dict[str, Any]:
    """Orbax's metadata of the step; empty where there is none, as before Orbax 0.11.

    Raises:
      UnfinishedCheckpointError: it makes no sense.
    """
    path = self.final / _STEP_METADATA
    try:
      document = source_files.read_json(path, {})
      if not isinstance(document.get("custom_metadata") or {}, dict):
        raise ValueError("its custom_metadata are no JSON object")
      return document
    except (ValueError, RecursionError, OSError) as e:
      raise errors.UnfinishedCheckpointError(
          path,
          expected="metadata that Orbax can read",
          found=f"{type(e).__name__}: {e}"[:300],
          remedy="The checkpoint is damaged or was never committed: use another step.",
      ) from e

  def custom_metadata(self) -> dict[str, Any]:
    return self.step_metadata().get("custom_metadata") or {}


def update_step_metadata(folder: epath.Path, item_handlers: dict[str, str], custom_metadata: dict[str, Any]):
  """Adds to the metadata that Orbax wrote into the (temporary) step folder."""
  path = folder / _STEP_METADATA
  document = json.loads(path.read_text())
  if isinstance(document.get("item_handlers"), dict):
    document["item_handlers"] |= item_handlers
  document["custom_metadata"] = (document.get("custom_metadata") or {}) | custom_metadata
  path.write_text(json.dumps(document))


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """An absolute path; a URL such as `gs://…` is one already.

  Raises:
    TargetError: a URL of storage that Orbax does not know. Up to 0.12.4 it takes any but `gs://` for a relative path.
    PathNameError: it has a name that TensorStore would not take as it stands.
  """
  text = os.fspath(path)
  if remote_files.is_remote(text) and not text.startswith("gs://"):
    raise errors.TargetError(
        text,
        expected="a local path or gs://",
        found=f"{text.split('://')[0]}://, which Orbax neither reads nor writes",
        remedy="Give a path without it, or copy the checkpoint to local storage or to gs:// first.",
    )
  if remote_files.is_remote(text):
    return epath.Path(text)
  path = epath.Path(os.path.realpath(text))
  key_values.check_place(path)
  return path


def find_source(path: str | os.PathLike[str]) -> Location:
  """The checkpoint at `path`.

  Raises:
    SourceNotFoundError: there is no such path.
    NotACheckpointError: it is no Orbax checkpoint of a pytree, or holds several.
    UnfinishedCheckpointError: it was never committed.
  """
  path = absolute(path)
  if not path.exists():
    raise errors.SourceNotFoundError(path, expected="a checkpoint", found="nothing", remedy="Check --source_path.")
  if _TEMPORARY in os.fspath(path):
    raise _unfinished(path, "one of Orbax's temporary folders")
  for folder in (path, path.parent):
    _refuse_local(folder)
  if (path / _METADATA).exists():
    if path.name == layouts.TUNIX_ITEMS[0] and _is_in_step_folder(path):
      return Location(path.parent, path.parent, (path.name,))
    return Location(path, path.parent if _is_in_step_folder(path) else None)
  children = sorted(remote_files.children(path)) if path.is_dir() else []
  if split := _split_items(path, {child.name for child in children}):
    return Location(path, path, split)
  items = [child for child in children if (child / _METADATA).exists() and _TEMPORARY not in child.name]
  if items:
    return Location(_the_item(path, items), path)
  if steps := [child for child in children if _is_step(child.name) and child.is_dir()]:
    return find_source(max(steps, key=lambda step: int(step.name)))
  if unfinished := next((p for p in children if _TEMPORARY in p.name or p.name in (_ITEMS, "manifest.ocdbt", "d")), None):
    raise _unfinished(path, f"no {_METADATA}, but {unfinished.name}")
  raise errors.NotACheckpointError(
      path,
      expected=f"an Orbax checkpoint of a pytree (a folder with {_METADATA})",
      found=", ".join(child.name for child in children[:5]) or ("an empty folder" if path.is_dir() else "a file"),
      remedy="Give --source_path=…/checkpoints, …/checkpoints/<step> or …/checkpoints/<step>/items.",
  )


def find_target(path: str | os.PathLike[str], source: Location) -> Location:
  """The place that has the shape of the source: `<path>/<step>/items`, or `<path>` for a pytree that stands alone.

  A path that names the step or the items folder already, as `…/2` or `…/2/items`, is taken as it is. Tunix's step N is
  MaxText's N - 1: Tunix counts the steps that are done, MaxText's folders from 0.

  Raises:
    StepError: there is no such step in MaxText.
  """
  path = absolute(path)
  if source.step_folder is None:
    return Location(path)
  items, step = (_ITEMS if source.split else source.items.name), source.step
  if path.name == items:
    return Location(path, path.parent)
  if step is None or _is_step(path.name):
    return Location(path / items, path)
  if source.split and step == 0:
    raise errors.StepError(
        source.final, expected="a step of Tunix, at least 1", found="0", remedy="Use another step of this run."
    )
  step_folder = path / str(step - 1 if source.split else step)
  return Location(step_folder / items, step_folder)


def check_apart(source_path, source: Location, target_path, target: Location):
  """Refuses a target that overlaps the source, or whose name is too long.

  Raises:
    TargetError: one of these.
  """
  staging.check_name(target.final)
  given, wanted = absolute(source_path), absolute(target_path)
  for inner, outer in ((wanted, given), (given, wanted), (target.final, source.final)):
    if inner == outer or outer in inner.parents:
      raise errors.TargetError(
          wanted,
          expected="a target apart from the source",
          found=f"{inner} inside {outer}" if inner != outer else "the source itself",
          remedy="Choose another --target_path.",
      )


def check_free(final: epath.Path, *, overwrite: bool):
  """Refuses a folder that exists, unless it is empty, or that cannot be made.

  Raises:
    TargetError: one of these.
  """
  if final.exists() and not _is_empty_folder(final) and not overwrite:
    raise errors.TargetError(
        final,
        expected="nothing there yet",
        found="an existing path",
        remedy="Choose another --target_path or pass --overwrite.",
    )
  if remote_files.is_remote(final):
    return
  ancestor = next(parent for parent in final.parents if parent.exists())
  if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
    raise errors.TargetError(
        final,
        expected="a place that can be written",
        found=f"{ancestor}, which is no writable folder",
        remedy="Choose another --target_path.",
    )


def copy_tree(source: epath.Path, target: epath.Path):
  """Copies a file, or a folder with all that is in it."""
  if not source.is_dir():
    source.copy(target)
    return
  target.mkdir()
  for child in remote_files.children(source):
    copy_tree(child, target / child.name)


def _refuse_local(folder):
  """Refuses what Orbax's emergency checkpoint manager keeps on the disk of each host."""
  if (folder / _PROCESS_METADATA).exists():
    raise errors.NotACheckpointError(
        folder,
        expected="a whole checkpoint",
        found=f"{_PROCESS_METADATA}, so one host's local part of an emergency checkpoint",
        remedy="Convert a step of the run's persistent checkpoints.",
    )


def _is_empty_folder(path) -> bool:
  return path.is_dir() and not remote_files.children(path)


def _is_step(name: str) -> bool:
  return name.isascii() and name.isdigit()


def _is_in_step_folder(path) -> bool:
  """Whether the pytree at `path` is an item of a step, not a checkpoint of its own."""
  if (path / _STEP_METADATA).exists():
    return False
  return (path.parent / _STEP_METADATA).exists() or (path.name == _ITEMS and _is_step(path.parent.name))


def _split_items(path, names) -> tuple[str, ...]:
  """The items of Tunix's that this step has, or should have by its metadata."""
  if _ITEMS in names or not names & set(layouts.TUNIX_ITEMS):
    return ()
  handlers = Location(path, path).step_metadata().get("item_handlers")
  expected = set(handlers) if isinstance(handlers, dict) else set()
  return tuple(name for name in layouts.TUNIX_ITEMS if name in names | expected)


def _the_item(path, items) -> epath.Path:
  """MaxText's `items`, or the only pytree there is, such as Orbax v1's `pytree`."""
  named = [item for item in items if item.name == _ITEMS] or items
  if len(named) == 1:
    return named[0]
  raise errors.NotACheckpointError(
      path,
      expected=f"one pytree, or one named {_ITEMS}",
      found=", ".join(item.name for item in named),
      remedy="Give the path of one of them.",
  )


def _unfinished(path, found) -> errors.UnfinishedCheckpointError:
  return errors.UnfinishedCheckpointError(
      path, expected="a finished checkpoint", found=found, remedy="It was never committed: use another step."
  )
