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

"""The script of docs/recipes.md that checks a run every night, as it stands there, on a whole and a broken checkpoint."""

import json
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


@pytest.mark.integration
class NightlyTest(unittest.TestCase):

  def test_the_script(self):
    tmp = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    shutil.copytree(ROOT / "examples" / "maxtext-0.2.4-linen", tmp / "run" / "checkpoints")
    (script,) = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "docs" / "recipes.md").read_text(), re.MULTILINE | re.DOTALL)
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    night = lambda: subprocess.run(
        ["bash", "-c", script],
        cwd=tmp,
        env=os.environ | {"PATH": path, "RUN": "run"},
        capture_output=True,
        text=True,
        check=False,
    )
    done = night()
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertIn("digests of all leaves", done.stdout)
    for file in (tmp / "run" / "checkpoints" / "2" / "items" / "ocdbt.process_0" / "d").iterdir():
      os.truncate(file, 100)
    self.assertEqual(night().returncode, 2)
    (problem,) = json.loads((tmp / "found.json").read_text())["found"][0]["problems"]
    self.assertIn("The checkpoint is damaged: use another step.", problem)


if __name__ == "__main__":
  absltest.main()
