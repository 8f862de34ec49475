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

"""What the tests of the inspector share: a checkpoint, and calls of the command."""

import contextlib
import io

import linen_nnx_converter_util as util

from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector

LINEN_SCAN = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"


def call(*args):
  """Calls `main` in-process: exit code, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = inspector.main(["program", *map(str, args)])
  return code, out.getvalue().replace(str(util.FIXTURES), "…"), err.getvalue()


def largest_file(folder):
  """The data file that holds most."""
  return max((path for path in folder.rglob("d/*")), key=lambda path: path.stat().st_size)
