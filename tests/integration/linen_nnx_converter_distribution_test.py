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
import tarfile
import tempfile
import unittest
import zipfile

from absl.testing import absltest
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.integration
class DistributionTest(unittest.TestCase):

  def test_wheel_and_sdist_hold_our_files_and_no_other(self):
    tmp = tempfile.TemporaryDirectory()
    self.addCleanup(tmp.cleanup)
    subprocess.run(["uv", "build", "--quiet", "--out-dir", tmp.name, ROOT], check=True)
    wheel, sdist = (next(pathlib.Path(tmp.name).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    ours = {
        path.relative_to(ROOT / "src").as_posix()
        for suffix in ("*.py", "py.typed")
        for path in ROOT.glob(f"src/**/{suffix}")
    }
    with zipfile.ZipFile(wheel) as archive:
      self.assertEqual({name for name in archive.namelist() if name.startswith("maxtext/")}, ours)
    with tarfile.open(sdist) as archive:
      names = {name.partition("/src/")[2] for name in archive.getnames() if name.endswith((".py", "py.typed"))}
    self.assertLessEqual(ours, names)


if __name__ == "__main__":
  absltest.main()
