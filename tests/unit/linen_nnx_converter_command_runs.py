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

"""How the tests of the command run it, and on what."""

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

from absl.testing import parameterized
import linen_nnx_converter_util as util

MODULE = "maxtext.checkpoint_conversion.linen_nnx_converter"
SOURCE = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"


def run(*args, **env):
  """Runs the command in a process of its own."""
  return subprocess.run(
      [sys.executable, "-m", MODULE, *map(str, args)], capture_output=True, text=True, check=False, env=os.environ | env
  )


class CommandTestCase(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp()).resolve()
    self.addCleanup(shutil.rmtree, self.tmp)
