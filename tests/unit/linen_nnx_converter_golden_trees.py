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

"""MaxText's own abstract states, of every decoder family of three releases."""

import functools
import json
import re
import zipfile

from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.layers import decoder_families
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state

_LINE = re.compile(r"(\S+) (?:(None|\{\})|\((.*)\) (\S+) (\S+))")


@functools.cache
def golden(release: str) -> zipfile.Path:
  """The folder of a release's trees."""
  return zipfile.Path(util.FIXTURES / "golden" / f"{release}.zip", f"{release}/")


def read(path: zipfile.Path, only_params: bool = False) -> abstract_state.AbstractState:
  """A golden tree; with `only_params` without the NNX variables that are no Params."""
  leaves = {}
  for line in path.read_text().splitlines():
    name, empty, shape, dtype, kind = _LINE.fullmatch(line).groups()
    where = tuple(name.split("/"))
    if empty:
      leaves[where] = None if empty == "None" else {}
    elif not only_params or not (where[0] == "nnx_aux" or (where[0] == "model" and kind != "Param")):
      leaves[where] = jax.ShapeDtypeStruct(tuple(map(int, re.findall(r"\d+", shape))), np.dtype(dtype))
  return abstract_state.AbstractState(leaves, _lists(leaves))


def _lists(leaves):
  """The chains of an optimizer in the Linen layout."""
  children = {}
  for path in leaves:
    end = path.index("params") if "params" in path else len(path)  # Below it are weights, whose layers may be numbered.
    for i in range(1, end) if path[0] == "opt_state" else ():
      children.setdefault(path[:i], set()).add(path[i])
  return frozenset(path for path, names in children.items() if all(name.isdigit() for name in names))


def config(release, case):
  return json.loads((golden(release) / f"{case}.config.json").read_text())


def decoder_of(settings, **changed):
  return decoder_families.Decoder(
      settings["decoder_block"],
      settings["num_decoder_layers"],
      settings["first_num_dense_layers"],
      settings["first_num_hash_layers"],
      settings["inhomogeneous_layer_cycle_interval"],
      settings["model_name"],
      tuple(settings.get("engram_layers") or ()),
      **changed,
  )


def version_of(release):
  return tuple(map(int, release.split(".")))


def without(state, *keys):
  """The state without the leaves that have one of these keys in their path."""
  leaves = {path: leaf for path, leaf in state.leaves.items() if not set(keys) & set(path)}
  return abstract_state.AbstractState(leaves, state.lists)


class GoldenTestCase(parameterized.TestCase):
  maxDiff = 2000

  def assert_state(self, plan, wanted):
    found, expected = plan.target.leaves, wanted.leaves
    if any(found.get(path, path) != leaf for path, leaf in expected.items()) or len(found) != len(expected):
      self.assertEqual(*({"/".join(p): str(leaf) for p, leaf in leaves.items()} for leaves in (found, expected)))
      self.fail("they differ, but not in what is printed of them")
    self.assertEqual(plan.target.lists, wanted.lists)
