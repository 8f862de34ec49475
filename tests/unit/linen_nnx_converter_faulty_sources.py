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

"""What the tests of faults share: sources, and what a refused conversion must leave."""

import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

SCAN, UNSCAN = {"scan_layers": True}, {"scan_layers": False}


def params(layers=3):
  """Layers that do not compress, of 128 KiB each, so that values stand in data files."""
  random = np.random.default_rng(0)
  array = lambda: random.integers(0, 2**16, (128, 256), np.uint16)
  return {"decoder": {f"layers_{i}": {"wi_0": array(), "wo": array()} for i in range(layers)}}


def scanned():
  tree = converter.convert_linen_to_nnx({"params": {"params": params()}})
  return converter.convert_nnx_to_linen(tree)


class FaultTestCase(util.CheckpointTestCase):
  """Has a source to read by reference, `unscanned`, and one to be streamed, `scanned`."""

  def setUp(self):
    super().setUp()
    self.source = self.save("unscanned", {"params": {"params": params()}})

  def assert_refused(self, error, message, source=None, target="out", **options):
    """The conversion is refused in one line, and leaves everything as it was."""
    before = util.files(self.tmp), util.snapshot(self.tmp)
    with self.assertRaisesRegex(error, message) as caught:
      converter.convert_checkpoint(source or self.source, self.tmp / target, **options)
    self.assertLen(str(caught.exception).splitlines(), 1)
    self.assertEqual((util.files(self.tmp), util.snapshot(self.tmp)), before)
