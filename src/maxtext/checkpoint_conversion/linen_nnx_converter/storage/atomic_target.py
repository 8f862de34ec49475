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

"""Where a target is made before it appears: beside its place, in a folder that the next run recognises as a leftover.

The folder is `<name>.orbax-checkpoint-tmp-linen_nnx_converter`, which Orbax's tools treat as unfinished. Whoever makes a
target there holds a lock on it, which the system releases whenever the process ends. So an unlocked one was left behind
by a killed run, and a locked one is never touched. For remote storage, see `remote_target`.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import errno
import itertools
import os
import uuid

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import durable
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import folders
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import processes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_target

SUFFIX = ".orbax-checkpoint-tmp-linen_nnx_converter"
_A_DATA_FILE = "/ocdbt.process_0/d/0123456789abcdef0123456789abcdef"
_ORBAX = ".orbax-checkpoint-tmp"  # The end of the name of the folder in which Orbax makes a checkpoint.
_KEPT = f"{_ORBAX}-resumed-"
_OLD = ".replaced"  # The end of the old checkpoint's name, where the two cannot be exchanged at once.


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a target is made: all that is needed to clear up after a stopped process.

  Attributes:
    final: where the target will appear.
    making: the folder in which it is made.
    before: the identity of what is already at `final`; None if nothing is.
    new_parents: how many of its parent folders do not exist yet.
    is_primary: whether this process makes and moves folders.
    others: how many other processes write there.
  """

  final: str
  making: str
  before: str | None
  new_parents: int = 0
  is_primary: bool = True
  others: int = 0


def is_there(place: Place) -> bool:
  """Whether the target was committed: something else is at its place than before."""
  return _identity(epath.Path(place.final)) not in (None, place.before)


def clear_up(place: Place):
  """Removes what a stopped process has left behind, and puts back what it had moved out of the way.

  Raises:
    OSError, TargetError: something cannot be removed.
  """
  final, making = epath.Path(place.final), epath.Path(place.making)
  if not remote_files.is_remote(final):
    if making.exists():
      with _claimed(final) as staging:
        _discard(staging)
  else:
    if making.exists() and not (making == final and is_there(place)):
      folders.remove(making)
    remote_files.remove(_staging(final))
  folders.remove_empty(list(final.parents)[: place.new_parents])


@contextlib.contextmanager
def staged(
    final: epath.Path, *, check_free: Callable[[], None], announce: Callable[[Place], None]
) -> Iterator[epath.Path]:
  """A path at which to make a checkpoint. In the end it takes the place of `final`; if making it fails, nothing is left.

  Args:
    final: where the checkpoint will appear.
    check_free: refuses what must not be replaced there. Called just before that happens; until then it stays whole.
    announce: called with the place before anything is made.

  Of several processes, the first makes and moves folders, and Orbax lets the others wait for it.

  Raises:
    TargetError: the place cannot be written, or another conversion to it is under way.
  """
  index, count = processes.index_and_count()
  if remote_files.is_remote(final):
    new = remote_target.place_for(final)
    announce(Place(os.fspath(final), os.fspath(new), _identity(final), 0, index == 0, count - 1))
    with contextlib.nullcontext() if index else remote_target.staged(final, new, _staging(final), check_free):
      yield new
    return
  missing = list(itertools.takewhile(lambda parent: not parent.exists(), final.parents))
  announce(Place(os.fspath(final), os.fspath(_staging(final)), _identity(final), len(missing), index == 0, count - 1))
  if index:
    yield _staging(final) / final.name
    return
  created = folders.make_parents(final)
  try:
    with _claimed(final) as staging:
      yield staging / final.name
      durable.sync_tree(staging / final.name)
      _put(staging / final.name, final, check_free)
      for folder in (final.parent, *(folder.parent for folder in created)):
        durable.sync(folder)
      _discard(staging)  # With the old checkpoint in it, if there was one.
  except BaseException:
    folders.remove_empty(created)
    raise


def check_name(final: epath.Path):
  """Checks that the names of files that are made below or beside `final` are not too long.

  Raises:
    TargetError: one is.
  """
  if remote_files.is_remote(final):
    return
  try:
    os.lstat(_staging(final) / f"{final.name}.orbax-checkpoint-tmp" / ("items.orbax-checkpoint-tmp" + _A_DATA_FILE))
  except OSError as e:
    if e.errno == errno.ENAMETOOLONG:
      raise errors.TargetError(
          final,
          f"a name that leaves room for {SUFFIX}, in a path that can be long enough",
          os.strerror(errno.ENAMETOOLONG),
      ) from e


def recover(final: epath.Path):
  """Puts back what a killed conversion to `final` had moved out of the way. What it was making stays for `--resume`.

  Raises:
    TargetError: another conversion to `final` is under way.
  """
  staging = _staging(final)
  if remote_files.is_remote(final) or not staging.exists():
    return
  with folders.locked(staging.parent, wait=True), contextlib.suppress(FileNotFoundError):  # It has just ended.
    with folders.locked(staging, wait=False) as is_left:
      if not is_left:
        raise _under_way(final)
      _put_back(staging, final)
    with contextlib.suppress(OSError):  # There is something to resume.
      os.rmdir(staging)


def keep(final: epath.Path):
  """Moves what a killed conversion to `final` was making to another name beside it, where `kept` finds it."""
  own = final.parent / f"{final.name}{_KEPT}{uuid.uuid4().hex[:8]}"
  if remote_files.is_remote(final):
    remote_target.keep(final, _staging(final), own)
    return
  if not _staging(final).exists():
    return
  with folders.locked(_staging(final), wait=False) as is_left_there:
    for folder in remote_files.children(_staging(final)) if is_left_there else ():
      if folder.name.startswith(f"{final.name}{_ORBAX}"):
        folder.rename(own)


def kept(final: epath.Path) -> list[epath.Path]:
  """The folders that `keep` moved."""
  return sorted(path for path in remote_files.children(final.parent) if path.name.startswith(f"{final.name}{_KEPT}"))


def _staging(final) -> epath.Path:
  return final.parent / f"{final.name}{SUFFIX}"


def is_left(final: epath.Path) -> bool:
  """Whether `final`, in remote storage, is what a conversion is making, or was when it was killed."""
  return remote_target.is_left(final, _staging(final))


@contextlib.contextmanager
def _claimed(final) -> Iterator[epath.Path]:
  """The staging folder of `final`, empty and locked meanwhile; a failure removes it."""
  staging, is_ours = _staging(final), False
  with contextlib.ExitStack() as locks:
    try:
      with folders.locked(staging.parent, wait=True):  # So that nobody is between making the folder and locking it.
        is_ours = not staging.exists()
        staging.mkdir(exist_ok=True)
        is_ours = locks.enter_context(folders.locked(staging, wait=False)) or is_ours
      if not is_ours:
        raise _under_way(final)
      _put_back(staging, final)
      for leftover in remote_files.children(staging):
        leftover.rmtree()
      yield staging
    except BaseException:
      if is_ours:
        _put_back(staging, final)
        with folders.locked(staging.parent, wait=True):
          folders.remove(staging)
      raise


def _under_way(final) -> errors.TargetError:
  return errors.TargetError(
      final,
      "no other conversion to it",
      f"one under way in {_staging(final)}",
      "Wait for it; if it is certain that there is none, remove that folder.",
  )


def _discard(staging):
  """Removes a staging folder, when nobody else can be about to lock it."""
  with folders.locked(staging.parent, wait=True):
    staging.rmtree()


def _identity(path) -> str | None:
  """What distinguishes checkpoints that are at one place at different times; None if there is none."""
  try:
    if remote_files.is_remote(path):
      return str((path / remote_target.COMMITTED).stat().mtime)
    found = os.stat(path)
  except OSError:
    return None
  return f"{found.st_dev}:{found.st_ino}"


def _put(new, final, check_free):
  """Puts the finished checkpoint in its place; an old one moves to `new`'s place, or beside it."""
  is_free = not final.exists() or (final.is_dir() and not remote_files.children(final))
  if not is_free:
    check_free()
    if folders.exchange(new, final):
      return
    os.rename(final, new.parent / f"{final.name}{_OLD}")
  try:
    os.rename(new, final)
  except OSError as e:  # Something has appeared there in the meantime.
    raise errors.TargetError(
        final, "nothing there yet", str(e), "Choose another --target_path or pass --overwrite."
    ) from e


def _put_back(staging, final):
  """Puts the old checkpoint back if it was moved away and nothing took its place."""
  old = staging / f"{final.name}{_OLD}"
  if old.exists() and not final.exists():
    old.rename(final)
