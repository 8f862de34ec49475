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

"""The notebook runs from top to bottom, with this package and Flax alone. Needs the dependency group `notebook`."""

import pathlib
import unittest

from absl.testing import absltest
import pytest

NOTEBOOK = pathlib.Path(__file__).parents[2] / "examples" / "linen_nnx_converter.ipynb"


@pytest.mark.integration
class NotebookTest(unittest.TestCase):

  def test_it_runs_and_is_kept_without_outputs(self):
    nbformat, nbclient = (pytest.importorskip(name) for name in ("nbformat", "nbclient"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    self.assertEqual([cell for cell in cells if cell.outputs or cell.execution_count], [])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    said = "".join(output.get("text", "") for cell in cells for output in cell.outputs)
    self.assertIn("verified: 120 leaves (12 copied, 108 sliced)", said)
    self.assertIn("'equal': 120", said)
    self.assertIn("logits of the last token", said)


if __name__ == "__main__":
  absltest.main()
