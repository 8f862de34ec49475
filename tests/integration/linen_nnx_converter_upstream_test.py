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

"""The packages and their tests in MaxText's own source tree, as a change to it would put them there; and the core alone.

MaxText's tree is that of 0.2.5's wheel, with the options of MaxText's own `pytest.ini` and two lines more.
"""

import ast
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

from absl.testing import absltest
import pytest

ROOT = pathlib.Path(__file__).parents[2]
FOLDER = pathlib.Path("src", "maxtext", "checkpoint_conversion")
CONVERTER = FOLDER / "linen_nnx_converter"
TESTS = ("converter_layouts", "converter_checkpoint", "comparator_options")
PYTEST = """[pytest]
testpaths =
    tests
python_files = *_test.py *_tests.py
addopts =
    -rf --import-mode=importlib --strict-markers
markers =
    cpu_only: marks tests to be run on CPUs only
    integration: needs MaxText's trainer, or minutes
pythonpath = tests/unit
"""
CORE = """
import sys
import numpy as np
import orbax.checkpoint as ocp
from maxtext.checkpoint_conversion import linen_nnx_converter as converter

assert converter.__file__.startswith(sys.argv[1]), converter.__file__
linen = ocp.PyTreeCheckpointer().restore(sys.argv[2])
nnx = converter.convert_linen_to_nnx(linen, scan_layers=False)
kernel = linen["params"]["params"]["decoder"]["layers"]["mlp"]["wi_0"]["kernel"]
np.testing.assert_array_equal(nnx["model"]["decoder"]["layers"]["3"]["mlp"]["wi_0"]["kernel"]["value"], kernel[:, 3])
back = converter.convert_nnx_to_linen(nnx, scan_layers=True)["params"]["params"]["decoder"]["layers"]["mlp"]["wi_0"]
np.testing.assert_array_equal(back["kernel"], kernel)
try:
  converter.convert_checkpoint
except ImportError:
  print("the core alone")
"""


@pytest.mark.integration
class UpstreamTest(unittest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tree = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    install = ["uv", "pip", "install", "--quiet", "--no-config", "--no-deps", "--python", sys.executable]
    subprocess.run([*install, "--target", cls.tree / "src", "maxtext==0.2.5"], check=True, cwd=ROOT)
    shutil.copytree(ROOT / "tests" / "unit", cls.tree / "tests" / "unit")
    shutil.copytree(ROOT / "tests" / "assets", cls.tree / "tests" / "assets")
    (cls.tree / "pytest.ini").write_text(PYTEST)

  def put(self, files):
    """Puts files of ours, and no others, into the tree."""
    for package in self.tree.glob(f"{FOLDER}/linen_nnx_*"):
      shutil.rmtree(package)
    for file in files:
      (self.tree / file).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(ROOT / file, self.tree / file)

  def run_there(self, *command):
    done = subprocess.run(
        [sys.executable, *command],
        cwd=self.tree,
        env=os.environ | {"PYTHONPATH": str(self.tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
    return done.stdout

  def test_the_tests_pass_in_the_tree(self):
    self.put(path.relative_to(ROOT) for path in (ROOT / FOLDER).rglob("*.py"))
    for name in ("converter", "inspector"):
      find = f"from maxtext.checkpoint_conversion import linen_nnx_{name} as package; print(package.__file__)"
      self.assertTrue(self.run_there("-c", find).startswith(str(self.tree)))
    tests = (f"tests/unit/linen_nnx_{name}_test.py" for name in TESTS)
    output = self.run_there("-m", "pytest", "-m", "not integration", *tests)
    self.assertGreater(int(re.search(r"(\d+) passed", output).group(1)), 60)

  def test_the_core_stands_alone(self):
    """What converts in memory is what CONTRIBUTING.md lists, file by file, with lines."""
    core = imported_by(CONVERTER / "api.py", set())
    self.put(core)
    source = ROOT / "tests" / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan" / "2" / "items"
    self.assertEqual(self.run_there("-c", CORE, str(self.tree), source), "the core alone\n")
    listed = {}
    for folder, row in re.findall(r"^\| `(\S*)` \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE):
      listed |= {CONVERTER / folder / f"{name}.py": int(n) for name, n in re.findall(r"`(\w+)` (\d+)", row)}
    lines = {file: (ROOT / file).read_text().count("\n") for file in core}
    self.assertEqual(set(listed), set(lines))
    for file, number in lines.items():
      self.assertAlmostEqual(listed[file], number, delta=max(10, number / 10), msg=str(file))


def imported_by(file, found):
  """A file of ours and all that it imports, the packages that they are in among them."""
  found.add(file)
  found.add(file.with_name("__init__.py"))
  for node in ast.walk(ast.parse((ROOT / file).read_text())):
    if isinstance(node, ast.ImportFrom) and node.module.startswith("maxtext."):
      for alias in node.names:
        imported = pathlib.Path("src", *node.module.split("."), f"{alias.name}.py")
        if imported not in found and (ROOT / imported).exists():
          imported_by(imported, found)
  return found


if __name__ == "__main__":
  absltest.main()
