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

"""Where a checkpoint differs from the model of a MaxText config, as the installed MaxText would save it."""

from collections.abc import Iterator, Mapping
import dataclasses
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import folding
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import model_check
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


@dataclasses.dataclass(frozen=True)
class Model:
  """How a checkpoint differs from the model of a config, leaf by leaf.

  Attributes:
    reader: the installed MaxText's release and trainer.
    leaves: how many leaves of the model were compared.
    is_converted: whether it was compared as the converter would write it for this config, rather than as it is.
    refusal: why the converter would refuse it, if it would: for its number of layers, for instance.
    lacking: the leaves that only the model has, and what they are.
    beyond: the leaves that only the checkpoint has, and what they are.
    unlike: the leaves of another shape or dtype, and what they are in both.
    cast: floats of another width, which MaxText casts when it loads them.
  """

  reader: str
  leaves: int
  is_converted: bool
  refusal: str | None
  lacking: Mapping[str, str]
  beyond: Mapping[str, str]
  unlike: Mapping[str, str]
  cast: Mapping[str, str]

  @property
  def differing(self) -> int:
    """How many leaves differ, not counting those that MaxText casts."""
    return len(self.lacking) + len(self.beyond) + len(self.unlike)

  def lines(self) -> Iterator[tuple[str, str]]:
    """What there is to say, by title, with like layers folded into one line."""
    form = ", in the form that it reads" if self.is_converted else ""
    differ = "1 leaf differs" if self.differing == 1 else f"{self.differing:,} leaves differ"
    said = differ if self.differing else f"all {self.leaves:,} leaves fit"
    yield "model", f"of the config, MaxText {self.reader}{form}: {said}"
    if self.refusal:
      yield "model", f"the converter refuses it: {self.refusal}"
    for title, leaves in (
        ("lacks", self.lacking),
        ("has more", self.beyond),
        ("unlike", self.unlike),
        ("is cast", self.cast),
    ):
      yield from ((title, said) for said in folding.fold(f"{path}  {what}" for path, what in leaves.items()))


def compare(state: abstract_state.AbstractState, config: Any) -> Model:
  """Compares a checkpoint with the model of a config, which is only traced.

  Weights without an optimizer are compared with the model's weights alone.

  Raises:
    ConfigError: MaxText cannot trace the model.
  """
  run_config.check(config)
  run = run_config.run(config, None)
  assert run.release is not None and run.trainer is not None
  wanted = run_config.saved_state(config, run.trainer)
  target, refusal = _converted(state, config, run)
  if not any(path[0] in ("opt_state", "optimizer") for path in target.leaves):
    weights = {path: leaf for path, leaf in wanted.leaves.items() if path[0] == "params"}
    wanted = dataclasses.replace(wanted, leaves=weights)
  differing = model_check.differences(target, wanted)
  named = lambda leaves: {"/".join(path): said for path, said in leaves}
  both = {path: sides for path, sides in differing.items() if None not in sides}
  cast = {path: sides for path, sides in both.items() if model_check.is_cast(*sides)}
  said = plan_lib.described
  unlike = lambda of: named((path, f"{said(found)}, not {said(wanted)}") for path, (found, wanted) in of.items())
  return Model(
      f"{'.'.join(map(str, run.release))} ({run.trainer})",
      len(model_check.arrays(wanted)),
      model_check.arrays(target) != model_check.arrays(state),
      refusal,
      named((path, said(wanted)) for path, (found, wanted) in differing.items() if found is None),
      named((path, said(found)) for path, (found, wanted) in differing.items() if wanted is None),
      unlike({path: sides for path, sides in both.items() if path not in cast}),
      unlike(cast),
  )


def _converted(state, config, run) -> tuple[abstract_state.AbstractState, str | None]:
  """What the converter would write for this config, and why it would refuse to.

  If it refuses, this is what it would write without `nnx_aux`, which is not compared, or without knowing the config's
  decoder, which has other layers; failing that, the state as it is.
  """
  options, refusal = run_config.with_config(options_lib.Options.of(), config), None
  dropped = dataclasses.replace(options, nnx_aux="drop")
  for attempt in ((options, run), (dropped, run), (dropped, dataclasses.replace(run, decoder=None))):
    try:
      return planner.plan_conversion(state, *attempt).target, refusal
    except errors.ConversionError as e:
      refusal = refusal or str(e)
  return state, refusal
