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

"""Casts on request: of the weights, and of the optimizer's moments. No I/O and no arrays."""

from collections.abc import Mapping, Sequence
import dataclasses

import jax
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import arrangement
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import goal as goal_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import leaf_roles

Path = abstract_state.Path


def cast(
    arranged: Sequence[arrangement.Arranged], goal: goal_lib.Goal, paths: Mapping[leaf_roles.Role, Path]
) -> list[arrangement.Arranged]:
  """The target's variables, with the requested dtypes.

  Weights are the params collection, moments what the optimizer keeps of each. Integers and booleans among them are not
  cast, nor is anything else: RNG streams, batch statistics, other collections, counts and the step.

  Args:
    arranged: the variables.
    goal: what the target is to be.
    paths: the path of each role's leaf in the source.

  Raises:
    OptionError: a float is not a plain number, such as a float8 with its scale, or has more than 32 bits; or there are no
      moments to cast.
  """
  if goal.optimizer_dtype is not None and all(item.variable.subtree is None for item in arranged):
    found = "a source without an optimizer's moments"
    raise errors.OptionError(f"--optimizer_dtype={goal.optimizer_dtype}", "moments to cast", found, "Leave it out.")
  return [_cast(item, goal, paths) for item in arranged]


def _cast(item, goal, paths) -> arrangement.Arranged:
  is_moment = item.variable.subtree is not None
  dtype = goal.optimizer_dtype if is_moment else goal.weight_dtype
  if dtype is None or item.variable.collection != layouts.PARAMS or not abstract_state.is_array(item.leaf):
    return item
  found = str(item.leaf.dtype)
  if found == dtype or not jax.numpy.issubdtype(item.leaf.dtype, np.inexact):
    return item
  if found not in abstract_state.FLOATS:
    raise errors.OptionError(
        paths[item.move.sources[0]],
        f"{', '.join(sorted(abstract_state.FLOATS))} to cast to {dtype}",
        found,
        f"Leave out --{'optimizer' if is_moment else 'weight'}_dtype.",
    )
  return dataclasses.replace(item, leaf=jax.ShapeDtypeStruct(item.leaf.shape, jax.numpy.dtype(dtype)))
