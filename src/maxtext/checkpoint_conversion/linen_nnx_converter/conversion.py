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

"""The conversion of a checkpoint on disk: a pipeline from what is asked for to what was done."""

import dataclasses
import os
import time
from typing import Any

from etils import epath
import jax

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import record
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import moving
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import resume as resume_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import model_check
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import rng_state
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.state import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import targets
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import training_engine
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import while_written

Path = abstract_state.Path
PathLike = str | os.PathLike[str]


def convert_checkpoint(
    source_path: PathLike | None = None,
    target_path: PathLike | None = None,
    *,
    config: Any = None,
    progress: moving.Progress | None = None,
    **options: Any,
) -> record.Conversion:
  """Converts a checkpoint on disk. The target appears whole or not at all; the source is only read.

  Under `jax.distributed`, every process calls it alike and moves a share of the bytes; the first verifies and commits.

  Args:
    source_path: a checkpoints folder (its latest step is taken), a step, an items folder, or a pytree's folder.
    target_path: where to; it gets the shape of the source, `<target_path>/<step>/items` with its sibling items.
    config: a MaxText config of the model. It says how the layers are scanned, and defaults for the paths: what a run with
      it would load, and where it would resume from.
    progress: is told how far the work of this process has come.
    **options: those of `options.Options`.

  Returns:
    What was done.

  Raises:
    ConversionError: one of its subclasses. Nothing is left at the target then.
  """
  begin = time.monotonic()
  job = _job(source_path, target_path, config, options_lib.Options.of(**options), progress or progress_lib.Silent())
  if not job.options.dry_run and jax.process_index() == 0:
    atomic_target.recover(job.target.final)
  job.check_free()
  stamps = source_files.survey(job.source.final)
  plan, checkpoint, notes = _plan(job)
  move, resumed = _move(job, plan, checkpoint)
  ways = {path: route.way for path, route in move.routes.items()}
  done = record.Conversion(
      plan, job.source.items, job.target.items, ways, resumed=resumed, notes=notes, dry_run=job.options.dry_run
  )
  if not done.dry_run:
    done = _write(job, move, done, stamps, begin)
  return dataclasses.replace(done, seconds=time.monotonic() - begin)


@dataclasses.dataclass(frozen=True)
class _Job:
  """What is asked for, and where.

  Attributes:
    source: the checkpoint to convert.
    target: where to.
    options: the options, with what the config says where they leave it open.
    run: the run that shall go on from the target.
    config: its MaxText config, or None.
    progress: is told how far the work has come.
    notes: clauses for a person on the step and its items.
  """

  source: locations.Location
  target: locations.Location
  options: options_lib.Options
  run: planner.Run
  config: Any
  progress: moving.Progress
  notes: tuple[str, ...]

  def check_free(self):
    """Refuses what stands at the target, unless it may be replaced."""
    carried = {sibling.name for sibling in self.source.siblings()}
    targets.check_free(self.target, overwrite=self.options.overwrite, carried=carried)


def _job(source_path, target_path, config, options, progress) -> _Job:
  """What is asked for, with what the config and the release say of it."""
  release = options.maxtext_release
  run = planner.Run(releases.parse(release) if release else None)
  if config is not None:
    source_path = source_path or run_config.source_path(config)
    target_path = target_path or run_config.target_path(config)
    options, run = run_config.with_config(options, config), run_config.run(config, release)
  for name, path in (("--source_path", source_path), ("--target_path", target_path)):
    if not path:
      raise errors.TargetError(name, "a path", "none", f"Give {name}.")
  source = locations.find_source(source_path)
  notes = training_engine.check(source, options.params_only)
  target = targets.find_target(target_path, source, for_release=run.release is not None)
  targets.check_apart(source_path, source, target_path, target)
  return _Job(source, target, options, run, config, progress, notes + targets.notes(target_path, source, target))


def _move(job, plan, checkpoint) -> tuple[moving.Move, str]:
  """How the bytes go; and what is taken from an interrupted run, for a person."""
  options, form = job.options, storage_form.StorageForm.of(job.options, checkpoint)
  orbax_writer.check_target(job.target.items, use_ocdbt=form.use_ocdbt)
  lengths = ocdbt_index.file_lengths(checkpoint.directory, checkpoint.index)
  room = streaming.batch_bytes(options.memory_budget)
  routes = leaf_routes.choose(plan, checkpoint, lengths, form, room=room, copy_mode=options.copy_mode)
  move = moving.Move(
      plan,
      checkpoint,
      form,
      routes,
      lengths,
      options.copy_mode,
      options.memory_budget,
      job.progress,
      process=jax.process_index(),
      processes=jax.process_count(),
  )
  if options.dry_run:
    return move, ""
  if not options.resume:
    resume_lib.discard(job.target.final)
    return move, ""
  if move.process == 0:
    atomic_target.keep(job.target.final)
  resumption = resume_lib.take(
      job.target,
      plan,
      checkpoint,
      routes,
      form,
      progress=job.progress,
      compare=lambda paths, open_target, on_failure: decoded.verify_arrays(
          plan,
          paths,
          decoded.Sides(checkpoint.open, open_target, lambda path: checkpoint.stored[path].chunk_shape),
          memory_budget=options.memory_budget,
          on_verified=job.progress.advance,
          on_failure=on_failure,
      ),
  )
  move = dataclasses.replace(move, routes={**routes, **resumption.routes}, taken=resumption.origins)
  return move, resumption.summary()


def _write(job, move, done, stamps, begin) -> record.Conversion:
  """Writes the target, verifies and commits it; returns what was done, as the first process knows it."""
  plan, checkpoint = move.plan, move.source
  compared = while_written.Comparison(move, reopen.Arrays(job.source.items, job.source.split))
  move = dataclasses.replace(move, comparison=compared if job.options.verify is True else None)

  def before_commit(folder: epath.Path, items: epath.Path) -> record.Conversion:
    job.progress.finish()
    verified = _verified(job, compared, checkpoint, items, done)
    source_files.check_unchanged(job.source.final, stamps)
    verified = dataclasses.replace(verified, seconds=time.monotonic() - begin)
    _finish_step(folder, job.source, verified)
    return verified

  job.progress.start("writing", move.nbytes() // move.processes)
  try:
    with atomic_target.staged(
        job.target.final, check_free=job.check_free, is_primary=move.process == 0, announce=job.progress.make_at
    ) as path:
      seen = orbax_writer.save(
          path,
          job.target.step_folder and job.target.items.name,
          dataclasses.replace(plan.target, leaves=target_leaves.target_leaves(plan, checkpoint, move.routes)),
          move,
          form=move.form,
          before_commit=before_commit,
      )
  except Exception:
    source_files.check_unchanged(job.source.final, stamps)  # If it was, that is the cause of whatever failed.
    raise
  resume_lib.discard(job.target.final)
  return seen or done  # Only the first process has seen it whole.


def _verified(job, compared, checkpoint, items, done) -> record.Conversion:
  """Compares the written pytree with the source, and keeps the digests, unless that is not wanted."""
  if not job.options.verify:
    return done
  budget, is_full = job.options.memory_budget, job.options.verify == "full"
  found = verify.verify_written(compared, checkpoint, items, budget, job.progress, is_full=is_full)
  digests.write(items, found)
  return dataclasses.replace(done, verified=True, digests=len(found))


def _plan(job) -> tuple[plan_lib.Plan, reader.Checkpoint, tuple[str, ...]]:
  """The plan, checked as far as metadata and small leaves allow; the source; and clauses for a person."""
  checkpoint, config, notes = opening.open_source(job.source), job.config, job.notes
  custom_metadata = job.source.custom_metadata()
  nodes = _recorded_empty_nodes(custom_metadata)
  plan = planner.plan_conversion(checkpoint.state, job.options, job.run, nodes)
  if config is not None:
    _check_scan_flag(plan, job.source, custom_metadata)
  if job.options.init_rngs:
    plan, checkpoint = rng_state.add(plan, checkpoint, config, job.options, job.run)
  if config is not None and job.options.check_model:
    notes += model_check.check_plan(plan, config, job.run.release)
  streaming.check_casts(plan, checkpoint.read)
  tunix.check_accumulation(plan.dropped, checkpoint.read)
  return plan, checkpoint, notes


def _check_scan_flag(plan, location, custom_metadata):
  """Refuses a checkpoint whose own `scan_layers`, which MaxText >= 0.2.4 records, is not true of its layers.

  A config's `scan_layers` is the target's. But which of the two contradicting ones its other settings belong to, nobody
  can tell.
  """
  flag = custom_metadata.get("scan_layers")
  if isinstance(flag, bool) and plan.source_scan_layers is not None and flag != plan.source_scan_layers:
    raise errors.ConfigError(
        location.final / "_CHECKPOINT_METADATA",
        f"scan_layers={plan.source_scan_layers}, as the layers in the checkpoint are written",
        f"scan_layers={flag}",
        "Check which run wrote the checkpoint, and correct the flag; without a config it is left aside.",
    )


def _finish_step(folder, location, conversion):
  """Carries along what belongs to the step besides the train state, and writes the record."""
  siblings = {sibling.name: sibling for sibling in location.siblings()}
  for name, sibling in siblings.items():
    locations.copy_tree(sibling, folder / name)
  handlers = location.step_metadata().get("item_handlers")
  carried = (
      {name: handler for name, handler in handlers.items() if name in siblings} if isinstance(handlers, dict) else {}
  )
  scan_layers = {} if conversion.plan.scan_layers is None else {"scan_layers": conversion.plan.scan_layers}
  metadata = location.custom_metadata() | scan_layers | {locations.RECORD: conversion.record()}
  locations.update_step_metadata(folder, carried, metadata)


def _recorded_empty_nodes(custom_metadata) -> dict[Path, Any]:
  """The empty optimizer nodes that an earlier conversion put on record."""
  try:
    nodes = (custom_metadata.get(locations.RECORD) or {}).get("empty_nodes") or []
    if all(abstract_state.is_empty(leaf) and all(isinstance(key, str) for key in path) for path, leaf in nodes):
      return {tuple(path): leaf for path, leaf in nodes}
    found = "other ones"
  except (AttributeError, TypeError, ValueError) as e:
    found = str(e)
  raise errors.DamagedSourceError(
      f"custom_metadata/{locations.RECORD}", "empty_nodes as an earlier conversion recorded them", found
  )
