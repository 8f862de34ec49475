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

"""Reads LoRA adapters, which MaxText and Tunix save without the weights that they belong to."""

from collections.abc import Mapping
import os
from typing import Any

import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import lora
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan as plan_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import opening

Path = abstract_state.Path

# What is above the model in the layouts of adapters, the longer ones first.
_ROOTS = (("params", "params"), ("model_params", "base"), ("model_params",), ("model",), ("base",), ())
_NO_WEIGHTS = frozenset({"optimizer_state", "opt_state", "optimizer", "step", layouts.FOLDER_STEP[0], layouts.NNX_AUX})


def merge(plan: plan_lib.Plan, options: options_lib.Options) -> tuple[plan_lib.Plan, tuple[str, ...]]:
  """The plan with the adapters that the options name, if any, merged into its weights; and notes for a person.

  Raises:
    ConversionError: one of its subclasses: they cannot be read, or do not fit.
  """
  if options.lora_restore_path is None:
    return plan, ()
  adapters, metadata, location = read(options.lora_restore_path)
  alpha = lora.alpha_of(options.lora_alpha, metadata)
  plan = lora.merge(plan, adapters, alpha, 1 if options.param_scan_axis is None else options.param_scan_axis)
  rank = next(iter(plan.merges.values())).a.shape[-1]
  what = f"merged LoRA adapters (rank {rank}, alpha {alpha:g}) of {location.final} into {len(plan.merges)} weights"
  return plan, (f"{what}, which are no longer the source's",)


def read(path: str | os.PathLike[str]) -> tuple[dict[Path, np.ndarray], Mapping[str, Any], locations.Location]:
  """A checkpoint's adapters by path inside the model, MaxText's metadata of them, and its location.

  Raises:
    ConversionError: one of its subclasses: it cannot be read.
  """
  location = locations.find_source(path, "--lora_restore_path")
  checkpoint, metadata = opening.open_source(location), location.custom_metadata().get("lora")
  metadata = metadata if isinstance(metadata, dict) else {}
  opening.check_chunks(checkpoint, checkpoint.stored)
  found = {_inside(path): checkpoint.read(path) for path in checkpoint.stored if path[0] not in _NO_WEIGHTS}
  ranks = {array.shape[-1] for path, array in found.items() if path[-1].endswith("_lora_a") and array.ndim}
  if rank := metadata.get("lora_rank"):
    ranks.add(rank)
  if len(ranks) > 1:
    raise errors.LayoutError(
        location.final,
        "adapters of one rank, which is that of their metadata",
        ", ".join(sorted(map(str, ranks))),
        "The checkpoint is damaged: use another step.",
    )
  return found, metadata, location


def _inside(path) -> Path:
  root = next(root for root in _ROOTS if path[: len(root)] == root)
  return path[len(root) : -1] if path[-1] == layouts.VALUE else path[len(root) :]
