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

"""Verifies a target: against its source before the commit, and by itself ever after.

By itself, by the digests taken when it was verified against the source, so that bit rot on a disk is found.
"""

from collections.abc import Mapping
import dataclasses
import functools
import os
import time

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory
from maxtext.checkpoint_conversion.linen_nnx_converter import options
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import encoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import while_written

_REMEDY = "The checkpoint is damaged: convert again, or take another copy of it."
_NAMED = 10  # Leaves that a message names.


@dataclasses.dataclass(frozen=True)
class Audit:
  """The result of verifying a checkpoint by itself.

  Attributes:
    items: the folder of its pytree, or of Tunix's two.
    verified: the leaves whose digests are unchanged.
    without_digest: the array leaves without a digest, which were not read.
    nbytes: the bytes of the arrays that were read.
    seconds: how long it took.
  """

  items: epath.Path
  verified: tuple[abstract_state.Path, ...]
  without_digest: tuple[abstract_state.Path, ...]
  nbytes: int
  seconds: float

  def summary(self) -> str:
    """One line for a person."""
    total = len(self.verified) + len(self.without_digest)
    rest = f"; {len(self.without_digest)} leaves have no digest and were NOT verified" if self.without_digest else ""
    return errors.escaped(
        f"verified {len(self.verified)} of {total} leaves by their digests in {self.seconds:.1f} s, "
        f"{self.nbytes / 2**20:,.1f} MiB{rest} -> {self.items}"
    )


@remote_files.answered
def verify_checkpoint(
    target_path: str | os.PathLike[str],
    *,
    memory_budget_gib: float = 2.0,
    progress: progress_lib.Progress | None = None,
) -> Audit:
  """Reads a checkpoint that the converter wrote, and compares each leaf with its recorded digest.

  Args:
    target_path: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    memory_budget_gib: GiB of memory for data in flight. A chunk larger than this is still held whole.
    progress: is told how far the work has come.

  Returns:
    Which leaves were verified, and which have no digest.

  Raises:
    VerificationError: naming the first leaves that differ or cannot be read.
    SourceNotFoundError, NotACheckpointError, UnfinishedCheckpointError: there is no such checkpoint, or no digests in it.
  """
  begin = time.monotonic()
  budget, told = options.Options.of(memory_budget_gib=memory_budget_gib).memory_budget, progress_lib.checked(progress)
  location = locations.find_source(target_path, "--target_path")
  pytrees = [(place.items.name,) * bool(location.split) for place in location.pytrees]
  expected = {key: digests.read(place.items) for key, place in zip(pytrees, location.pytrees)}
  checkpoints = {key: _opened(place.items) for key, place in zip(pytrees, location.pytrees)}
  stored = {(*key, *path): (key, leaf) for key in pytrees for path, leaf in checkpoints[key].stored.items()}
  if not any(expected.values()):
    raise errors.NotACheckpointError(
        location.items,
        "digests",
        f"none of its {len(stored)} leaves with one",
        "Nothing was verified: convert anew with --verify=full.",
    )
  found = {}
  for key in pytrees:
    different = coroutines.run(_differences(checkpoints[key], expected[key], budget, told))
    found |= {(*key, *path): difference for path, difference in different.items()}
  _refuse_differences(found)
  verified = tuple(path for path, (key, leaf) in stored.items() if leaf.name in expected[key])
  without = tuple(path for path, (key, leaf) in stored.items() if leaf.name not in expected[key])
  nbytes = sum(stored[path][1].nbytes for path in verified)
  return Audit(location.items, verified, without, nbytes, time.monotonic() - begin)


def _refuse_differences(found):
  """Refuses a checkpoint with leaves that differ."""
  if found:
    first, difference = next(iter(found.items()))
    others = f", and {len(found) - 1} more leaves that differ: {_names(list(found)[1:])}" if len(found) > 1 else ""
    raise errors.VerificationError(first, difference[0], difference[1] + others, _REMEDY)


def verify_written(
    compared: while_written.Comparison,
    source: reader.Checkpoint,
    items: epath.Path,
    budget: memory.Budget,
    progress: progress_lib.Progress,
    *,
    is_full: bool,
) -> dict[str, digests.Digest]:
  """Reads the written pytree back, and compares it with the plan and the source.

  Args:
    compared: what was compared while it was written, with the plan and the source's arrays.
    source: the source, used only for leaves that are held in memory.
    items: the folder of the written pytree.
    budget: what the data in flight may take.
    progress: is told how far the comparison has come.
    is_full: whether to decode even what can be proven equal without decoding.

  Returns:
    The digests of the leaves that were decoded, by name in storage.

  Raises:
    VerificationError: naming the first leaf that differs.
  """
  plan, ours, theirs = compared.plan, compared.source, _reopened(items)
  coroutines.run(ours.read_places())
  written = reader.Checkpoint(items, theirs.places)
  decoded.verify_state(plan.target, written.state)
  for state, arrays in ((plan.source, ours), (plan.target, theirs)):
    decoded.verify_names(state, arrays.name, arrays.names())
  taken = {} if is_full else coroutines.run(compared.digests(theirs))
  prove = functools.partial(encoded.prove, plan, ours, theirs, files=compared.files, memory_budget=budget)
  proven = frozenset() if is_full else coroutines.run(prove())
  known = {path for path in proven if not plan.is_merged(path)} | taken.keys()
  unproven = [path for path in plan.moves if path not in known and path in written.stored]
  parts, chunk_shape_of = plan.parts(), lambda path: written.stored[path].chunk_shape
  collector = digests.Collector(plan.target.leaves, {path: chunk_shape_of(path) for path in unproven})
  progress.start("verifying", sum(written.stored[path].nbytes for path in unproven))
  coroutines.run(
      decoded.verify_arrays(
          plan,
          unproven,
          decoded.Sides(
              lambda path: source.open(path) if plan_lib.is_held(path) else ours.open(path),
              theirs.open,
              lambda path: plan_lib.whole_chunks(path, source.stored[path].chunk_shape, parts[path], chunk_shape_of),
          ),
          memory_budget=budget,
          on_verified=progress.advance,
          on_equal=collector.add,
      )
  )
  progress.finish()
  taken |= collector.digests()
  taken |= coroutines.run(_take_anew(written, theirs, [path for path in unproven if path not in taken], budget))
  return {written.stored[path].name: digest for path, digest in taken.items()}


def _reopened(items) -> reopen.Arrays:
  """The arrays of the written pytree, with their places."""
  try:
    if remote_files.is_remote(items):
      remote_files.look_below(items)
    arrays = reopen.Arrays(items)
    coroutines.run(arrays.read_places())
    return arrays
  except (OSError, ValueError) as e:  # What the system, json and TensorStore raise of a damaged file.
    errors.check_access(items, e)
    raise errors.VerificationError(items, "a pytree that can be read", errors.one_line(e)) from e


async def _take_anew(written, arrays, paths, budget) -> dict[abstract_state.Path, digests.Digest]:
  """The digests of leaves whose chunks differ from the source's."""
  taken = {}
  for path in paths:
    array = await arrays.open(path)
    block = written.stored[path].chunk_shape
    taken[path] = await digests.take(array, block, memory_budget=budget, on_read=lambda _: None)
  return taken


def _opened(items) -> reader.Checkpoint:
  """The checkpoint, whose metadata and data files must be whole."""
  try:
    checkpoint = reader.Checkpoint(items)
    ocdbt_index.file_lengths(checkpoint.directory, checkpoint.index)
    return checkpoint
  except errors.AccessError:
    raise
  except errors.ConversionError as e:  # It was readable when it was committed.
    raise errors.VerificationError(e.path, e.expected, e.found, _REMEDY) from e


async def _differences(checkpoint, expected: Mapping[str, digests.Digest], memory_budget, progress):
  """What was expected and found of each leaf that has changed, by path, sorted."""
  paths = {leaf.name: path for path, leaf in checkpoint.stored.items()}
  differences = {(name,): ("this leaf", "none") for name in expected if name not in paths}
  gate, arrays = memory_budget.comparisons(), reopen.Arrays(checkpoint.directory)

  async def check(path, leaf, digest):
    async with gate.inside(memory_budget.read_at_once(leaf, digest.block)):
      if difference := await _difference(arrays, path, leaf, digest, memory_budget, progress):
        differences[path] = difference

  leaves = [(path, leaf, expected[leaf.name]) for path, leaf in checkpoint.stored.items() if leaf.name in expected]
  progress.start("verifying", sum(leaf.nbytes for _, leaf, _ in leaves))
  await coroutines.settle(check(*each) for each in leaves)
  progress.finish()
  return dict(sorted(differences.items()))


async def _difference(arrays, path, leaf, digest, memory_budget, progress) -> tuple[str, str] | None:
  """What was expected and found of a leaf, if these differ."""
  if (leaf.shape, str(leaf.dtype)) != (digest.shape, digest.dtype):
    return f"{digest.shape} {digest.dtype}", f"{leaf.shape} {leaf.dtype}"
  try:
    array = await arrays.open(path)
    found = await digests.take(array, digest.block, memory_budget=memory_budget, on_read=progress.advance)
  except ValueError as e:  # What TensorStore raises for a missing, truncated or corrupt chunk.
    errors.check_access(path, e)
    return "chunks that can be read", errors.one_line(e)
  return None if found == digest else (f"the digest {digest.sha256[:16]}…", f"{found.sha256[:16]}…")


def _names(paths) -> str:
  return ", ".join("/".join(path) for path in paths[:_NAMED]) + (", …" if len(paths) > _NAMED else "")
