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

"""The inspector's command: steps, damaged checkpoints, flags and exit codes."""

import json
import shutil
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
from linen_nnx_inspector_runs import call
from linen_nnx_inspector_runs import largest_file
from linen_nnx_inspector_runs import LINEN_SCAN
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors


class CommandTest(util.CheckpointTestCase):

  def test_steps(self):
    for step in (1, 20):
      shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan" / "2", self.tmp / "run" / str(step))
    (self.tmp / "run" / "20" / "items" / "_METADATA").write_text("{")
    code, out, err = call("--steps", self.tmp / "run")
    self.assertEqual((code, err), (2, ""))
    self.assertRegex(
        out,
        r"\(2 steps\)\n   1  +[\d.]+ KiB  whole, .*\n  20  +[\d.]+ KiB  .*/20/items: expected metadata that Orbax",
    )
    code, _, err = call("--steps", self.save("pytree", {"params": {"params": {"w": np.zeros(2)}}}))
    self.assertEqual(code, 2)
    self.assertIn("expected a folder of steps, found none. Leave out --steps.", err)

  def test_steps_that_are_not_whole(self):
    run = self.tmp / "run"
    for step in ("1", "2", "3", "4.orbax-checkpoint-tmp-5", "6"):
      shutil.copytree(LINEN_SCAN / "2", run / step)
    largest_file(run / "2").unlink()
    (run / "3" / "items" / "_METADATA").unlink()  # The latest does not hide the others.
    (run / "6" / "_CHECKPOINT_METADATA").write_text("")
    found = json.loads(call("--steps", "--json", run)[1])["found"][0]["steps"]
    self.assertEqual([step["name"] for step in found], ["1", "2", "3", "4.orbax-checkpoint-tmp-5", "6"])
    temporary = "one of Orbax's temporary folders"
    problems = ("^$", "found no such file", "never committed", temporary, "6/_CHECKPOINT_METADATA: expected metadata")
    for step, problem in zip(found, problems):
      self.assertRegex(step["problem"], problem)

  @parameterized.parameters("_METADATA", "manifest.ocdbt", "_sharding", "array_metadatas/process_0", "data", "step")
  def test_a_truncated_file(self, name):
    """What does not need it is told, in the order of the answer; nobody is said to read it."""
    source = shutil.copytree(LINEN_SCAN, self.tmp / "run")
    if name == "step":
      file = source / "2" / "_CHECKPOINT_METADATA"
    else:
      file = largest_file(source) if name == "data" else source / "2" / "items" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    code, out, err = call(source)
    self.assertEqual((code, err, out.count("problem  ")), (2, "", 1))
    self.assertNotIn("read by", out)
    self.assertEqual("layout      Linen TrainState" in out, name in ("data", "step"))

  def test_json_is_json_whatever_a_record_holds_and_a_terminal_takes(self):
    run = shutil.copytree(LINEN_SCAN, self.tmp / "ünï")
    file = run / "2" / "_CHECKPOINT_METADATA"
    record = {"linen_nnx_converter": {"seconds": float("inf"), "source": "\u00fc"}}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"custom_metadata": record}))
    code, out, err = call("--json", run)
    self.assertEqual((code, err), (0, ""))
    self.assertTrue(out.isascii())
    (found,) = json.loads(out, parse_constant=self.fail)["found"]
    self.assertEqual(found["record"], {"seconds": "Infinity", "source": "ü"})
    self.assertEqual(found["path"], f"{run}/2/items")

  @parameterized.parameters(10**30, -(10**30), 1e300)
  def test_numbers_that_nothing_has(self, number):
    source = self.save("source", {"params": {"params": {"w": np.zeros(2)}}}, use_ocdbt=False)
    file = source / "params.params.w" / ".zarray"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"shape": [number]}))
    code, out, err = call(source)
    self.assertEqual((code, err), (2, ""))
    self.assertRegex(out, "problem     params/params/w: expected an array whose metadata is at params.params.w/.zarray")

  def test_a_page_without_a_name(self):
    code, _, err = call(self.save("source", {"params": {"params": {"w": np.zeros(2)}}}), "--html=")
    self.assertEqual((code, err.count("\n")), (2, 1))
    self.assertIn("--html=: expected a new file that can be written, found", err)

  def test_what_is_no_checkpoint(self):
    (self.tmp / "hf").mkdir()
    (self.tmp / "hf" / "model.safetensors").write_bytes(b"")
    for path, what in ((self.tmp / "hf", "model.safetensors"), (self.tmp / "hf" / "model.safetensors", "a file")):
      code, out, err = call(path)
      self.assertEqual((code, out), (2, ""))
      self.assertRegex(
          err, f"^linen_nnx_inspector: {path}: expected an Orbax checkpoint .*, found {what}. Give PATH=.*\n$"
      )

  def test_what_can_be_told_of_a_state_of_no_known_layout(self):
    path = self.save("other", {"weights": {"w": np.zeros((2, 3), np.float32)}})
    code, out, err = call(path, "--tree")
    self.assertEqual((code, err), (2, ""))
    self.assertRegex(out, "problem     top level: expected model .NNX. or params .Linen. at the top, found weights")
    self.assertIn("storage     OCDBT", out)
    self.assertIn("  weights/w  (2, 3) float32\n", out)

  def test_damaged_and_missing(self):
    source = shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "run %20#")
    (source / "2" / "items" / "manifest.ocdbt").unlink()
    code, out, err = call(source, self.tmp / "nowhere", util.FIXTURES / "maxtext-0.2.4" / "linen_scan")
    self.assertEqual(code, 2)
    self.assertIn("problem     ", out)
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
