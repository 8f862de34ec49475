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

"""What is built to be installed over MaxText: every file of ours, and none of MaxText's."""

import pathlib
import subprocess
import sys
import tarfile
import tempfile
import unittest
import zipfile

from absl.testing import absltest
import pytest

ROOT = pathlib.Path(__file__).parents[2]


# Prints which files of a distribution are not as it brought them.
CHANGED = """
import base64, hashlib, importlib.metadata, sys
for file in importlib.metadata.files(sys.argv[1]):
  if file.hash:
    digest = hashlib.new(file.hash.mode, file.locate().read_bytes()).digest()
    if base64.urlsafe_b64encode(digest).decode().rstrip("=") != file.hash.value:
      print(file)
"""


@pytest.mark.integration
class DistributionTest(unittest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
    subprocess.run(["uv", "build", "--quiet", "--out-dir", cls.tmp, ROOT], check=True)
    cls.wheel, cls.sdist = (next(cls.tmp.glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))

  def test_wheel_and_sdist_hold_our_files_and_no_other(self):
    ours = {
        path.relative_to(ROOT / "src").as_posix()
        for suffix in ("*.py", "py.typed")
        for path in ROOT.glob(f"src/**/{suffix}")
    }
    with zipfile.ZipFile(self.wheel) as archive:
      self.assertEqual({name for name in archive.namelist() if ".dist-info/" not in name}, ours)
    with tarfile.open(self.sdist) as archive:
      names = [member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()]
    beside = {"LICENSE", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
    self.assertEqual({name for name in names if ".egg-info/" not in name}, {f"src/{name}" for name in ours} | beside)

  def test_maxtext_and_this_leave_each_other_whole(self):
    """Whichever is installed first; `--version` needs absl and etils alone."""
    for order in (("maxtext==0.2.4", self.wheel), (self.wheel, "maxtext==0.2.4")):
      venv = self.tmp / "venv"
      python = venv / "bin" / "python"
      subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", sys.executable, venv], check=True)
      install = ["uv", "pip", "install", "--quiet", "--no-config", "--no-deps", "--python", python]
      for distribution in (*order, "absl-py", "etils"):
        subprocess.run([*install, distribution], check=True)
      for name in ("maxtext", "maxtext-linen-nnx-converter"):
        self.assertEqual(subprocess.check_output([python, "-c", CHANGED, name], text=True), "")
      for name in ("converter", "comparator", "inspector"):
        version = subprocess.check_output([venv / "bin" / f"linen-nnx-{name}", "--version"], text=True).strip()
        self.assertIn(f"-{version}-", self.wheel.name)


if __name__ == "__main__":
  absltest.main()
