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

"""The conversion of a checkpoint on disk: a pipeline from what was asked for to what was done."""

import dataclasses
import functools
import os
import time
from typing import Any

from etils import epath
import jax

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import record
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import cost
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import moving
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import resume as resume_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import model_check
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import model_order
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import rng_state
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import adapters
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import processes
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import targets
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import training_engine
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import while_written

PathLike = str | os.PathLike[str]


@remote_files.answered
def convert_checkpoint(
    source_path: PathLike | None = None,
    target_path: PathLike | None = None,
    *,
    config: Any = None,
    progress: progress_lib.Progress | None = None,
    **options: Any,
) -> record.Conversion:
  """Converts a checkpoint on disk. The target appears whole or not at all; the source is only read.

  Under `jax.distributed`, all processes make the same call and each moves a share of the bytes; the first verifies and
  commits.

  Args:
    source_path: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    target_path: where to. It gets the source's shape, `<target_path>/<step>/items` with its sibling items.
    config: a MaxText config of the model. It says how layers are scanned, and gives defaults for the paths: what its run
      would load, and where it would resume.
    progress: is told how far the work of this process has come.
    **options: those of `options.Options`.

  Returns:
    What was done.

  Raises:
    ConversionError: one of its subclasses. Nothing is left at the target then.
  """
  begin = time.monotonic()
  find = lambda: _job(source_path, target_path, config, options, progress_lib.checked(progress))
  given = lambda job: vars(job.options) | {"source_path": job.source.final, "target_path": job.target.final}
  job = processes.begin_alike(find, given)
  if not job.options.dry_run:
    resume_lib.prepare(job.target.final, keeps=job.options.resume)
  job.check_free()
  stamps = source_files.survey(job.source.final)
  plan, checkpoint, notes = _plan(job)
  parts = _parts(job, plan, checkpoint)
  ways = {(*part.key, *path): route.way for part in parts for path, route in part.move.routes.items()}
  done = record.Conversion(plan, job.source.items, job.target.items, ways, notes=notes, dry_run=job.options.dry_run)
  done = dataclasses.replace(done, resumed="; ".join(dict.fromkeys(part.resumed for part in parts if part.resumed)))
  if done.dry_run:
    done = dataclasses.replace(done, cost=cost.estimate([p.move for p in parts], job.target, job.options.verify))
  else:
    done = _write(job, parts, done, stamps, begin)
  return dataclasses.replace(done, seconds=time.monotonic() - begin)


@dataclasses.dataclass(frozen=True)
class _Job:
  """What is asked for, and where.

  Attributes:
    source: the checkpoint to convert.
    target: where to.
    options: the options, completed by the config.
    run: the run that will resume from the target.
    config: its MaxText config, or None.
    progress: is told how far the work has come.
    notes: clauses for a person on the step and its items.
  """

  source: locations.Location
  target: locations.Location
  options: options_lib.Options
  run: planner.Run
  config: Any
  progress: progress_lib.Progress
  notes: tuple[str, ...]

  def check_free(self):
    """Refuses anything at the target that may not be replaced."""
    carried = {sibling.name for sibling in self.source.siblings()}
    targets.check_free(self.target, overwrite=self.options.overwrite, carried=carried)


@dataclasses.dataclass(frozen=True)
class _Part:
  """A pytree of the target; Tunix splits its state over two.

  Attributes:
    place: where it goes.
    key: its key in the whole plan, if there are several.
    move: how its bytes go.
    resumed: what is taken over from an interrupted run, for a person.
  """

  place: locations.Location
  key: tuple[str, ...]
  move: moving.Move
  resumed: str = ""


def _job(source_path, target_path, config, values, progress) -> _Job:
  """What is asked for, completed by the config and the release."""
  options = options_lib.Options.of(**values)
  run_config.check(config)
  run = planner.Run(releases.parse(options.maxtext_release) if options.maxtext_release else None)
  if config is not None:
    source_path = source_path or run_config.source_path(config)
    target_path = target_path or run_config.target_path(config)
    options, run = run_config.with_config(options, config), run_config.run(config, options.maxtext_release)
  for name, path in (("--source_path", source_path), ("--target_path", target_path)):
    if not path:
      raise errors.TargetError(name, "a path", "none", f"Give {name}.")
  source = locations.find_source(source_path)
  notes = training_engine.check(source, options.params_only) + releases.notes(run.release)
  split = layouts.TUNIX_ITEMS if options.target_layout != "maxtext" else ()
  target = targets.find_target(target_path, source, for_release=run.release is not None, split=split)
  targets.check_apart(source_path, source, target_path, target)
  return _Job(source, target, options, run, config, progress, notes + targets.notes(target_path, source, target))


def _parts(job, plan, checkpoint) -> list[_Part]:
  """How the bytes of each of the target's pytrees go."""
  keys = [(name,) for name in job.target.split] or [()]
  moves = _moves(job, plan, [plan.below(*key) if key else plan for key in keys], checkpoint)
  parts = [_Part(place, key, move) for place, key, move in zip(job.target.pytrees, keys, moves)]
  if job.options.dry_run:
    return parts
  if not job.options.resume:
    resume_lib.discard(job.target.final)
    return parts
  return [_resumed(job, part) for part in parts]


def _moves(job, whole, plans, checkpoint) -> list[moving.Move]:
  """How the bytes go that each plan moves."""
  options, form = job.options, storage_form.StorageForm.of(job.options, checkpoint)
  for place in job.target.pytrees:
    orbax_writer.check_target(place.items, use_ocdbt=form.use_ocdbt)
  lengths = ocdbt_index.file_lengths(checkpoint.directory, checkpoint.index)
  room = options.memory_budget.room
  choose = functools.partial(leaf_routes.choose, source=checkpoint, lengths=lengths, form=form, room=room)
  copy_mode = options.copy_mode
  if len(plans) > 1 and copy_mode == "auto" and targets.can_link(job.source.final, job.target.final):
    # Data files that both parts need are linked into both, if that is worth it for the target as a whole.
    ways = {route.way for route in choose(whole, copy_mode=copy_mode).values()}
    copy_mode = "link" if leaf_routes.Way.REFERENCE in ways else copy_mode
  return [
      moving.Move(
          plan,
          checkpoint,
          form,
          choose(plan, copy_mode=copy_mode),
          lengths,
          options.copy_mode,
          options.memory_budget,
          job.progress,
          process=jax.process_index(),
          processes=jax.process_count(),
      )
      for plan in plans
  ]


def _resumed(job, part) -> _Part:
  """The part, with what is taken over from an interrupted run."""
  move, plan, checkpoint = part.move, part.move.plan, part.move.source
  resumption = resume_lib.take(
      part.place,
      plan,
      checkpoint,
      move.routes,
      move.form,
      progress=job.progress,
      compare=lambda paths, open_target, on_failure: decoded.verify_arrays(
          plan,
          paths,
          decoded.Sides(checkpoint.open, open_target, lambda path: checkpoint.stored[path].chunk_shape),
          memory_budget=job.options.memory_budget,
          on_verified=job.progress.advance,
          on_failure=on_failure,
      ),
  )
  move = dataclasses.replace(move, routes={**move.routes, **resumption.routes}, taken=resumption.origins)
  return dataclasses.replace(part, move=move, resumed=resumption.summary())


def _write(job, parts, done, stamps, begin) -> record.Conversion:
  """Writes, verifies and commits the target; returns what was done, as the first process knows it."""
  moves = {part.place.items.name if job.target.step_folder else "": part.move for part in parts}
  arrays = lambda: reopen.Arrays(job.source.items, job.source.split)
  compared = {name: while_written.Comparison(move, arrays()) for name, move in moves.items() if job.options.verify}
  if job.options.verify is True:
    moves = {name: dataclasses.replace(move, comparison=compared[name]) for name, move in moves.items()}

  def before_commit(folder: epath.Path) -> record.Conversion:
    job.progress.finish()
    verified = done
    for name, comparison in compared.items():
      verified = _verified(job, comparison, moves[name].source, folder / name, verified)
    verified = dataclasses.replace(verified, seconds=time.monotonic() - begin)
    record.finish_step(folder, job.source, verified)
    source_files.check_unchanged(job.source.final, stamps)
    return verified

  job.progress.start("writing", sum(sum(part.move.nbytes().values()) // part.move.processes for part in parts))
  try:
    with atomic_target.staged(job.target.final, check_free=job.check_free, announce=job.progress.make_at) as path:
      pytrees = {name: orbax_writer.Pytree(move.leaves(), move) for name, move in moves.items()}
      seen = orbax_writer.save(path, pytrees, form=parts[0].move.form, before_commit=before_commit)
  except Exception:
    source_files.check_unchanged(job.source.final, stamps)  # If it was, that is why it failed.
    raise
  resume_lib.discard(job.target.final)
  return seen or done  # Only the first process has seen it whole.


def _verified(job, compared, source, items, done) -> record.Conversion:
  """Compares a written pytree with the source, and writes its digests."""
  budget, is_full = job.options.memory_budget, job.options.verify == "full"
  found = verify.verify_written(compared, source, items, budget, job.progress, is_full=is_full)
  digests.write(items, found)
  return dataclasses.replace(done, verified=True, digests=done.digests + len(found))


def _plan(job) -> tuple[plan_lib.Plan, reader.Checkpoint, tuple[str, ...]]:
  """The plan, checked as far as metadata and small leaves allow; the source; and notes for a person."""
  checkpoint, config, custom_metadata = opening.open_source(job.source), job.config, job.source.custom_metadata()
  nodes = record.recorded_empty_nodes(custom_metadata)
  plan, notes = model_order.plan_conversion(checkpoint.state, job.options, job.run, nodes, config)
  notes += model_check.check_scan_layers(plan, job.options.scan_layers, config, job.source.final, custom_metadata)
  if job.options.init_rngs:
    plan, checkpoint = rng_state.add(plan, checkpoint, config, job.options, job.run)
  if config is not None and job.options.check_model:
    notes += model_check.check_plan(plan, config, job.run.release)
  if job.options.target_layout != "maxtext":
    tunix_target.check_resumes(plan.target, int(checkpoint.read(*plan.moves[tunix_target.STEP].sources)), job.target.step)
  streaming.check_casts(plan, checkpoint.read)
  tunix.check_accumulation(plan.dropped, checkpoint.read)
  plan, merged = adapters.merge(plan, job.options)
  return plan, checkpoint, job.notes + notes + merged
