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

"""Whole comparisons of real checkpoints on disk, and the command: output, JSON, exit codes."""

import contextlib
import io
import json
import re
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import ml_dtypes
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_comparator import __main__ as command
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

MODULE = "maxtext.checkpoint_conversion.linen_nnx_comparator"
SCANNED = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
WI = "model/decoder/layers_1/mlp/wi_0/kernel"


def call(*args):
  """Calls `main` in-process: exit code, standard output, standard error."""
  out, err = io.StringIO(), io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    code = comparator.main(["program", *map(str, args)])
  return code, out.getvalue(), err.getvalue()


def unequal(comparison):
  return {outcome.path: outcome.status for outcome in comparison.leaves if outcome.status != "equal"}


def flipped(array, index, bit=0):
  """A copy of an array with one bit of one element flipped."""
  array = np.array(array)
  raw = array.view(f"u{array.dtype.itemsize}")
  raw[index] ^= np.array(1 << bit, raw.dtype)
  return array


class ComparisonTest(util.CheckpointTestCase):

  @parameterized.parameters(*util.ALL)
  def test_a_checkpoint_is_equal_to_what_it_is_converted_into(self, name):
    source = util.FIXTURES / name
    before = util.snapshot(source)
    framework = converter.detect_format(converter.load_checkpoint(source))
    for i, options in enumerate(
        (
            {"direction": f"{framework}_to_nnx", "scan_layers": False, "nnx_values": "plain"},
            {"direction": f"{framework}_to_nnx", "scan_layers": False, "layer_naming": "flat", "nnx_values": "all_boxed"},
            {"direction": f"{framework}_to_linen", "scan_layers": False},
        )
    ):
      converter.convert_checkpoint(source, self.tmp / str(i), **options)
      comparison = comparator.compare_checkpoints(source, self.tmp / str(i))
      self.assertTrue(comparison.is_accepted, unequal(comparison))
      self.assertEqual(comparison.counts(), {"equal": len(comparison.leaves)})
      stored = sum(leaf.size for leaf in jax.tree.leaves(converter.load_checkpoint(source)))
      self.assertEqual(comparison.elements(), (0, stored))  # Every element was compared.
    self.assertEqual(util.snapshot(source), before)

  @parameterized.product(
      scan=((True, True), (True, False), (False, True), (False, False)), path=("params", "mu"), use_ocdbt=(True, False)
  )
  def test_a_flipped_bit_is_named(self, scan, path, use_ocdbt):
    linen = util.linen(util.unscanned_params())
    damaged = util.linen(util.unscanned_params())
    collection = damaged["params"] if path == "params" else damaged["opt_state"][0]["mu"]
    layer = collection["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    layer["kernel"] = flipped(layer["kernel"], (2, 3))
    sides = []
    for name, state, scan_layers in zip("ab", (linen, damaged), scan):
      arranged = converter.convert_linen_to_nnx(state) if scan_layers else state
      sides.append(self.save(name, arranged, use_ocdbt=use_ocdbt))
    comparison = comparator.compare_checkpoints(*sides)
    where = WI if path == "params" else WI.replace("model", "optimizer/opt_state/0/mu")
    self.assertEqual(unequal(comparison), {where: "different"})
    (found,) = comparison.worst_first()
    self.assertEqual((found.values.first.index, found.values.differing, found.values.elements), ((2, 3), 1, 15))
    self.assertEqual(found.values.largest_ulp.value, 1)
    self.assertEqual(comparison.elements(), (1, sum(leaf.size for leaf in jax.tree.leaves(linen))))

  @parameterized.product(dtype=("bfloat16", "float8_e4m3fn", "int4", "int8", "bool", "float16", "uint32"))
  def test_dtypes(self, dtype):
    dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    value = np.arange(64).reshape(8, 8).astype(dtype)
    other = flipped(value, (7, 1))
    state = lambda leaf: {"params": {"params": {"decoder": {"norm": {"w": leaf}}}}}
    a, same, b = (self.save(name, state(leaf)) for name, leaf in (("a", value), ("same", value), ("b", other)))
    self.assertTrue(comparator.compare_checkpoints(a, same).is_accepted)
    comparison = comparator.compare_checkpoints(a, b)
    self.assertEqual(comparison.worst_first()[0].values.first.index, (7, 1))
    self.assertEqual(comparison.elements(), (1, 64))

  def test_values_are_compared_though_other_leaves_differ_in_structure(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    for state in (b["params"]["params"], *(b["opt_state"][0][name]["params"] for name in ("mu", "nu"))):
      del state["decoder"]["decoder_norm"]
      state["decoder"]["layers_0"]["norm"]["scale"] = np.ones(5, np.float32)
      state["decoder"]["layers_0"]["gain"] = state["decoder"]["layers_0"]["gain"].astype(ml_dtypes.bfloat16)
      state["decoder"]["new_norm"] = {"scale": np.ones(5, np.float32)}
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = kernel["kernel"] + np.float32(0.5)
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    expected = {WI: "different"}
    for prefix in ("model", "optimizer/opt_state/0/mu", "optimizer/opt_state/0/nu"):
      expected[f"{prefix}/decoder/decoder_norm/scale"] = "only in A"
      expected[f"{prefix}/decoder/new_norm/scale"] = "only in B"
      expected[f"{prefix}/decoder/layers_0/norm/scale"] = "shape"
      expected[f"{prefix}/decoder/layers_0/gain"] = "dtype"
    self.assertEqual(unequal(comparison), expected)
    self.assertEqual(comparison.worst_first()[-1].values.largest_absolute.value, 0.5)
    gain = next(outcome for outcome in comparison.leaves if outcome.path == "model/decoder/layers_0/gain")
    self.assertEqual(gain.values.differing, 0)  # The same number in another dtype.

  def test_a_damaged_tree_is_compared_path_by_path(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    del b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]  # Its moments are still there.
    b["opt_state"][0]["count"] += 1
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    self.assertEqual(
        unequal(comparison),
        {"params/params/decoder/layers_1/mlp/wi_0/kernel": "only in A", "opt_state/0/count": "different"},
    )
    self.assertLen(comparison.notes, 1)
    self.assertRegex(
        comparison.notes[0], r"^Compared path by path .* refuses one: B: opt_state/0/mu/params/decoder/layers_1"
    )

  def test_a_damaged_tree_of_another_layout_is_refused(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    del b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    nnx = self.save("a", converter.convert_linen_to_nnx(a))
    with self.assertRaisesRegex(
        errors.MomentError, r"^B: opt_state/0/mu/params/decoder/layers_1/mlp/wi_0/kernel: expected"
    ):
      comparator.compare_checkpoints(nnx, self.save("b", b))

  def test_an_unreadable_leaf_is_named_and_the_others_are_compared(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    b["opt_state"][2]["count"] += 1
    sides = [self.save(name, tree, use_ocdbt=False) for name, tree in (("a", a), ("b", b))]
    chunk = sides[1] / "params.params.decoder.layers_1.mlp.wi_0.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:5])
    comparison = comparator.compare_checkpoints(*sides)
    self.assertEqual(unequal(comparison), {WI: "unreadable", "optimizer/opt_state/2/count": "different"})
    worst = comparison.worst_first()[0]
    self.assertRegex(
        worst.failure, r"^B: params/params/decoder/layers_1/mlp/wi_0/kernel: expected chunks that can be read"
    )
    self.assertFalse(comparison.is_accepted)

  def test_an_unreadable_layer_does_not_hide_the_others_of_its_stack(self):
    state = util.linen(util.unscanned_params())
    a = self.save("a", converter.convert_linen_to_nnx(state))
    b = self.save("b", state, use_ocdbt=False)
    chunk = b / "params.params.decoder.layers_1.mlp.wi_0.kernel" / "0.0"
    chunk.write_bytes(chunk.read_bytes()[:5])
    comparison = comparator.compare_checkpoints(a, b)
    self.assertEqual(unequal(comparison), {WI: "unreadable"})
    self.assertEqual(comparison.counts()["equal"], len(comparison.leaves) - 1)

  def test_other_scan_axes(self):
    linen = util.linen(util.unscanned_params())
    a = self.save("a", converter.convert_linen_to_nnx(linen, param_scan_axis=1))
    b = self.save("b", converter.convert_linen_to_nnx(linen, param_scan_axis=0))
    self.assertTrue(comparator.compare_checkpoints(a, b, param_scan_axes=(1, 0)).is_accepted)
    self.assertTrue(comparator.compare_checkpoints(b, a, param_scan_axes=(0, 1)).is_accepted)

  def test_scanned_layers_of_unknown_order_are_compared_whole(self):
    layers = {"pipeline_module": {"layers": {"wi": {"kernel": util.array(2, 4, 3)}}}}
    a = {"params": {"params": {"decoder": layers}}}
    b = converter.convert_linen_to_nnx(a)
    b["model"]["decoder"]["pipeline_module"]["layers"]["wi"]["kernel"]["value"] = flipped(util.array(2, 4, 3), (1, 3, 2))
    comparison = comparator.compare_checkpoints(self.save("a", a), self.save("b", b))
    self.assertEqual(unequal(comparison), {"model/decoder/pipeline_module/layers/wi/kernel": "different"})
    self.assertEqual(comparison.worst_first()[0].values.first.index, (1, 3, 2))
    self.assertIn("order is unknown", comparison.notes[0])

  def test_rng_state_that_only_one_side_has_is_reported_and_can_be_left_out(self):
    folder = util.FIXTURES / "maxtext-main-2026-05-14"
    comparison = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan")
    self.assertEqual(comparison.counts("auxiliary")["only in A"], 24)
    self.assertEqual(comparison.counts("step"), {"equal": 1})
    dropped = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan", nnx_aux="drop")
    self.assertEqual(dropped.counts("auxiliary"), {})
    self.assertGreater(len(dropped.trees[0].left_out), 0)
    only = comparator.compare_checkpoints(folder / "nnx_scan", folder / "nnx_unscan", params_only=True)
    self.assertCountEqual({outcome.part for outcome in only.leaves}, ["params"])

  @parameterized.parameters("sft", "rl")
  def test_a_checkpoint_of_tunix_and_what_it_is_converted_into(self, name):
    source = util.FIXTURES / "tunix" / name
    converter.convert_checkpoint(source, self.tmp / "out")
    comparison = comparator.compare_checkpoints(source, self.tmp / "out", nnx_aux="drop")
    self.assertTrue(comparison.is_accepted, unequal(comparison))
    parts = {outcome.part for outcome in comparison.leaves}
    self.assertEqual(parts, {"params", "optimizer", "step"})

  @parameterized.parameters(("linen_to_nnx", "equal"), ("linen_to_linen", "equal"), (None, "different"))
  def test_a_step_that_is_a_python_integer(self, direction, status):
    """Only its value counts, on whichever side it is, as for what the converter casts it to."""
    a = util.linen(util.unscanned_params(1)) | {"step": 11}
    sides = [self.save("a", a), self.tmp / "b"]
    if direction:
      converter.convert_checkpoint(*sides, direction=direction)
    else:
      self.save("b", a | {"step": np.array(12, np.int32)})
    for order in (sides, sides[::-1]):
      comparison = comparator.compare_checkpoints(*order)
      self.assertEqual(comparison.counts("step"), {status: 1})
      self.assertEqual(comparison.is_accepted, status == "equal", unequal(comparison))

  def test_a_tolerance(self):
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = kernel["kernel"] * np.float32(1.001)
    sides = self.save("a", a), self.save("b", b)
    self.assertEqual(unequal(comparator.compare_checkpoints(*sides)), {WI: "different"})
    self.assertEqual(unequal(comparator.compare_checkpoints(*sides, rtol=0.01)), {WI: "within tolerance"})
    self.assertTrue(comparator.compare_checkpoints(*sides, rtol=0.01).is_accepted)
    self.assertFalse(comparator.compare_checkpoints(*sides, rtol=1e-6).is_accepted)
    self.assertFalse(comparator.compare_checkpoints(*sides, atol=0.0).is_accepted)


class CommandTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    a, b = util.linen(util.unscanned_params()), util.linen(util.unscanned_params())
    kernel = b["params"]["params"]["decoder"]["layers_1"]["mlp"]["wi_0"]
    kernel["kernel"] = flipped(kernel["kernel"], (2, 3))
    b["opt_state"][0]["mu"]["params"]["token_embedder"]["embedding"][0, 0] = np.nan
    self.a, self.b = self.save("a", a), self.save("b", converter.convert_linen_to_nnx(b))

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

  def test_json_to_standard_output(self):
    code, out, _ = call(self.a, self.b, "--json")
    document = json.loads(out)
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
      (("{a}", "{a}/nowhere"), "B: {a}/nowhere: expected a checkpoint, found nothing. Check B."),
      (("{tmp}/empty", "{a}"), "A: {tmp}/empty: expected an Orbax checkpoint of a pytree"),
      (("{a}", "{b}", "--param_scan_axis=x"), "--param_scan_axis: expected one axis, or two, found x. Give 1 or 1,0."),
      (("{a}", "{b}", "--param_scan_axis=1,0,2"), "--param_scan_axis: expected one axis, or two"),
      (("{a}", "{b}", "--atol=-1"), "flag --atol=-1: -1.0 is not a non-negative number"),
  )
  def test_bad_input_is_refused_in_one_line(self, args, message):
    (self.tmp / "empty").mkdir()
    names = {"a": self.a, "b": self.b, "tmp": self.tmp}
    code, out, err = call(*(arg.format(**names) for arg in args))
    self.assertEqual((code, out, err.count("\n")), (2, "", 1))
    self.assertTrue(err.startswith("linen_nnx_comparator: " + message.format(**names)), err)

  def test_a_target_that_cannot_be_written(self):
    code, _, err = call(self.a, self.b, f"--html={self.tmp}/no/such/folder.html")
    self.assertEqual((code, err.count("\n")), (2, 1))
    self.assertIn("FileNotFoundError", err)

  def test_help_names_every_flag(self):
    code, out, _ = call("--help")
    self.assertEqual(code, 0)
    for name in command.define_flags():
      self.assertRegex(out, "(?m)^  -h," if name in ("h", "help") else rf"(?m)^  --(\[no\])?{name}: ")

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

  def test_documented_flags_are_the_real_ones(self):
    documented = (util.ROOT / "docs" / "comparator.md").read_text()
    rows = set(re.findall(r"^\| `--(\w+)", documented, re.M))
    self.assertEqual(rows, set(command.define_flags()) - {"help", "h"})


if __name__ == "__main__":
  absltest.main()
