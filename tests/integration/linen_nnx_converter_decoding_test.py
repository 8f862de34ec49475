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

"""Weights for decoding are those of MaxText's own `generate_param_only_checkpoint`, to the bit.

Needs a Python with MaxText 0.2.4's trainer (`maxtext-0.2.4.txt`) in MAXTEXT_PYTHON.
"""

import pathlib
import tempfile
import unittest

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"


@pytest.mark.integration
class DecodingTest(unittest.TestCase):

  def test_bfloat16_and_layer_by_layer(self):
    tmp = tempfile.TemporaryDirectory()
    self.addCleanup(tmp.cleanup)
    folder = pathlib.Path(tmp.name)
    settings = trainer.LINEN | {"force_unroll": True, "load_full_state_path": SOURCE / "2" / "items"}
    trainer.run("maxtext.utils.generate_param_only_checkpoint", folder, **settings)
    options = {"params_only": True, "weight_dtype": "bfloat16", "scan_layers": False}
    converter.convert_checkpoint(SOURCE, folder / "ours", **options)
    theirs, ours = (converter.load_checkpoint(path) for path in (trainer.checkpoints(folder), folder / "ours"))
    self.assertEqual(*(trainer.bits(tree["params"]) for tree in (theirs, ours)))
    self.assertEqual(len(trainer.bits(ours)), 39)


if __name__ == "__main__":
  absltest.main()
