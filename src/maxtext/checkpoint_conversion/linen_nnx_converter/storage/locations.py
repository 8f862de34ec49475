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

"""Where a checkpoint is, from any path that users have at hand.

`…/checkpoints` (its latest step), `…/checkpoints/2`, `…/checkpoints/2/items`, or a folder that is itself a pytree.
Tunix's steps have `model_params` and `optimizer_state` instead of `items`.
"""

import dataclasses
import json
import os
from typing import Any

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import training_engine

DIGESTS = "linen_nnx_converter_digests.json"  # The file with the digests of leaves, beside `_METADATA`.
RECORD = "linen_nnx_converter"  # The key of the converter's record in a target's custom metadata.
ITEMS = "items"  # MaxText's name for the item that holds the train state.
# Other names: MaxText's emergency checkpoints and Orbax v1; older Orbax v1; Orbax's emergency manager.
STATE_ITEMS = ("state", "pytree", "default")
METADATA = "_METADATA"
STEP_METADATA = "_CHECKPOINT_METADATA"
_PROCESS_METADATA = "process_metadata"
# In the names of folders that Orbax has not committed. The second marks V1's partial saves, which look like checkpoints
# of a part of the state.
_TEMPORARY = (".orbax-checkpoint-tmp", ".partial_save")
# Files in a step folder that are not items; Orbax writes new ones.
STEP_FILES = frozenset({STEP_METADATA, "commit_success.txt"})


@dataclasses.dataclass(frozen=True)
class Location:
  """A checkpoint's place.

  Attributes:
    items: the folder of the pytree, or of the pytrees over which the train state is split.
    step_folder: the folder of the pytree and its sibling items; None if the pytree is by itself.
    split: the names of the pytrees over which Tunix splits the train state; () if it is one pytree.
    link: the number by which a link leads to the step folder; "" if none does.
    step: the number of the step, if the step folder's name is one.
  """

  items: epath.Path
  step_folder: epath.Path | None = None
  split: tuple[str, ...] = ()
  link: str = ""

  @property
  def name(self) -> str:
    """The name of the folder that appears or is replaced as a whole: for a step, its number as written."""
    return self.link or self.final.name

  @property
  def step(self) -> int | None:
    return int(self.name) if self.step_folder is not None and is_step(self.name) else None

  @property
  def under_way(self) -> str:
    """What shows that MaxText's training engine saved this inside a step; "" for all others."""
    if self.step_folder is None or not self.split:
      return ""
    return training_engine.under_way(
        {child.name for child in remote_files.children(self.step_folder)}, self.custom_metadata()
    )

  @property
  def updates(self) -> int:
    """The finished updates in a step of Tunix or MaxText's training engine, by its folder's name."""
    return (self.step or 0) - bool(self.under_way)

  @property
  def pytrees(self) -> tuple["Location", ...]:
    """The locations of its pytrees."""
    return tuple(Location(self.items / name, self.step_folder) for name in self.split) or (self,)

  @property
  def final(self) -> epath.Path:
    """The folder that appears or is replaced as a whole."""
    return self.step_folder or self.items

  def siblings(self) -> list[epath.Path]:
    """The other items of the step, such as `iter`."""
    if self.step_folder is None:
      return []
    own = {*layouts.TUNIX_ITEMS, training_engine.GRADIENTS} if self.split else {self.items.name}
    return sorted(p for p in remote_files.children(self.step_folder) if p.name not in STEP_FILES | own)

  def step_metadata(self) -> dict[str, Any]:
    """Orbax's metadata of the step; empty if there is none, as before Orbax 0.11.

    Raises:
      UnfinishedCheckpointError: it cannot be parsed.
    """
    path = self.final / STEP_METADATA
    try:
      document = source_files.read_json(path, {})
      if not isinstance(document.get("custom_metadata") or {}, dict):
        raise ValueError("its custom_metadata are no JSON object")
      return document
    except (ValueError, OSError) as e:
      errors.check_access(path, e)
      raise errors.UnfinishedCheckpointError(
          path, "metadata that Orbax can read", f"{type(e).__name__}: {e}"[:300]
      ) from e

  def custom_metadata(self) -> dict[str, Any]:
    return self.step_metadata().get("custom_metadata") or {}


def update_step_metadata(folder: epath.Path, item_handlers: dict[str, str], custom_metadata: dict[str, Any]):
  """Adds to the metadata that Orbax wrote into the (temporary) step folder."""
  path = folder / STEP_METADATA
  document = json.loads(path.read_text())
  if isinstance(document.get("item_handlers"), dict):
    document["item_handlers"] |= item_handlers
  document["custom_metadata"] = (document.get("custom_metadata") or {}) | custom_metadata
  path.write_text(json.dumps(document))


def absolute(path: str | os.PathLike[str]) -> epath.Path:
  """The absolute path; a URL such as `gs://…` is one already.

  Raises:
    TargetError: a URL that Orbax does not support; up to 0.12.4 it takes any but `gs://` for a relative path.
    PathNameError: it is no path, or empty, or begins with `~`, or has a name that TensorStore would not take.
  """
  text = os.fspath(path) if isinstance(path, str | os.PathLike) else path
  if not isinstance(text, str):
    raise errors.PathNameError(errors.shown(path), "a path, as str or os.PathLike", type(text).__name__, "Give one.")
  if text.partition("/")[0] == "~" or not text:
    raise errors.PathNameError(
        text, "a path, which is taken literally", repr(text), "A shell expands no ~ after =: write $HOME, or ./~ for a ~."
    )
  if remote_files.is_remote(text) and not text.startswith("gs://"):
    raise errors.TargetError(
        text,
        "a local path or gs://",
        f"{text.split('://')[0]}://, which Orbax neither reads nor writes",
        "Give a path without it, or copy the checkpoint to local storage or to gs:// first.",
    )
  if remote_files.is_remote(text):
    return epath.Path(text)
  try:
    path = epath.Path(os.path.realpath(text))
  except ValueError as e:
    raise errors.PathNameError(text, "a path of UTF-8 without NUL", errors.one_line(e), "Give another one.") from e
  ocdbt_index.check_place(path)
  return path


def find_source(path: str | os.PathLike[str], flag: str = "--source_path") -> Location:
  """The checkpoint at `path`, which `flag` gives.

  Raises:
    SourceNotFoundError: there is no such path.
    NotACheckpointError: it is not an Orbax checkpoint of a pytree, or holds several, or two of the latest step.
    UnfinishedCheckpointError: it was never committed.
    AccessError: it cannot be read from here.
  """
  given, path = path, absolute(path)
  location = _find_source(path, flag)
  return dataclasses.replace(location, link=location.link or _link(given, location.step_folder))


def _find_source(path, flag) -> Location:
  source_files.check_readable(path)  # To epath, what cannot be read does not exist.
  children = sorted(remote_files.children(path))
  if not path.exists():
    raise errors.SourceNotFoundError(path, "a checkpoint", "nothing", f"Check {flag}.")
  if is_temporary(os.fspath(path)):
    raise _unfinished(path, "one of Orbax's temporary folders")
  for folder in (path, path.parent):
    _refuse_local(folder)
  if (path / METADATA).exists():
    if path.name == training_engine.GRADIENTS and is_in_step_folder(path):
      found = "the gradients that MaxText's training engine has accumulated inside a step"
      raise errors.NotACheckpointError(path, "a train state", found, "Give the step's folder.")
    if path.name == layouts.TUNIX_ITEMS[0] and is_in_step_folder(path):
      return Location(path.parent, path.parent, (path.name,))
    return Location(path, path.parent if is_in_step_folder(path) else None)
  folders = [child for child in children if child.is_dir()]
  remote_files.look_into(folders)
  if split := _split_items(path, {child.name for child in children}):
    return Location(path, path, split)
  items = [child for child in folders if (child / METADATA).exists() and not is_temporary(child.name)]
  if items:
    return Location(_the_item(path, items), path)
  if steps := [child for child in folders if is_step(child.name)]:
    return find_source(_the_latest(path, steps), flag)
  for child in children:
    source_files.check_readable(child)
  if unfinished := next((p for p in children if is_temporary(p.name) or p.name in (ITEMS, "manifest.ocdbt", "d")), None):
    raise _unfinished(path, f"no {METADATA}, but {unfinished.name}")
  raise errors.NotACheckpointError(
      path,
      f"an Orbax checkpoint of a pytree (a folder with {METADATA})",
      ", ".join(child.name for child in children[:5]) or ("an empty folder" if path.is_dir() else "a file"),
      f"Give {flag}=…/checkpoints, …/checkpoints/<step> or …/checkpoints/<step>/items.",
  )


def _link(given, step_folder) -> str:
  """The number by which a link of the given path leads to the step folder; "" if none does."""
  path = epath.Path(os.path.abspath(given))
  links = (link for link in (path, path.parent) if is_step(link.name) and os.path.islink(link))
  return next((link.name for link in links if os.path.realpath(link) == os.fspath(step_folder or "")), "")


def _the_latest(path, steps) -> epath.Path:
  number = max(int(step.name) for step in steps)
  latest = [step for step in steps if int(step.name) == number]
  if len(latest) > 1:
    raise errors.NotACheckpointError(
        path,
        f"one folder of the latest step, {number}",
        " and ".join(step.name for step in latest),
        "Give the path of one of them.",
    )
  return latest[0]


def _refuse_local(folder):
  """Refuses what Orbax's emergency checkpoint manager keeps on each host's disk."""
  if (folder / _PROCESS_METADATA).exists():
    raise errors.NotACheckpointError(
        folder,
        "a whole checkpoint",
        f"{_PROCESS_METADATA}, so one host's local part of an emergency checkpoint",
        "Convert a step of the run's persistent checkpoints.",
    )


def is_step(name: str) -> bool:
  """Whether a folder's name is a step's number."""
  return name.isascii() and name.isdigit()


def is_in_step_folder(path) -> bool:
  """Whether the pytree at `path` is an item of a step rather than a checkpoint of its own."""
  if (path / STEP_METADATA).exists():
    return False
  return (path.parent / STEP_METADATA).exists() or (path.name == ITEMS and is_step(path.parent.name))


def _split_items(path, names) -> tuple[str, ...]:
  """Tunix's items that this step has, or should have according to its metadata."""
  if ITEMS in names or not names & set(layouts.TUNIX_ITEMS):
    return ()
  handlers = Location(path, path).step_metadata().get("item_handlers")
  expected = set(handlers) if isinstance(handlers, dict) else set()
  return tuple(name for name in layouts.TUNIX_ITEMS if name in names | expected)


def _the_item(path, items) -> epath.Path:
  """MaxText's `items`, else the train state by another name, else the only pytree there is."""
  for names in ((ITEMS,), STATE_ITEMS, [item.name for item in items]):
    named = [item for item in items if item.name in names]
    if len(named) == 1:
      return named[0]
  raise errors.NotACheckpointError(
      path,
      f"one pytree, or one named {ITEMS}, or else one of {', '.join(STATE_ITEMS)}",
      ", ".join(item.name for item in named),
      "Give the path of one of them.",
  )


def is_temporary(name: str) -> bool:
  """Whether a folder of this name or path was never committed."""
  return any(mark in name for mark in _TEMPORARY)


def _unfinished(path, found) -> errors.UnfinishedCheckpointError:
  return errors.UnfinishedCheckpointError(
      path, "a finished checkpoint", found, "It was never committed: use another step."
  )
