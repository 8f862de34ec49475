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

"""Models of MaxText at their real size, abstractly: each state planned into the others lands on MaxText's own.

Nothing is shrunk or cached: MaxText traces every layer, scanned and unscanned, optimizer included, in the script beside
this file, which goes through all models for `docs/conformance.md`. A sample is traced here, of MaxText 0.2.4 by both
trainers; its Linen states are then planned into those of 0.2.5, and back.

Needs a Python with MaxText 0.2.4, its trainer's dependencies and this package in MAXTEXT_PYTHON, and one with 0.2.5 in
MAXTEXT_0_2_5_PYTHON.
"""

import os
import pathlib
import subprocess
import tempfile
import unittest

from absl.testing import absltest
import pytest

SCRIPT = pathlib.Path(__file__).parent / "linen_nnx_converter_conformance.py"
PAGE = pathlib.Path(__file__).parents[2] / "docs" / "conformance.md"
# A small one of each way to arrange layers, and of those that MaxText or the converter refuses.
MODELS = frozenset(
    (
        "deepseek-custom",
        "deepseek2-16b",
        "deepseek3-tiny",
        "deepseek4-tiny",
        "envy-test",
        "gemma2-2b",
        "gemma3-4b",
        "gemma4-e2b",
        "gpt-oss-20b",
        "llama2-7b",
        "llama4-17b-16e",
        "olmo3-7b",
        "qwen3-next-80b-a3b",
        "qwen3-vl-2b",
        "qwen3.5-35b-a3b",
    )
)
# What 0.2.5 has anew, and what it has otherwise.
OF_0_2_5 = frozenset(
    (
        "deepseek3-tiny",
        "gemma4-e2b",
        "qwen3-next-80b-a3b",
        "qwen3.5-35b-a3b",
        "qwen3.5-35b-a3b-fp8",
        "weaver-mini",
    )
)


def cells(text: str) -> list[list[str]]:
  """The rows of the tables in a text."""
  return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]


def documented(models: frozenset[str], release: str) -> dict[str, str]:
  """The marks of each model in the page's table, which names those alone that are not ✓ throughout."""
  heading, *rows = cells(PAGE.read_text().partition("## Results\n")[2].partition("\n## ")[0])
  marks = {model: row[heading.index(release)] for row in rows for model in row[0].split(", ")}
  return {model: marks.get(model, "✓✓✓✓✓✓✓") for model in models}


@pytest.mark.integration
class ConformanceTest(unittest.TestCase):
  maxDiff = None

  def sampled(self, python: str, models: frozenset[str], *arguments: str) -> tuple[dict[str, str], str]:
    """What the script says of the models, and what it prints."""
    command = [os.environ[python], SCRIPT, f"--models={','.join(sorted(models))}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    found = {row[0]: row[-1] for row in cells(done.stdout) if row[0] in models}
    return found, " ".join(done.stdout.split())

  def test_a_sample(self):
    with tempfile.TemporaryDirectory() as folder:
      found, text = self.sampled("MAXTEXT_PYTHON", MODELS, f"--write_linen={folder}")
      self.assertEqual(found, documented(MODELS, "0.2.4"))
      for reason in ("engram modules", "routed bias", "deepstack features"):
        self.assertIn(reason, text)
      found, text = self.sampled("MAXTEXT_0_2_5_PYTHON", OF_0_2_5, f"--read_linen={folder}")
      self.assertEqual(found, documented(OF_0_2_5, "0.2.5"))
      self.assertIn("reduced: MaxText 0.2.5 trains no gate/bias", text)


if __name__ == "__main__":
  absltest.main()
