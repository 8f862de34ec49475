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

"""The command with streams that are closed, full or not read."""

import os
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_command_runs import CommandTestCase
from linen_nnx_converter_command_runs import MODULE
from linen_nnx_converter_command_runs import run
from linen_nnx_converter_command_runs import SOURCE
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

COMPARATOR = "maxtext.checkpoint_conversion.linen_nnx_comparator"


def run_with(streams, *args, module=MODULE):
  """Runs the command with streams as a shell redirects them: the exit codes of all of a pipe, and what came out."""
  script = f'set -o pipefail; "$@" {streams}; echo "${{PIPESTATUS[*]}}" >&3'
  reader, writer = os.pipe()
  command = ["bash", "-c", script.replace(">&3", f">&{writer}"), "bash", sys.executable, "-m", module, *map(str, args)]
  done = subprocess.run(command, capture_output=True, text=True, check=False, pass_fds=(writer,))
  os.close(writer)
  with os.fdopen(reader) as codes:
    return codes.read().strip(), done.stdout, done.stderr


class StreamsTest(CommandTestCase):

  @parameterized.parameters(
      (">/dev/full", "0", True),
      ("| true", "0 0", True),
      ("<&- >&- 2>&-", "0", False),
  )
  @pytest.mark.integration
  def test_a_conversion_whose_output_nobody_takes(self, streams, codes, is_told):
    """It is done, and says so on standard error, if that is there."""
    done = run_with(streams, f"--source_path={SOURCE}", f"--target_path={self.tmp}/out")
    self.assertEqual(done[:2], (codes, ""))
    self.assertRegex(done[2], r"^converted .*/out/2/items\n$" if is_told else "^$")
    self.assertEqual(converter.detect_format(converter.load_checkpoint(self.tmp / "out")), "nnx")
    self.assertEqual(os.listdir(self.tmp / "out"), ["2"])

  @pytest.mark.integration
  def test_a_plan_that_nobody_reads_to_its_end(self):
    flags = f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--scan_layers=False", "--dry_run"
    self.assertEqual(run_with("| true", *flags), ("0 0", "", ""))

  @parameterized.product(streams=("| true", ">&-", ">/dev/full"), module=(MODULE, COMPARATOR))
  @pytest.mark.integration
  def test_help_that_nobody_reads(self, streams, module):
    codes, _, err = run_with(streams, "--help", module=module)
    self.assertEqual(codes.split()[0], "0")
    self.assertNotIn("Error", err)
    self.assertEqual(err == "", streams == "| true")

  @parameterized.parameters("2>&-", "2>/dev/full", ">&- 2>&-")
  @pytest.mark.integration
  def test_a_refusal_that_nobody_reads(self, streams):
    self.assertEqual(run_with(streams, "--no_such_flag"), ("1", "", ""))

  @pytest.mark.integration
  def test_a_name_that_standard_output_has_no_characters_for(self):
    done = run(f"--source_path={SOURCE}", f"--target_path={self.tmp}/\u00fc", "--dry_run", PYTHONIOENCODING="ascii")
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertIn(f"{self.tmp}/\\xfc/2/items\n", done.stdout)


if __name__ == "__main__":
  absltest.main()
