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

"""Which trainers read a checkpoint as it is, by the converter's own plans for them; and its commands for the others."""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import os
import shlex

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_names
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import goal as goal_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations

RELEASES = (("0.2.3", "linen"), ("0.2.3", "nnx"), ("0.2.4", "linen"), ("0.2.4", "nnx"), ("0.2.5", "nnx"))
_NNX_CONFIG = "base.yml model_name=… enable_nnx=True pure_nnx=True pure_nnx_decoder=True"


@dataclasses.dataclass(frozen=True)
class Reader:
  """A trainer of a release: whether it reads the checkpoint as it is, or else what to run, or why it cannot."""

  release: str
  trainer: str
  as_it_is: bool = False
  command: str | None = None
  refusal: str | None = None


def find(state: abstract_state.AbstractState, location: locations.Location, scan_axis: int | None) -> Iterator[Reader]:
  """Which trainers read it, and how to convert it for the others.

  Args:
    state: the checkpoint's abstract state.
    location: where it is.
    scan_axis: the layer axis of its scanned Params; None if it has none.
  """
  is_named = location.step_folder is None or location.items.name == locations.ITEMS  # The name that MaxText looks for.
  flag = location.custom_metadata().get("scan_layers")
  is_piped = any(layer_names.PIPELINE_LAYERS[0] in path for path in state.leaves)
  plan = _planner(state)
  for release, trainer in RELEASES:
    run = planner.Run(releases.parse(release), trainer)
    options = {} if scan_axis in (None, 1) else {"param_scan_axis": scan_axis}
    if is_piped and trainer == "nnx" and releases.parse(release) < decoder_families.FLAT_NNX_SINCE:
      options["scan_layers"] = True  # Which takes the layers out of the pipeline.
    try:
      changes_nothing, scan_layers = plan(options_lib.PlanOptions.of(maxtext_release=release, **options), run)
    except errors.ConversionError as e:
      yield Reader(release, trainer, refusal=str(e))
      continue
    is_flag_true = not isinstance(flag, bool) or scan_layers in (None, flag)  # MaxText checks it.
    if is_named and is_flag_true and changes_nothing:
      yield Reader(release, trainer, as_it_is=True)
    else:
      yield Reader(release, trainer, command=_command(location, release, trainer, options))


def _planner(state) -> Callable[[options_lib.PlanOptions, planner.Run], tuple[bool, bool | None]]:
  """Plans conversions; returns whether each changes nothing, and the source's `scan_layers`.

  The source is read once, and what differs only in the release is planned once.
  """
  layout, known = layouts.detect(state), []
  read = functools.cache(lambda: planner.read(state, layout, params_only=False))

  def plan(options, run):
    goal = goal_lib.set_goal(layout, options, run)
    what = dataclasses.replace(goal, release=None), planner.select(read(), goal)
    said = next((said for other, said in known if other == what), None)
    if said is None:
      planned = planner.plan(read(), goal, what[1], {})
      said = _changes_nothing(planned), planned.source_scan_layers
      known.append((what, said))
    return said

  return plan


def _command(location, release, trainer, options) -> str:
  """The converter's command. Only a config names a trainer other than the release's first."""
  is_first = releases.find(releases.parse(release)).trainer == trainer
  return " ".join(
      (
          f"linen-nnx-converter --source_path={_quoted(os.fspath(location.items))} --target_path=…",
          f"--maxtext_release={release}",
          *(f"--{name}={value}" for name, value in options.items()),
          *(() if is_first else (_NNX_CONFIG,)),
      )
  )


def _quoted(path: str) -> str:
  """A path for a shell, in one line."""
  if path.isprintable():
    return shlex.quote(path)
  return "$'" + errors.escaped(path.replace("'", r"\'")) + "'"  # TensorStore takes no backslashes.


def _changes_nothing(plan: plan_lib.Plan) -> bool:
  """Whether the target is identical to the source, leaf by leaf and node by node."""
  source, target = plan.source.leaves, plan.target.leaves
  return (
      source.keys() == target.keys()
      and plan.source.lists == plan.target.lists
      and all(plan_lib.described(leaf) == plan_lib.described(source[path]) for path, leaf in target.items())
      and all(move.kind == "copy" and move.sources == [path] for path, move in plan.moves.items())
  )
