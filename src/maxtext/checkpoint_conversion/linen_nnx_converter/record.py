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

"""What a conversion did or would do: as a plan for a person, as one line, and as the record in the target."""

from collections.abc import Iterator, Mapping
import dataclasses
import importlib.metadata
import os
from typing import Any

from etils import epath

from maxtext.checkpoint_conversion.linen_nnx_converter import __version__
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import remote_files
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import training_engine

Path = abstract_state.Path

_LIBRARIES = "jax", "orbax-checkpoint", "tensorstore"  # Those that read and write checkpoints.
_TUPLE = "()"  # An empty tuple in the record: in JSON it would be a list.


@dataclasses.dataclass(frozen=True)
class Conversion:
  """What was done, or with `dry_run` would be.

  Attributes:
    plan: the plan.
    source: the folder of the source's pytree.
    target: the folder of the target's pytree, or of its pytrees.
    ways: how the bytes of each target leaf that is an array went.
    seconds: how long it took.
    verified: whether every byte of the target was compared with the source.
    digests: how many of these leaves have a recorded digest, by which the target alone can be verified.
    resumed: what was taken over from an interrupted run, if that was asked for.
    notes: clauses for a person: on the step, its other items, and how the model differs.
    dry_run: whether nothing was written.
    cost: what it would take, for a person, if nothing was written.
  """

  plan: plan_lib.Plan
  source: epath.Path
  target: epath.Path
  ways: Mapping[Path, leaf_routes.Way]
  seconds: float = 0.0
  verified: bool = False
  digests: int = 0
  resumed: str = ""
  notes: tuple[str, ...] = ()
  dry_run: bool = False
  cost: str = ""

  @property
  def nbytes(self) -> dict[leaf_routes.Way, int]:
    """The bytes of the target's arrays, by the way that they went."""
    return leaf_routes.nbytes(self.plan, self.ways)

  def lines(self) -> Iterator[str]:
    """The plan for a person, with the way that the bytes of each leaf go."""
    paths = iter(self.plan.moves)
    for line in self.plan.lines():
      way = self.ways.get(next(paths, ()))
      yield f"{line}, {way}" if way else line

  def record(self) -> dict[str, Any]:
    """The JSON record that is kept in the target's custom metadata."""
    plan = self.plan
    return {
        "source": os.fspath(self.source),
        "source_layout": str(plan.source_layout),
        "target_layout": str(plan.target_layout),
        "scan_layers": plan.scan_layers,
        "leaves": plan.counts(),
        "casts": plan.casts(),
        "bytes": sum(self.nbytes.values()),
        "bytes_by_way": {way.name.lower(): nbytes for way, nbytes in self.nbytes.items()},
        "dropped": {"/".join(path): reason for path, reason in plan.dropped.items()},
        "notes": list(self.notes),
        "empty_nodes": [[list(path), _TUPLE if leaf == () else leaf] for path, leaf in plan.empty_nodes.items()],
        "seconds": round(self.seconds, 3),
        "verified": self.verified,
        "digests": self.digests,
        "versions": {"linen_nnx_converter": __version__}
        | {name: importlib.metadata.version(name) for name in _LIBRARIES},
    }

  def summary(self) -> str:
    """One line for a person."""
    counts, plan = self.plan.counts(), self.plan
    kinds = [kind for kind in counts if counts[kind] and kind != "dropped"]
    moves = ", ".join(f"{counts[kind]} {_MOVE_NAMES.get(kind, kind)}" for kind in kinds)
    dropped = (
        f"; left out {counts['dropped']} leaves ({', '.join(sorted(set(plan.dropped.values())))})" if plan.dropped else ""
    )
    sizes = ", ".join(f"{folding.size(nbytes)} {way}" for way, nbytes in self.nbytes.items() if nbytes)
    done = f" in {self.seconds:.1f} s, {'verified' if self.verified else 'not verified'}" if not self.dry_run else ""
    casts = (f"cast {number} leaves from {dtypes}" for dtypes, number in plan.casts().items())
    more = "".join(f"; {clause}" for clause in (self.resumed, *casts, *self.notes) if clause)
    return errors.escaped(
        f"{'would convert' if self.dry_run else 'converted'} {plan.source_layout} -> {plan.target_layout}{done}: "
        f"{len(plan.moves)} leaves ({moves}), {sizes}{dropped}{more}"
        f"{self._digests() if self.verified else ''} -> {self.target}"
    )

  def _digests(self) -> str:
    if self.digests == len(self.ways):
      return "; digests of all leaves"
    return f"; digests of {self.digests} of {len(self.ways)} leaves, --verify=full for all"


def finish_step(folder: epath.Path, location: locations.Location, conversion: Conversion):
  """Copies what belongs to the step besides the train state, and writes the record."""
  siblings = {sibling.name: sibling for sibling in location.siblings()}
  for name, sibling in siblings.items():
    remote_files.copy_tree(sibling, folder / name)
  handlers = location.step_metadata().get("item_handlers")
  carried = (
      {name: handler for name, handler in handlers.items() if name in siblings} if isinstance(handlers, dict) else {}
  )
  scan_layers = {} if conversion.plan.scan_layers is None else {"scan_layers": conversion.plan.scan_layers}
  complete = training_engine.COMPLETE if conversion.plan.target_layout.name == layouts.TRAINING_ENGINE else {}
  metadata = location.custom_metadata() | scan_layers | complete | {locations.RECORD: conversion.record()}
  locations.update_step_metadata(folder, carried, metadata)


def recorded_empty_nodes(custom_metadata: Mapping[str, Any]) -> dict[Path, Any]:
  """The empty optimizer nodes that an earlier conversion recorded in a checkpoint's custom metadata.

  Raises:
    DamagedSourceError: they make no sense.
  """
  try:
    nodes = (custom_metadata.get(locations.RECORD) or {}).get("empty_nodes") or []
    nodes = {tuple(path): () if leaf == _TUPLE else leaf for path, leaf in nodes}
    if all(abstract_state.is_empty(leaf) and all(isinstance(key, str) for key in path) for path, leaf in nodes.items()):
      return nodes
  except (AttributeError, TypeError, ValueError):  # Any JSON.
    pass
  raise errors.DamagedSourceError(
      f"custom_metadata/{locations.RECORD}", "empty_nodes as an earlier conversion recorded them", "other ones"
  )


_MOVE_NAMES = {
    "copy": "copied",
    "stack": "stacked",
    "slice": "sliced",
    "restack": "restacked",
    "transpose": "transposed",
}
