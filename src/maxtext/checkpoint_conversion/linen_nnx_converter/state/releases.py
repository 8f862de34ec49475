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

"""What each MaxText release reads: one row for each release that changed it."""

from collections.abc import Iterable
import dataclasses
import re

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts

Version = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Release:
  """What a trainer reads and writes, from a release on.

  Attributes:
    since: the first release.
    trainer: `linen` or `nnx`.
    layout: the state layout.
    layer_naming: how it names layers that are not scanned.
  """

  since: Version
  trainer: str
  layout: layouts.StateLayout
  layer_naming: str


# The latest row that applies to a trainer counts. Decoder families have rows of their own, in `decoder_families.ROWS`.
ROWS = (
    Release((0, 1, 0), "linen", layouts.LINEN, "flat"),
    Release((0, 2, 3), "nnx", layouts.LINEN_OF_NNX_0_2_3, "nested"),
    Release((0, 2, 4), "nnx", layouts.LINEN_OF_NNX, "flat"),
)
LINEN_UNTIL = (0, 2, 4)  # The last release with a Linen trainer.
_TRIED_UNTIL = (0, 2, 5)
# From here on, multi-token prediction has a norm of its own before the logits, and not the decoder's. Without it this
# release does not resume; the older ones ignore it without a word.
_MTP_NORM_SINCE = (0, 2, 5)


def parse(text: str) -> Version:
  """A version such as `0.2.5`; what follows the third number does not count.

  Raises:
    DirectionError: it is not a version.
  """
  if match := re.match(r"(\d+)\.(\d+)\.(\d+)", text):
    return tuple(map(int, match.groups()))
  raise errors.DirectionError(f"--maxtext_release={text}", "a version such as 0.2.5", text, "Give MaxText's version.")


def find(version: Version, trainer: str | None = None) -> Release:
  """What a release reads.

  Args:
    version: the release.
    trainer: `linen` or `nnx`; None takes the Linen trainer as long as there is one.

  Raises:
    DirectionError: the release has no such trainer.
  """
  trainer = trainer or ("linen" if version <= LINEN_UNTIL else "nnx")
  rows = [row for row in ROWS if row.trainer == trainer and row.since <= version]
  if not rows or (trainer == "linen" and version > LINEN_UNTIL):
    raise errors.DirectionError(
        "--maxtext_release",
        f"a release with a trainer of {trainer}",
        ".".join(map(str, version)),
        "Linen trainers exist up to 0.2.4, NNX trainers that read this layout from 0.2.3.",
    )
  return max(rows, key=lambda row: row.since)


def notes(version: Version | None) -> tuple[str, ...]:
  """A clause for a person if nobody knows yet what the release reads."""
  if version is None or version <= _TRIED_UNTIL:
    return ()
  release, tried = (".".join(map(str, it)) for it in (version, _TRIED_UNTIL))
  return (f"MaxText {release} is newer than {tried}, the last that was tried: written as that one reads it",)


def refuse_other_mtp(weights: Iterable[abstract_state.Path], version: Version):
  """Refuses multi-token prediction with the norm that the release has not, or without the one that it has.

  Args:
    weights: the paths of the model's weights.
    version: the release.

  Raises:
    DirectionError: it is such a one.
  """
  layers = sorted(path for path in weights if path[0] == "mtp_block" and path[1:])
  norm = next((path for path in layers if path[-2].endswith("_final_norm")), None)
  if layers and (norm is not None) != (version >= _MTP_NORM_SINCE):
    since, release = (".".join(map(str, it)) for it in (_MTP_NORM_SINCE, version))
    raise errors.DirectionError(
        norm or layers[0],
        f"the multi-token prediction of MaxText {release}, {'without' if norm else 'with'} a norm of its own",
        f"that of {since} or later" if norm else f"that of a release before {since}",
        f"Go on with {since} or later."
        if norm
        else f"Go on with a release before {since}, or take the weights by --params_only alone, for mtp_num_layers=0.",
    )
