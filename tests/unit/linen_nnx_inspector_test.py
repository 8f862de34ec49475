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

"""What the inspector says of checkpoints: of each layout, of damaged ones, and of what is none."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

LINEN = """\
…/maxtext-0.2.4/linen_scan/2/items
  layout     Linen TrainState
  step       3
  params     12 leaves: 57,632 float32; 0.2 MiB
  optimizer  26 leaves: 2 int32, 115,264 float32; 0.4 MiB
  layers     decoder/layers: 4 scanned
  moments    adam: 0/mu of 12 leaves, 0/nu of 12 leaves
  storage    OCDBT, zarr 3: 39 chunks in 4 files, 0.6 MiB
  read by    0.2.3 (linen), 0.2.3 (nnx), 0.2.4 (linen), 0.2.4 (nnx), 0.2.5 (nnx), as far as the tree tells
"""
NNX = """\
…/maxtext-main-2026-05-14/nnx_unscan/2/items
  layout     NNX TrainStateNNX, plain
  step       3
  params     39 leaves: 57,632 float32; 0.2 MiB
  nnx_aux    60 leaves: 150 uint32; 0.0 MiB
  optimizer  80 leaves: 2 int32, 115,264 float32; 0.4 MiB
  rngs       60 leaves
  layers     decoder/layers: 4 one by one
  moments    adam: 0/mu of 39 leaves, 0/nu of 39 leaves
"""
TUNIX = """\
…/tunix/sft/4
  layout     Tunix, boxed everywhere
  step       4
"""


def call(*args):
  """Calls `main` in-process: exit code, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = inspector.main(["program", *map(str, args)])
  return code, out.getvalue().replace(str(util.FIXTURES), "…"), err.getvalue()


class InspectorTest(util.CheckpointTestCase):

  @parameterized.parameters(
      ("maxtext-0.2.4/linen_scan", LINEN), ("maxtext-main-2026-05-14/nnx_unscan", NNX), ("tunix/sft", TUNIX)
  )
  def test_literally(self, name, expected):
    code, out, err = call(util.FIXTURES / name)
    self.assertEqual((code, err), (0, ""))
    self.assertStartsWith(out, expected)

  @parameterized.parameters(*util.ALL)
  def test_it_says_of_each_release_what_the_converter_does(self, name):
    """As it is, or by a command; and what a command makes is read as it is."""
    for reader in inspector.inspect_checkpoint(util.FIXTURES / name).readers:
      self.assertEqual(reader.as_it_is, reader.command is None)
      self.assertIsNone(reader.refusal)
    converter.convert_checkpoint(util.FIXTURES / name, self.tmp / "out", maxtext_release="0.2.5")
    found = inspector.inspect_checkpoint(self.tmp / "out")
    self.assertTrue(next(reader for reader in found.readers if reader.release == "0.2.5").as_it_is)
    self.assertEqual(found.record["source"], str(util.FIXTURES / name / "2" / "items"))

  def test_another_item_is_not_what_maxtext_looks_for(self):
    found = inspector.inspect_checkpoint(util.FIXTURES / "emergency" / "maxtext-0.2.4")
    self.assertEqual([reader for reader in found.readers if reader.as_it_is], [])

  def test_a_step_inside_a_step(self):
    code, out, _ = call(util.FIXTURES / "training_engine" / "inside_a_step")
    self.assertEqual(code, 2)
    self.assertIn("problem    saved inside a step: micro_step_count 1", out)

  def test_the_tree_folds_layers(self):
    _, out, _ = call(util.FIXTURES / "maxtext-main-2026-05-14" / "nnx_unscan", "--tree")
    self.assertIn("\n  model/decoder/layers/0…3/mlp/wi_1/kernel  (32, 64) float32\n", out)

  def test_json(self):
    code, out, _ = call(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", util.FIXTURES / "tunix" / "sft", "--json")
    document = json.loads(out)
    self.assertEqual((code, document["schema"]), (0, 1))
    linen, tunix = document["found"]
    self.assertEqual(
        (linen["step"], linen["layout"], tunix["layout"]), (3, "Linen TrainState", "Tunix, boxed everywhere")
    )
    params = {"part": "params", "dtype": "float32", "leaves": 12, "elements": 57632, "nbytes": 230528}
    self.assertIn(params, linen["amounts"])
    self.assertEqual(linen["leaves"]["step"], "() int32")

  def test_steps(self):
    for step in (1, 20):
      shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan" / "2", self.tmp / "run" / str(step))
    (self.tmp / "run" / "20" / "items" / "_METADATA").write_text("{")
    code, out, err = call("--steps", self.tmp / "run")
    self.assertEqual((code, err), (2, ""))
    self.assertRegex(
        out,
        r"\(2 steps\)\n +1 +0\.\d MiB  whole, .*\n +20 +0\.\d MiB  .*/20/items: expected metadata that Orbax can read",
    )
    code, _, err = call("--steps", self.save("pytree", {"params": {"params": {"w": np.zeros(2)}}}))
    self.assertEqual(code, 2)
    self.assertIn("expected a folder of steps, found none. Leave out --steps.", err)

  def test_what_can_be_told_of_a_state_of_no_known_layout(self):
    path = self.save("other", {"weights": {"w": np.zeros((2, 3), np.float32)}})
    code, out, err = call(path, "--tree")
    self.assertEqual((code, err), (2, ""))
    self.assertRegex(out, "problem    top level: expected model .NNX. or params .Linen. at the top, found weights")
    self.assertIn("storage    OCDBT", out)
    self.assertIn("  weights/w  (2, 3) float32\n", out)

  def test_damaged_and_missing(self):
    source = shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "run %20#")
    (source / "2" / "items" / "manifest.ocdbt").unlink()
    code, out, err = call(source, self.tmp / "nowhere", util.FIXTURES / "maxtext-0.2.4" / "linen_scan")
    self.assertEqual(code, 2)
    self.assertIn("problem    ", out)
    self.assertIn("Linen TrainState", out)  # What else was asked for is answered.
    self.assertEqual(
        err, f"linen_nnx_inspector: {self.tmp / 'nowhere'}: expected a checkpoint, found nothing. Check PATH.\n"
    )
    with self.assertRaises(errors.SourceNotFoundError):
      inspector.inspect_checkpoint(self.tmp / "nowhere")

  def test_wrong_flags_and_none(self):
    self.assertEqual(call("--bogus")[0], 2)
    self.assertEqual(call()[2], "linen_nnx_inspector: expected a checkpoint, found none. Run with --help.\n")
    self.assertIn("--[no]tree", call("--help")[1])

  def test_documented_flags_are_the_real_ones(self):
    documented = (util.ROOT / "docs" / "inspector.md").read_text()
    rows = set(re.findall(r"^\| `--(\w+)", documented, re.M))
    self.assertEqual(rows, {"tree", "steps", "json", "version"})

  @pytest.mark.integration
  def test_a_closed_pipe(self):
    module, source = "maxtext.checkpoint_conversion.linen_nnx_inspector", util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    command = f"{sys.executable} -m {module} --tree {source}"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; echo ${{PIPESTATUS[0]}}"], capture_output=True, text=True, check=True
    )
    self.assertEqual((done.stdout.splitlines()[1:], done.stderr), (["0"], ""))


if __name__ == "__main__":
  absltest.main()
