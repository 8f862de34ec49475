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

"""Models of MaxText 0.2.4 at their real size, abstractly: each state planned into the others lands on MaxText's own.

Nothing is shrunk or cached: MaxText traces every layer, for both trainers, scanned and unscanned, optimizer included, in
the script beside this file, which goes through all models for `docs/conformance.md`. A sample is traced here.

Needs a Python with MaxText 0.2.4, its trainer's dependencies and this package in MAXTEXT_PYTHON.
"""

import os
import pathlib
import subprocess
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
        "deepseek4-tiny",
        "envy-test",
        "gemma2-2b",
        "gemma3-4b",
        "gemma4-e2b",
        "gpt-oss-20b",
        "llama2-7b",
        "llama4-17b-16e",
        "olmo3-7b",
        "qwen3-vl-2b",
        "qwen3.5-35b-a3b",
    )
)


def cells(text: str) -> list[list[str]]:
  """The rows of the first table in a text, below its heading."""
  rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
  return rows[1:]


def documented() -> dict[str, list[str]]:
  """Of each model on the page, its decoder and its four results."""
  found = {}
  for decoder, models, results in (row for row in cells(PAGE.read_text()) if len(row) == 3):
    four = results.split(", ") if ", " in results else [results] * 4
    found |= {model: [decoder, *four] for model in models.split(", ")}
  return found


@pytest.mark.integration
class ConformanceTest(unittest.TestCase):
  maxDiff = None

  def test_a_sample(self):
    page = documented()
    command = [os.environ["MAXTEXT_PYTHON"], SCRIPT, f"--models={','.join(sorted(MODELS))}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    found = {row[0]: [row[1], *row[-4:]] for row in cells(done.stderr) if row[0] in MODELS}
    self.assertEqual(found, {model: page[model] for model in MODELS})
    reasons = done.stdout.partition("\n\n")[2]
    for reason in ("engram modules", "routed bias", "deepstack features"):
      self.assertIn(reason, " ".join(reasons.split()))


if __name__ == "__main__":
  absltest.main()
