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

"""The conversions: of trees in memory, and of checkpoints on disk."""

import dataclasses
import functools
import os
import time
from typing import Any

from etils import epath
import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter import audit
from maxtext.checkpoint_conversion.linen_nnx_converter import conversion as conversion_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import digests
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import execute
from maxtext.checkpoint_conversion.linen_nnx_converter import framing
from maxtext.checkpoint_conversion.linen_nnx_converter import key_values
from maxtext.checkpoint_conversion.linen_nnx_converter import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter import locations
from maxtext.checkpoint_conversion.linen_nnx_converter import maxtext_config
from maxtext.checkpoint_conversion.linen_nnx_converter import model_check
from maxtext.checkpoint_conversion.linen_nnx_converter import moving
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import planner
from maxtext.checkpoint_conversion.linen_nnx_converter import progress as progress_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import releases
from maxtext.checkpoint_conversion.linen_nnx_converter import resume as resume_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import rng_state
from maxtext.checkpoint_conversion.linen_nnx_converter import source_files
from maxtext.checkpoint_conversion.linen_nnx_converter import staging
from maxtext.checkpoint_conversion.linen_nnx_converter import storage
from maxtext.checkpoint_conversion.linen_nnx_converter import target_leaf
from maxtext.checkpoint_conversion.linen_nnx_converter import targets
from maxtext.checkpoint_conversion.linen_nnx_converter import training_engine
from maxtext.checkpoint_conversion.linen_nnx_converter import tunix
from maxtext.checkpoint_conversion.linen_nnx_converter import ways

Path = abstract_state.Path
PathLike = str | os.PathLike[str]

RECORD = "linen_nnx_converter"  # The key of the record in the target's custom metadata.


def detect_format(state: Any) -> str:
  """Tells `linen` from `nnx`.

  Args:
    state: a train state, as a pytree of any leaves.

  Raises:
    LayoutError: it fits no known layout, or two.
  """
  return layouts.detect(abstract_state.flatten(state)).framework


def convert_linen_to_nnx(state: Any, scan_layers: bool = True, **options) -> dict[str, Any]:
  """Converts a Linen train state in memory. The input is not modified; leaves that only move are shared with it.

  Args:
    state: a pytree: nested dicts and lists, or a Flax `TrainState`, with leaves of NumPy arrays, JAX arrays or
      `jax.ShapeDtypeStruct`.
    scan_layers: whether the result's layers are scanned.
    **options: the others of `options.PlanOptions`, but for the direction.

  Returns:
    Nested dicts, `{"model": …, "optimizer": {"opt_state": …, "step": …}}`. Keys are strings, those of chains too.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  return _convert_tree(state, direction="linen_to_nnx", scan_layers=scan_layers, **options)


def convert_nnx_to_linen(state: Any, scan_layers: bool | None = None, **options) -> dict[str, Any]:
  """Converts an NNX train state in memory, as `convert_linen_to_nnx` does the other way.

  Args:
    state: a pytree: nested dicts, or an `nnx.State`, boxed or plain.
    scan_layers: whether the result's layers are scanned; None keeps what they are.
    **options: as `convert_linen_to_nnx` takes them.

  Returns:
    Nested dicts and lists, `{"params": {"params": …}, "opt_state": …, "step": …}`.

  Raises:
    ConversionError: one of its subclasses, naming the path that stands in the way.
  """
  return _convert_tree(state, direction="nnx_to_linen", scan_layers=scan_layers, **options)


def load_checkpoint(path: PathLike) -> Any:
  """Loads the pytree of a checkpoint into host memory, whole: nested dicts and lists of NumPy arrays.

  Where Tunix has split the state, the items' names are the topmost keys.

  Raises:
    ConversionError: there is no finished checkpoint at `path`.
  """
  location = locations.find_source(path)
  source_files.survey(location.final)
  open_source(location)  # What it refuses is not for Orbax to read.
  if location.split:
    return {name: storage.restore(location.items / name) for name in location.split}
  return storage.restore(location.items)


def open_source(location: locations.Location) -> storage.Checkpoint:
  """The checkpoint at a location: one pytree, or Tunix's several, with the step that is its folder's name.

  Raises:
    ConversionError: one of its subclasses: its metadata cannot be read, or make no sense.
  """
  if not location.split:
    return storage.Checkpoint(location.items)
  source, path = storage.SplitCheckpoint(location.items, location.split), layouts.FOLDER_STEP
  if location.step is None or layouts.TUNIX_ITEMS[1] not in location.split:
    return source
  return source.with_arrays({path: execute.checked_cast(path, np.array(location.updates), np.dtype(np.int64))})


def save_checkpoint(state: Any, path: PathLike) -> None:
  """Saves a pytree of arrays as a folder of its own.

  Raises:
    TargetError: something is at `path` already.
  """
  directory = locations.absolute(path)
  targets.check_free(locations.Location(directory), overwrite=False)
  framing.check_target(directory, use_ocdbt=True)
  storage.save_tree(directory, state)


def convert_checkpoint(
    source_path: PathLike | None = None,
    target_path: PathLike | None = None,
    *,
    config: Any = None,
    progress: moving.Progress | None = None,
    **options: Any,
) -> conversion_lib.Conversion:
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
  chosen = options_lib.Options.of(**options)
  source_path, target_path, chosen, run = _settings(source_path, target_path, config, chosen)
  dry_run, verify, resume = chosen.dry_run, chosen.verify, chosen.resume
  location = locations.find_source(source_path)
  notes = training_engine.check(location, chosen.params_only)
  target = targets.find_target(target_path, location, for_release=run.release is not None)
  targets.check_apart(source_path, location, target_path, target)
  notes += targets.notes(target_path, location, target)
  carried = {sibling.name for sibling in location.siblings()}
  check_free = functools.partial(targets.check_free, target, overwrite=chosen.overwrite, carried=carried)
  if not dry_run and jax.process_index() == 0:
    staging.recover(target.final)
  check_free()
  stamps = source_files.survey(location.final)
  plan, source = _plan(location, config, chosen, run)
  framing.check_target(target.items, use_ocdbt=source.use_ocdbt)
  lengths = key_values.file_lengths(source.directory, source.index)
  routes = ways.choose(plan, source, lengths, copy_mode=chosen.copy_mode)
  budget = chosen.memory_budget
  progress = progress or progress_lib.Silent()
  resumption = resume_lib.Resumption()
  if resume and not dry_run:
    if jax.process_index() == 0:
      staging.keep(target.final)
    resumption = resume_lib.take(target, plan, source, routes, memory_budget=budget, progress=progress)
    routes = {**routes, **resumption.routes}
  elif not dry_run:
    resume_lib.discard(target.final)
  conversion = conversion_lib.Conversion(
      plan,
      location.items,
      target.items,
      {path: route.way for path, route in routes.items()},
      resumed=resumption.summary() if resume and not dry_run else "",
      notes=notes,
      dry_run=dry_run,
  )
  if dry_run:
    return dataclasses.replace(conversion, seconds=time.monotonic() - begin)
  result = []

  def before_commit(folder: epath.Path, items: epath.Path):
    progress.finish()
    found = (
        audit.verify_written(plan, source, location, items, budget, progress, is_full=verify == "full") if verify else {}
    )
    if verify:
      digests.write(items, found)
    source_files.check_unchanged(location.final, stamps)
    seconds = time.monotonic() - begin
    result.append(dataclasses.replace(conversion, seconds=seconds, verified=bool(verify), digests=len(found)))
    _finish_step(folder, location, result[0])

  processes = jax.process_count()
  me = jax.process_index()
  move = moving.Move(
      plan,
      source,
      routes,
      lengths,
      chosen.copy_mode,
      budget,
      progress,
      resumption.origins,
      process=me,
      processes=processes,
  )
  progress.start("writing", move.nbytes() // processes)
  try:
    framing.save(
        target,
        dataclasses.replace(plan.target, leaves=target_leaf.target_leaves(plan, source, routes)),
        move.stream,
        move.put_encoded,
        use_ocdbt=source.use_ocdbt,
        use_zarr3=source.use_zarr3,
        before_commit=before_commit,
        check_free=check_free,
        announce=progress.make_at,
    )
  except Exception:
    source_files.check_unchanged(location.final, stamps)  # If it was, that is the cause of whatever failed.
    raise
  resume_lib.discard(target.final)
  return result[0] if result else dataclasses.replace(conversion, seconds=time.monotonic() - begin)


def _settings(source_path, target_path, config, options) -> tuple[PathLike, PathLike, options_lib.Options, planner.Run]:
  """The paths, the options, and the run, with what the config and the release say of them."""
  release = options.maxtext_release
  run = planner.Run(releases.parse(release) if release else None)
  if config is not None:
    source_path = source_path or maxtext_config.source_path(config)
    target_path = target_path or maxtext_config.target_path(config)
    options, run = maxtext_config.with_config(options, config), maxtext_config.run(config, release)
  for name, path in (("--source_path", source_path), ("--target_path", target_path)):
    if not path:
      raise errors.TargetError(name, "a path", "none", f"Give {name}.")
  return source_path, target_path, options, run


def _plan(location, config, options, run) -> tuple[plan_lib.Plan, storage.Checkpoint]:
  """The plan, checked as far as metadata and small leaves allow, and the source."""
  source = open_source(location)
  custom_metadata = location.custom_metadata()
  nodes = _recorded_empty_nodes(custom_metadata)
  plan = planner.plan_conversion(source.state, options, run, nodes)
  if config is not None:
    _check_scan_flag(plan, location, custom_metadata)
  if options.init_rngs:
    plan, source = rng_state.add(plan, source, config, options, run)
  if config is not None and options.check_model:
    plan = dataclasses.replace(plan, notes=plan.notes + model_check.check_plan(plan, config, run.release))
  execute.check_casts(plan, source.read)
  tunix.check_accumulation(plan, source.read)
  return plan, source


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


def _convert_tree(state, **options) -> dict[str, Any]:
  chosen = options_lib.PlanOptions.of(**options)
  run = planner.Run(releases.parse(chosen.maxtext_release) if chosen.maxtext_release else None)
  source = abstract_state.flatten(state)
  plan = planner.plan_conversion(abstract_state.abstract(source), chosen, run)
  return abstract_state.unflatten(dataclasses.replace(plan.target, leaves=execute.apply(plan, source.leaves)))


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
  metadata = location.custom_metadata() | scan_layers | {RECORD: conversion.record()}
  locations.update_step_metadata(folder, carried, metadata)


def _recorded_empty_nodes(custom_metadata) -> dict[Path, Any]:
  """The empty optimizer nodes that an earlier conversion put on record."""
  try:
    nodes = (custom_metadata.get(RECORD) or {}).get("empty_nodes") or []
    if all(abstract_state.is_empty(leaf) and all(isinstance(key, str) for key in path) for path, leaf in nodes):
      return {tuple(path): leaf for path, leaf in nodes}
    found = "other ones"
  except (AttributeError, TypeError, ValueError) as e:
    found = str(e)
  raise errors.DamagedSourceError(
      f"custom_metadata/{RECORD}", "empty_nodes as an earlier conversion recorded them", found
  )
