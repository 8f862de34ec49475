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

"""The command line: flags, output, exit codes; as users run it and as MaxText's CI calls it."""

import contextlib
import io
import logging as python_logging
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib

from absl import logging
from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_command_runs import CommandTestCase
from linen_nnx_converter_command_runs import MODULE
from linen_nnx_converter_command_runs import run
from linen_nnx_converter_command_runs import SOURCE
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import __main__ as command
from maxtext.checkpoint_conversion.linen_nnx_converter.command import flags
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan


def call(*args):
  """Calls `main` in-process: exit code, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = converter.main([*map(str, args)])
  return code, out.getvalue(), err.getvalue()


def usage():
  """The README, and the page with all jobs and flags."""
  return (util.ROOT / "README.md").read_text() + (util.ROOT / "docs" / "usage.md").read_text()


class CommandTest(CommandTestCase):

  @pytest.mark.integration
  def test_a_conversion(self):
    done = run(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out")
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(
        done.stdout,
        r"^converted Linen TrainState -> NNX TrainStateNNX, boxed in \d+\.\d s, verified: "
        r"39 leaves \(39 copied\), 675\.4 KiB by reference, 4 bytes streamed; "
        r"digests of 1 of 39 leaves, --verify=full for all -> " + re.escape(f"{self.tmp}/out/2/items\n") + "$",
    )
    self.assertEqual(done.stderr, "")
    self.assertEqual(converter.detect_format(converter.load_checkpoint(self.tmp / "out")), "nnx")

  def test_the_version_is_that_of_the_distribution(self):
    version = tomllib.loads((util.ROOT / "pyproject.toml").read_text())["project"]["version"]
    self.assertEqual(call("--version"), (0, f"{version}\n", ""))

  def test_main_can_be_called_in_process(self):
    for _ in range(2):  # Flags are parsed anew each time, and absl's own are left alone.
      code, out, err = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--overwrite")
      self.assertEqual((code, err), (0, ""))
      self.assertIn("converted", out)
    self.assertEqual(converter.main(["program", f"--source_path={SOURCE}", f"--target_path={self.tmp}/second"]), 0)

  @parameterized.parameters(("--scan_layers=False",), ("--noscan_layers",))
  @pytest.mark.integration
  def test_both_spellings_of_a_boolean(self, flag):
    self.assertEqual(call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", flag)[0], 0)
    self.assertIn("0", converter.load_checkpoint(self.tmp / "out")["model"]["decoder"]["layers"])

  @parameterized.parameters(False, True)
  def test_what_maxtext_says_while_it_reads_a_config(self, is_all_shown):
    """MaxText up to 0.2.3 logs 700 settings, and some of its models print; what it warns of stays."""
    logger = python_logging.getLogger("maxtext.configs.pyconfig")

    def load(arguments):
      del arguments
      logger.info("Config param steps: 10")
      logger.warning("this is deprecated")
      print("a model of size 1")

    handler = python_logging.StreamHandler(io.StringIO())
    logger.addHandler(handler)
    self.addCleanup(logger.removeHandler, handler)
    logger.setLevel(python_logging.INFO)
    before = logging.get_verbosity(), python_logging.root.manager.disable
    with absltest.mock.patch.object(run_config, "load", load):
      flags = ["--dry_run", "--traceback"] if is_all_shown else ["--dry_run"]
      code, out, err = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", *flags, "base.yml")
    self.assertEqual(code, 0)
    self.assertEqual("a model of size 1" in out, is_all_shown)
    self.assertEqual("a model of size 1" in err, not is_all_shown)
    self.assertEqual("Config param steps" in handler.stream.getvalue(), is_all_shown)
    self.assertIn("this is deprecated", handler.stream.getvalue())
    self.assertEqual((logging.get_verbosity(), python_logging.root.manager.disable), before)

  @parameterized.parameters("--no-scan_layers", "--no-verify", "--no-check_model")
  def test_the_third_spelling_of_a_boolean(self, flag):
    code, out, err = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--dry_run", flag)
    self.assertEqual((code, err), (0, ""))
    self.assertEqual("/layers/0…3/" in out, flag == "--no-scan_layers")

  @parameterized.parameters(
      (("--verify", "full"), "--verify: expected its value after =, found --verify full. Write --verify=full."),
      (("--scan_layers", "False"), "--scan_layers: expected its value after =, .* Write --scan_layers=False."),
      (("--dry_run", "--resume", "true"), "--resume: expected its value after =, .* Write --resume=true."),
      (("--noverify", "0"), "--noverify: expected no value, found 0."),
      (("--verify=ful",), "--verify=ful: expected true or false or full"),
      (("--no-verify=full",), "Unknown command line flag 'no-verify'"),
      (("--no-direction",), "Unknown command line flag 'no-direction'"),
  )
  def test_a_boolean_with_a_word_behind_it_is_refused(self, flags, message):
    code, out, err = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", *flags)
    self.assertEqual((code, out), (1, ""))
    self.assertRegex(err, message)
    self.assertLen(err.splitlines(), 1)
    self.assertEqual(os.listdir(self.tmp), [])

  @parameterized.parameters("--resume", "--verify", "--overwrite", "--params_only")
  def test_a_boolean_may_be_followed_by_a_config(self, flag):
    """And flags by flags, after the config too."""
    code, _, err = call(
        f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", flag, "no_such.yml", "run_name=full", "--dry_run"
    )
    self.assertEqual(code, 1)
    self.assertRegex(err, "^linen_nnx_converter: no_such.yml run_name=full: expected a config")

  def test_all_flags_reach_the_conversion(self):
    code, out, _ = call(
        f"--source_path={util.FIXTURES}/maxtext-0.2.4/nnx_scan",
        f"--target_path={self.tmp}/out",
        "--direction=linen_to_nnx",
        "--scan_layers=False",
        "--param_scan_axis=1",
        "--layer_naming=flat",
        "--nnx_values=plain",
        "--nnx_aux=drop",
        "--params_only",
        "--memory_budget_gib=0.5",
        "--noverify",
    )
    self.assertEqual(code, 0)
    self.assertIn("NNX params only, plain", out)
    self.assertIn("not verified", out)
    self.assertIn("left out", out)
    state = converter.load_checkpoint(self.tmp / "out")
    self.assertCountEqual(state, ["decoder", "token_embedder"])
    self.assertCountEqual(
        state["decoder"], ["decoder_norm", "logits_dense", "layers_0", "layers_1", "layers_2", "layers_3"]
    )

  def test_dry_run_prints_the_plan_and_writes_nothing(self):
    code, out, _ = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--dry_run", "--scan_layers=False")
    self.assertEqual(code, 0)
    lines = out.splitlines()
    self.assertIn(
        "model/decoder/layers/0…3/mlp/wo/kernel/value  (64, 32) float32  "
        "slice axis 1 index 0…3 of params/params/decoder/layers/mlp/wo/kernel, streamed",
        lines,
    )
    self.assertIn("optimizer/step  () uint32  copy of step, streamed", lines)
    self.assertRegex(lines[-2], "^would convert Linen TrainState -> NNX TrainStateNNX, boxed: 120 leaves ")
    self.assertRegex(
        lines[-1],
        "^cost: about .* of memory for all but data, at most .* for data under way; .* bytes to read and write$",
    )
    self.assertLen(lines, 12 + 108 // 4 + 2)  # Copied, sliced, four at a time, the summary and the cost.
    self.assertEqual(os.listdir(self.tmp), [])

  def test_help_is_quick_and_needs_neither_jax_nor_orbax(self):
    script = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_module('{MODULE}', run_name='__main__')\n"
    script += (
        "except SystemExit as e: assert not e.code\nprint(sorted({'jax', 'orbax', 'tensorstore'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    self.assertEqual(done.stdout.splitlines()[-1], "[]")
    begin = time.monotonic()
    self.assertIn("--source_path", run("--help").stdout)
    self.assertLess(time.monotonic() - begin, 20)  # A guard against the worst only: timings never fail a test.

  @parameterized.named_parameters(
      ("unknown_flag", ["--bogus"], "Unknown command line flag 'bogus'"),
      ("no_source", ["--target_path=x"], "--source_path: expected a path, found none"),
      ("no_target", ["--source_path=x"], "--target_path: expected a path, found none"),
      (
          "a_path_without_a_flag",
          ["x", "somewhere", "elsewhere"],
          "somewhere: expected a config, such as base.yml, or a setting",
      ),
      ("bad_boolean", ["--scan_layers=maybe"], "flag --scan_layers=maybe: expected true or false"),
      ("bad_verify", ["--verify=maybe"], "flag --verify=maybe: expected true or false or full"),
      ("bad_direction", ["--direction=sideways"], "flag --direction=sideways"),
      ("bad_axis", ["--param_scan_axis=-1"], "flag --param_scan_axis=-1"),
      ("config", ["x", "none.yml"], "none.yml: expected a config that the installed MaxText can read"),
      (
          "init_rngs",
          [f"--source_path={SOURCE}", "--target_path=/nowhere/at/all", "--init_rngs", "--dry_run"],
          "--init_rngs: expected a MaxText config, base.yml and settings, whose model makes it, found none",
      ),
      (
          "port",
          ["--source_path=x", "--target_path=y", "--coordinator_address=host", "--num_processes=1", "--process_id=0"],
          "--coordinator_address: expected <host>:<port>, found host. Give its port.",
      ),
      ("release", ["--source_path=x", "--target_path=y", "--maxtext_release=new"], "expected a version such as 0.2.5"),
      ("missing", ["--source_path=/nowhere", "--target_path=x"], "/nowhere: expected a checkpoint, found nothing"),
      (
          "direction",
          [f"--source_path={SOURCE}", "--target_path=x", "--direction=nnx_to_linen"],
          "--direction=nnx_to_linen: expected a source of NNX, found the layout Linen TrainState",
      ),
  )
  def test_a_refusal_is_one_line(self, args, message):
    code, out, err = call(*args)
    self.assertEqual((code, out), (command.REFUSED, ""))
    self.assertLen(err.splitlines(), 1)
    self.assertStartsWith(err, "linen_nnx_converter: ")
    self.assertIn(message, err)

  @pytest.mark.integration
  def test_any_failure_is_one_line_unless_a_traceback_is_asked_for(self):
    source = shutil.copytree(SOURCE, self.tmp / "source")
    for data in (source / "2" / "items" / "ocdbt.process_0" / "d").iterdir():
      data.write_bytes(b"")
    args = f"--source_path={source}", f"--target_path={self.tmp}/out"
    done = run(*args)
    self.assertEqual((done.returncode, done.stdout), (1, ""))
    self.assertLen(done.stderr.splitlines(), 1)
    self.assertIn("Traceback", run(*args, "--traceback").stderr)
    self.assertEqual(os.listdir(self.tmp), ["source"])

  def test_a_failed_verification_has_a_code_of_its_own(self):
    piece = plan.Part.piece

    def negated(*args):
      region, values = piece(*args)
      return region, np.negative(values) if values.ndim else values

    with absltest.mock.patch.object(plan.Part, "piece", negated):
      code, _, err = call(f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--scan_layers=False")
    self.assertEqual(code, command.VERIFICATION_FAILED)
    self.assertIn("Nothing was committed", err)
    self.assertEqual(os.listdir(self.tmp), [])

  def test_every_command_in_the_readme_parses(self):
    """`…` stands for the module and two paths; after the flags come a config and its settings, or nothing."""
    commands = re.findall(r"`…((?: [^`…]+)?)`", usage())
    self.assertGreater(len(commands), 20)
    for text in commands:
      with self.subTest(text):
        _, *config = flags.define_flags()(["", "--source_path=a", "--target_path=b", *text.split()])
        self.assertIn(config[:1], ([], ["base.yml"]))
        self.assertTrue(all(re.fullmatch(r"[a-z_]+=\S+", setting) for setting in config[1:]), config)

  def test_every_flag_is_in_the_readme_and_every_flag_in_the_readme_is_real(self):
    real = {name for name in flags.define_flags() if name not in ("h", "help")}
    self.assertEqual(set(re.findall(r"--([a-z_][a-z_0-9]+)\b(?!-)", usage())) - {"help"}, real)


if __name__ == "__main__":
  absltest.main()
