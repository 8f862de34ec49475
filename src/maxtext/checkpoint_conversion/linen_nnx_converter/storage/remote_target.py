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

"""Where a target is made in remote storage: in its own place, where it counts as unfinished until Orbax commits it.

There are no locks. A file beside it, the mark, says meanwhile what is being made; if a conversion is killed, both stay.
"""

from collections.abc import Callable, Iterator
import contextlib
import uuid

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter.storage import folders
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import processes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files

COMMITTED = "commit_success.txt"  # Orbax's.
_OLD, _NEW = ".replaced-", ".replacement-"  # In the names of what is replaced and what replaces it.
_TOKEN_TIMEOUT_MS = 60_000


def place_for(final: epath.Path) -> epath.Path:
  """Where to make what shall stand at `final`: there, or beside what stands there; the same in all processes."""
  token = processes.from_first(lambda: uuid.uuid4().hex[:8], _TOKEN_TIMEOUT_MS)
  return final.parent / f"{final.name}{_NEW}{token}" if final.exists() else final


@contextlib.contextmanager
def staged(final: epath.Path, new: epath.Path, mark: epath.Path, check_free: Callable[[], None]) -> Iterator[None]:
  """What is made at `new` takes the place of `final` in the end, or is removed if making it fails.

  Args:
    final: where the target shall appear.
    new: where it is made.
    mark: the file that says so.
    check_free: refuses what must not be replaced.
  """
  remote_files.write(mark, new.name)
  try:
    yield
    if new != final:
      check_free()
  except BaseException:
    folders.remove(new)
    remote_files.remove(mark)
    raise
  if new != final:
    old = final.parent / f"{final.name}{_OLD}{uuid.uuid4().hex[:8]}"
    final.rename(old)
    new.rename(final)
    old.rmtree()
  remote_files.remove(mark)


def is_left(final: epath.Path, mark: epath.Path) -> bool:
  """Whether what stands at `final` is what a conversion makes: one that is under way, or that was killed."""
  return remote_files.is_remote(final) and mark.exists() and final.exists() and not (final / COMMITTED).exists()


def keep(final: epath.Path, mark: epath.Path, kept: epath.Path):
  """Moves what a killed conversion was making to another name."""
  if not mark.exists():
    return
  name = mark.read_text()
  left = final.parent / name
  is_ours = name == final.name or name.startswith(f"{final.name}{_NEW}")
  if is_ours and left.exists() and not (left / COMMITTED).exists():
    left.rename(kept)
  remote_files.remove(mark)
