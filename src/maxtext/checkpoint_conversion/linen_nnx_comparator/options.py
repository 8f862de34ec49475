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

"""The options of a comparison."""

import dataclasses
import math
from typing import Any, Literal

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(options_lib.Checked):
  """What is compared, and what is accepted. Checked when they are made, before anything is read.

  Attributes:
    param_scan_axes: the layer axis of scanned Params, in A and in B; None is the config's, else 1.
  """

  param_scan_axes: tuple[int, int] | None = None
  nnx_aux: Literal["keep", "drop"] = options_lib.option(
      "keep", "Whether to compare NNX state that is not a Param: RNG streams, batch statistics and other Variables."
  )
  ignore_rngs: bool = options_lib.option(False, "Leave out the keys and counts of RNG streams.")
  params_only: bool = options_lib.option(False, "Leave out optimizer, step and all state that is not a Param.")
  structure_only: bool = options_lib.option(False, "Compare paths, shapes and dtypes; read no values.")
  atol: float | None = options_lib.option(None, "Accept values that differ by no more.", 0.0, math.inf)
  rtol: float | None = options_lib.option(None, "The same, as a share of B's value.", 0.0, math.inf)
  memory_budget_gib: float = options_lib.option(
      2.0, "GiB of memory for data in flight. A chunk larger than this is still held whole.", least=1 / 16
  )

  def __post_init__(self):
    axes = self.param_scan_axes
    if axes is not None and (not isinstance(axes, tuple) or len(axes) != 2):
      raise errors.OptionError("--param_scan_axis", "two axes, of A and of B", errors.shown(axes))
    super().__post_init__()
    self.of_sides()  # Which checks the axes.

  def of_sides(self, config: Any = None) -> list[options_lib.Options]:
    """The converter's options for A and for B, with what the config says where these leave it open."""
    axes = self.param_scan_axes or (1 if config is None else config.param_scan_axis,) * 2
    shared = {name: getattr(self, name) for name in ("nnx_aux", "params_only", "memory_budget_gib")}
    return [options_lib.Options.of(param_scan_axis=axis, **shared) for axis in axes]
