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

"""The command as a process among others' programs and environments: what it sets for itself, and only for itself."""

import os
import subprocess
import sys
import unittest

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_command_runs import CommandTestCase
from linen_nnx_converter_command_runs import MODULE
from linen_nnx_converter_command_runs import SOURCE
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter


class ProcessTest(CommandTestCase):

  def test_the_command_alone_chooses_the_cpu(self):
    code = f"import os, {MODULE}; print(os.environ.get('JAX_PLATFORMS'))"
    env = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    self.assertEqual(done.stdout.strip(), "None")
    script = f"import os; from {MODULE} import __main__ as m; m.set_up(); print(os.environ['JAX_PLATFORMS'])"
    for given, wanted in (({}, "cpu"), ({"JAX_PLATFORMS": "tpu"}, "tpu")):
      done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env | given)
      self.assertEqual(done.stdout.strip(), wanted)

  @parameterized.parameters(
      ("linen-nnx-converter", {}, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
      ("linen_nnx_converter/__main__.py", {}, "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"),
      ("linen-nnx-converter", {"GLIBC_TUNABLES": "glibc.malloc.arena_max=3"}, "glibc.malloc.arena_max=3"),
      ("another.py", {}, "None"),
  )
  @unittest.skipIf(sys.platform != "linux", "glibc is Linux's")
  def test_the_command_alone_tunes_its_allocator(self, name, given, wanted):
    program = self.tmp / name
    program.parent.mkdir(exist_ok=True)
    program.write_text(
        f"import os, sys; from {MODULE}.command import streams\n"
        "streams.tune_malloc('linen_nnx_converter')\n"
        "print(os.environ.get('GLIBC_TUNABLES'), sys.argv[1:], sys.flags.utf8_mode)\n"
    )
    env = {variable: value for variable, value in os.environ.items() if variable != "GLIBC_TUNABLES"} | given
    command = [sys.executable, "-X", "utf8", str(program), "--a=b c", ""]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    self.assertEqual(done.stdout, f"{wanted} ['--a=b c', ''] 1\n")

  @parameterized.parameters("converter", "inspector", "comparator")
  @pytest.mark.integration
  def test_a_library_that_cannot_be_imported(self, tool):
    """As JAX with such an environment, or where there is too little memory."""
    arguments = [SOURCE, *([SOURCE] if tool == "comparator" else [])]
    if tool == "converter":
      arguments = [f"--source_path={SOURCE}", f"--target_path={self.tmp}/out"]
    done = subprocess.run(
        [sys.executable, "-m", f"maxtext.checkpoint_conversion.linen_nnx_{tool}", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_ENABLE_X64": "nonsense"},
    )
    self.assertEqual((done.returncode, done.stdout), (1 if tool == "converter" else 2, ""))
    self.assertRegex(done.stderr, f"^linen_nnx_{tool}: .*ValueError: invalid truth value 'nonsense' .*JAX_ENABLE_X64")
    self.assertLen(done.stderr.splitlines(), 1)

  def test_a_program_that_runs_the_command_is_not_started_anew(self):
    """Like IPython's `%run -m`: what it has done until then would be lost, or done twice."""
    program = self.tmp / "program.py"
    program.write_text(
        "import runpy, sys\nprint('begun', flush=True)\nsys.argv = ['', '--version']\n"
        f"runpy.run_module('{MODULE}', run_name='__main__', alter_sys=True)\n"
    )
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True, env=env)
    self.assertEqual(done.stdout, f"begun\n{converter.__version__}\n")


if __name__ == "__main__":
  absltest.main()
