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

"""Random train states: converted there and back they are the same; damaged, they are refused or wholly accounted for.

`LINEN_NNX_FUZZ_EXAMPLES=20000` in the environment makes that many examples of each property.
"""

import collections

from absl.testing import absltest
from absl.testing import parameterized
from hypothesis import given
from hypothesis import settings
from linen_nnx_converter_random_states import EXAMPLES
from linen_nnx_converter_random_states import examples
from linen_nnx_converter_random_states import fuzz
from linen_nnx_converter_random_states import there
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state


def back(example, nnx):
  return converter.convert_nnx_to_linen(nnx, scan_layers=False, param_scan_axis=example.axis)


def normal(state):
  """As `util.flat`, where an empty tuple, which JSON knows not, is an empty list."""
  return {path: [] if leaf == () else leaf for path, leaf in util.flat(state).items()}


class RoundTripTest(parameterized.TestCase):

  @fuzz
  @given(examples())
  def test_there_and_back_in_memory(self, example):
    self.assertEqual(normal(back(example, there(example))), normal(example.state))

  @settings(fuzz, max_examples=max(5, EXAMPLES // 200))
  @given(examples())
  @pytest.mark.integration
  def test_there_and_back_on_disk(self, example):
    case = util.CheckpointTestCase()
    case.setUp()
    try:
      source = case.save("source", example.state)
      options = {"param_scan_axis": example.axis}
      converter.convert_checkpoint(
          source,
          case.tmp / "nnx",
          scan_layers=example.scan_layers,
          nnx_values=example.nnx_values,
          verify="full",
          **options,
      )
      converter.convert_checkpoint(case.tmp / "nnx", case.tmp / "linen", scan_layers=False, verify="full", **options)
      restored = [converter.load_checkpoint(path) for path in (source, case.tmp / "linen")]
      self.assertEqual(*map(normal, restored))
    finally:
      case.doCleanups()


def contents(state):
  """How often each content occurs among the leaves, empty nodes aside."""
  flat = abstract_state.flatten(state).leaves.values()
  return collections.Counter(str(util.bits(leaf)) for leaf in flat if not abstract_state.is_empty(leaf))


if __name__ == "__main__":
  absltest.main()
