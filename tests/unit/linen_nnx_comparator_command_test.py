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

"""The comparator's command: output, JSON, exit codes, and what is documented of it."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_comparator import __main__ as command

MODULE = "maxtext.checkpoint_conversion.linen_nnx_comparator"
SCANNED = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
WI = "model/decoder/layers_1/mlp/wi_0/kernel"


def call(*args):
  """Calls `main` in-process: exit code, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = comparator.main(["program", *map(str, args)])
  return code, out.getvalue(), err.getvalue()


class CommandTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = util.flipped(kernel["kernel"], (2, 3))
    b["opt_state"][0]["mu"]["params"]["token_embedder"]["embedding"][0, 0] = np.nan
    self.a, self.b = self.save("a", a), self.save("b", converter.convert_linen_to_nnx(b))

  @pytest.mark.integration
  def test_equal(self):
    done = subprocess.run(
        [sys.executable, "-m", MODULE, SCANNED, util.ROOT / "examples" / "maxtext-0.2.4-linen"],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual((done.returncode, done.stderr), (0, ""))
    self.assertRegex(
        done.stdout.splitlines()[-1],
        r"^equal to the bit: 120 leaves \(120 equal\), 0 of 172,899 elements differ, in \d+\.\d s$",
    )

  def test_different(self):
    code, out, err = call(self.a, self.b)
    self.assertEqual((code, err), (1, ""))
    embedding = "optimizer/opt_state/0/mu/token_embedder/embedding"
    out = re.sub(r"in \d+\.\d s$", "in 0.0 s", out.replace(str(self.tmp), "…").strip())
    self.assertEqual(
        out,
        f"""\
A  …/a  (Linen TrainState, not scanned)
B  …/b  (NNX TrainStateNNX, boxed, scanned)

values, worst first
  {embedding}  float32 (7, 4)  1 of 28 differ; first at [0, 0]: 0.0 and nan; \
1 NaN or infinite on one side, first at [0, 0]: 0.0 and nan
  {WI}  float32 (3, 5)  1 of 15 differ; abs 7.629e-06 at [2, 3]; rel 6.752e-08 at [2, 3]; ulp 1 at [2, 3]; \
first at [2, 3]: 113.0 and 113.00001

optimizer
  opt_state
    0
      mu
        token_embedder
          embedding  1 of 28
        decoder  13 equal
      nu  14 equal
      … 1 equal
    2  1 equal
  … 1 equal
model
  decoder
    layers_1
      mlp
        wi_0
          kernel  1 of 15, abs 7.629e-06, rel 6.752e-08, ulp 1
        … 1 equal
      norm  1 equal
      … 1 equal
    decoder_norm  1 equal
    layers_0  4 equal
    layers_2  4 equal
  token_embedder  1 equal

params     13 equal, 1 different
optimizer  29 equal, 1 different
step       1 equal
different: 45 leaves (43 equal, 2 different), 2 of 306 elements differ, in 0.0 s""",
    )

  def test_few_leaves(self):
    _, out, _ = call(self.a, self.b, "--leaves=1")
    self.assertIn("values, worst first, 1 of 2\n", out)
    self.assertNotIn(f"{WI}  ", out)
    self.assertIn("model  13 equal, 1 different\n", out)

  def test_color(self):
    far, near = "\033[31m", "\033[33m"
    _, out, _ = call(self.a, self.b, "--color=always")
    self.assertIn(f"          {near}kernel  1 of 15", out)
    self.assertIn(f"{far}embedding  1 of 28\033[0m", out)
    for flag in ("--color=never", "--color=auto"):  # Standard output is no terminal here.
      self.assertNotIn("\033", call(self.a, self.b, flag)[1])

  @parameterized.parameters(("xterm", True), ("dumb", False))
  def test_color_of_a_terminal(self, name, is_colored):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    with absltest.mock.patch.dict(os.environ, TERM=name), contextlib.redirect_stdout(terminal):
      os.environ.pop("NO_COLOR", None)
      command.main(["", str(self.a), str(self.b)])
    self.assertEqual("\033" in terminal.getvalue(), is_colored)

  def test_json_to_standard_output(self):
    code, out, _ = call(self.a.rename(self.tmp / "ä"), self.b, "--json")
    document = json.loads(out)
    self.assertTrue(out.isascii())  # What a terminal cannot take would be escaped, and no JSON any more.
    self.assertEqual(code, 1)
    self.assertEqual((document["accepted"], document["leaves"], document["differing"]), (False, 45, 2))
    self.assertEqual([leaf["status"] for leaf in document["worst_first"]], ["different"] * 2)
    leaf = document["worst_first"][1]
    self.assertEqual((leaf["path"], leaf["part"]), (WI, "params"))
    self.assertEqual(leaf["b"]["source"], "model/decoder/layers/mlp/wi_0/kernel/value[1 of axis 1]")
    self.assertEqual(leaf["difference"]["first"]["index"], [2, 3])
    self.assertEqual(leaf["difference"]["largest_ulp"]["value"], 1)
    self.assertEqual(len(document["equal"]) + 2, document["leaves"])

  def test_json_to_a_file(self):
    code, out, _ = call(self.a, self.b, f"--json={self.tmp}/report.json")
    self.assertEqual(code, 1)
    self.assertIn("different: 45 leaves", out)
    self.assertEqual(json.loads((self.tmp / "report.json").read_text())["leaves"], 45)

  def test_a_tolerance_decides_the_exit_code(self):
    kernel = {"params": {"params": {"decoder": {"norm": {"scale": np.ones(3, np.float32)}}}}}
    other = jax.tree.map(lambda leaf: leaf + np.float32(1e-3), kernel)
    a, b = self.save("one", kernel), self.save("other", other)
    self.assertEqual(call(a, b)[0], 1)
    self.assertEqual(call(a, b, "--atol=0.01")[0], 0)
    self.assertEqual(call("--rtol=0.01", a, b)[0], 0)
    self.assertEqual(call(a, b, "--rtol=0.0001")[0], 1)
    self.assertIn("equal within the tolerance: 1 leaves (1 within tolerance), 3 of 3 elements", call(a, b, "--atol=1")[1])

  @parameterized.parameters(
      ((), "expected two checkpoints, A and B, found none. Run with --help."),
      (("{a}",), "expected two checkpoints, A and B, found {a}. Run with --help."),
      (("{a}", "model_name=x"), "expected two checkpoints, A and B, found {a} model_name=x. Run with --help."),
      (("{a}", "{b}", "{a}"), "{a}: expected a config, such as base.yml, or a setting of it"),
      (("{a}", "{a}/nowhere"), "B: {a}/nowhere: expected a checkpoint, found nothing. Check B."),
      (("{tmp}/empty", "{a}"), "A: {tmp}/empty: expected an Orbax checkpoint of a pytree"),
      (("{a}", "{b}", "--param_scan_axis=x"), "--param_scan_axis: expected one axis, or two, found x. Give 1 or 1,0."),
      (("{a}", "{b}", "--param_scan_axis=1,0,2"), "--param_scan_axis: expected one axis, or two"),
      (("{a}", "{b}", "--atol=-1"), "flag --atol=-1: -1.0 is not a non-negative number"),
  )
  @pytest.mark.integration
  def test_bad_input_is_refused_in_one_line(self, args, message):
    (self.tmp / "empty").mkdir()
    names = {"a": self.a, "b": self.b, "tmp": self.tmp}
    code, out, err = call(*(arg.format(**names) for arg in args))
    self.assertEqual((code, out, err.count("\n")), (2, "", 1))
    self.assertTrue(err.startswith("linen_nnx_comparator: " + message.format(**names)), err)

  @parameterized.parameters("html", "json")
  def test_a_file_that_cannot_be_written(self, name):
    """What took hours to find is printed nevertheless."""
    code, out, err = call(self.a, self.b, f"--{name}={self.tmp}/no/such/folder")
    self.assertEqual((code, err.count("\n")), (2, 1))
    self.assertIn(f"--{name}={self.tmp}/no/such/folder: expected a file that can be written, found", err)
    self.assertRegex(out, "(?m)^different: ")

  @parameterized.parameters("html", "json")
  def test_a_file_without_a_name(self, name):
    code, _, err = call(self.a, self.b, f"--{name}=")
    self.assertEqual((code, err.count("\n")), (2, 1))
    self.assertIn(f"--{name}=: expected a file that can be written, found", err)

  def test_help_names_every_flag(self):
    code, out, _ = call("--help")
    self.assertEqual(code, 0)
    for name in command.define_flags():
      self.assertRegex(out, "(?m)^  -h," if name in ("h", "help") else rf"(?m)^  --(\[no\])?{name}: ")

  @pytest.mark.integration
  def test_a_reader_that_stops_early(self):
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$@" | true', "bash", sys.executable, "-m", MODULE, str(self.a), str(self.b)],
        capture_output=True,
        text=True,
        check=False,
    )
    self.assertEqual((done.returncode, done.stderr), (1, ""))

  def test_the_documented_example_is_what_is_printed(self):
    documented = (util.ROOT / "docs" / "comparator.md").read_text()
    (example,) = re.findall(r"```\n\$ linen-nnx-comparator (.*)\n((?s:.*?))\n```", documented)
    code, out, _ = call(*example[0].replace("…", str(util.FIXTURES)).split())
    same = lambda text: re.sub(r"in [\d.]+ s$", "", text.replace(str(util.FIXTURES), "…").strip())
    self.assertEqual((code, same(out)), (1, same(example[1])))


if __name__ == "__main__":
  absltest.main()
