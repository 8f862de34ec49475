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

"""Checkpoints of MaxText 0.2.5's training engine: Tunix's items, and more if saved inside a step.

Its folder N holds N updates, like Tunix's: it saves under `train_step`, which each update increments. Between the
micro-batches of a step it saves under `train_step + 1`, with the gradients so far and `micro_step_count` in the custom
metadata, and resumes at `N - 1` (`maxtext/training_engine/maxtext_engine.py`, `save_checkpoint`, `restore_checkpoint`).
"""

from collections.abc import Collection, Mapping
from typing import Any

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts

GRADIENTS = "accumulated_grads"  # The item with the gradients of an unfinished step.
_COUNT = "micro_step_count"
COMPLETE = {_COUNT: 0}  # In the custom metadata of a complete step.


def is_engine(custom_metadata: Mapping[str, Any]) -> bool:
  """Whether MaxText's training engine wrote a step with this custom metadata."""
  return _COUNT in custom_metadata


def under_way(items: Collection[str], custom_metadata: Mapping[str, Any]) -> str:
  """What shows that a step was unfinished when it was saved; "" for a complete one.

  Args:
    items: the names of the step's items.
    custom_metadata: Orbax's custom metadata of the step.
  """
  count = custom_metadata.get(_COUNT) or 0
  found = [f"{_COUNT} {count}"] if count else []
  return ", ".join(found + [GRADIENTS] * (GRADIENTS in items))


def check(location, params_only: bool) -> tuple[str, ...]:
  """Refuses an unfinished step, which only the engine itself can resume.

  Args:
    location: the source, a `locations.Location`.
    params_only: whether only its weights are asked for.

  Returns:
    A note for a person, if the weights are taken from inside a step.

  Raises:
    StepError: more than the weights is asked for.
  """
  if not location.under_way:
    return ()
  if params_only or layouts.TUNIX_ITEMS[1] not in location.split:
    return (f"weights after {location.updates} updates, from inside a step, whose {location.under_way} are left out",)
  raise errors.StepError(
      location.final,
      "a complete step",
      f"{location.under_way}: MaxText's training engine saved it between the micro-batches of a step",
      "Use a step that the engine has completed, or take the weights alone with --params_only.",
  )
