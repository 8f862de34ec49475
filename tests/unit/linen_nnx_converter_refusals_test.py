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

"""The list of refusals: every one that the code can raise is in it, and those that are provoked print what it says.

`python tests/unit/linen_nnx_converter_refusals_test.py --write` writes the list, and the page of their classes, anew.
"""

import ast
import functools
import json
import os
import re
import shutil
import sys

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import layer_stacks

PAGE = util.ROOT / "docs" / "refusals.md"
LIST = util.ROOT / "tests" / "golden" / "refusals.txt"
CODE = util.ROOT / "src" / "maxtext" / "checkpoint_conversion" / "linen_nnx_converter"
# Functions that make a refusal of what they are given: its class, and where they take what was expected and the remedy.
HELPERS = {"unlike": ("LayerStackError", 1, 3), "_layout_error": ("LayoutError", 1, 2)}

INTRODUCTION = """# Refusals

Every refusal is one line, and leaves nothing at the target:

```
<path>: expected <expected>, found <what is there>. <remedy>
```

`path` is a leaf, a file or a folder. From Python it is an exception of a class below, all subclasses of
`errors.ConversionError`. The command prints it and exits with 1; with 2 for a `VerificationError`.
`tests/golden/refusals.txt` lists all that can be expected, with the remedies.
`tests/unit/linen_nnx_converter_refusals_test.py` writes that list and this page.

| Class | Meaning |
|---|---|
"""

Row = tuple[str, str, str]  # The class, what was expected, and the remedy, with … for what differs from case to case.


def texts(node) -> list[str]:
  """What an expression for a text can be."""
  if isinstance(node, ast.Constant):
    return [str(node.value)]
  if isinstance(node, ast.JoinedStr):
    return ["".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)]
  if isinstance(node, ast.IfExp):
    return texts(node.body) + texts(node.orelse)
  return ["…"]


def rows_of(call: ast.Call) -> list[Row]:
  """The rows of a call that makes a refusal."""
  name = ast.unparse(call.func).rpartition(".")[2]
  if name in HELPERS:
    cls, expected, remedy = HELPERS[name]
    remedies = texts(call.args[remedy]) if len(call.args) > remedy else [layer_stacks.REMEDY]
    return [(cls, e, r) for e in texts(call.args[expected]) for r in remedies]
  cls = getattr(errors, name, None)
  if not isinstance(cls, type) or len(call.args) < 3:
    return []
  remedies = texts(call.args[3]) if len(call.args) > 3 else [cls.REMEDY]
  return [(name, e, r) for e in texts(call.args[1]) for r in remedies]


def rows_of_code() -> set[Row]:
  calls = (
      node for path in CODE.rglob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)
  )
  rows = {(cls, e.strip(), r.strip()) for call in calls for cls, e, r in rows_of(call)}
  return {row for row in rows if row[1:] != ("…", "…")}  # Of the helpers themselves.


def classes() -> dict[str, type]:
  """The classes of refusals, in the order of `errors.py`."""
  return {
      name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and cls.__base__ is errors.ConversionError
  }


def page() -> str:
  """The page: what each class means."""
  return INTRODUCTION + "".join(f"| `{name}` | {cls.__doc__} |\n" for name, cls in classes().items())


def listed(rows: set[Row]) -> str:
  """The list: a line for each refusal, in the order of the classes."""
  order = list(classes())
  return "".join(f"{' | '.join(row)}\n" for row in sorted(rows, key=lambda row: (order.index(row[0]), *row)))


def rows_of_list() -> set[Row]:
  return {tuple(line.split(" | ")) for line in LIST.read_text().splitlines()}


def params(**decoder):
  return {"params": {"params": {"decoder": decoder}}}


def adam(mu, nu):
  return {"count": np.array(1, np.int32), "mu": {"params": {"decoder": mu}}, "nu": {"params": {"decoder": nu}}}


W, V = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
FLAT = params(layers_0={"w": W}, layers_1={"w": W})

IN_MEMORY = (
    (
        "deep",
        params(a={str(i): W for i in range(2)}) | {"params": functools.reduce(lambda t, _: {"a": t}, range(120), W)},
        {},
    ),
    ("keys of two kinds", {"params": {"params": {0: W, "0": W}}}, {}),
    ("no layout", {"weights": W}, {}),
    ("both layouts", {"model": {"w": W}, "params": {"params": {"w": W}}}, {}),
    ("unknown top", FLAT | {"junk": W}, {}),
    ("not boxed", {"params": {"w": W}}, {}),
    ("boxed in places", {"model": {"a": {"value": W}, "b": W}}, {}),
    ("collection and module", {"params": {"params": {"a": W, "b": W}, "a": W}}, {}),
    ("missing layer", params(layers_0={"w": W}, layers_2={"w": W}), {}),
    ("layers unlike", params(layers_0={"w": W}, layers_1={"w": V}), {}),
    ("leaf missing in a layer", params(layers_0={"w": W, "b": W}, layers_1={"w": W}), {}),
    ("layers in two ways", params(layers_0={"w": W}, layers={"w": W}), {}),
    ("axis lengths", params(layers={"w": W, "v": V[:, :2]}), {"scan_layers": False}),
    ("no layer axis", params(layers={"w": np.float32(1)}), {}),
    ("too many layers", params(layers={"w": np.zeros((1, 200_000), np.int8)}), {}),
    ("no layers to take out", params(layers={"w": W[:, :0]}), {"scan_layers": False}),
    ("unknown order", params(pipeline_module={"w": {"x": W}}), {"scan_layers": False}),
    ("a layer's name in a layer", params(layers_0={"2": {"w": W}}, layers_1={"2": {"w": W}}), {}),
    ("moment's shape", FLAT | {"opt_state": [adam({"layers_0": {"w": V}, "layers_1": {"w": W}}, {})]}, {}),
    ("moment of no weight", FLAT | {"opt_state": [adam({"layers_0": {"w": W, "x": W}, "layers_1": {"w": W}}, {})]}, {}),
    ("moment missing", FLAT | {"opt_state": [adam({"layers_0": {"w": W}}, {})], "step": np.int32(1)}, {}),
    ("moments elsewhere", FLAT | {"opt_state": [{"mu": {"params": {"other": {"w": W}}}}]}, {}),
    ("a step that is none", FLAT | {"step": W}, {}),
    ("a step too large", FLAT | {"step": np.int64(2**40)}, {}),
    ("no place", {"params": {"params": {"w": W}, "x": W}}, {}),
    ("a long chain", {"model": {"w": W}, "optimizer": {"opt_state": {"5000": {"count": np.int32(1)}}}}, {}),
)


def _edit(path, change):
  document = json.loads(path.read_text())
  change(document)
  path.write_text(json.dumps(document))


def _rename(document):
  for entry in document["tree_metadata"].values():
    entry["key_metadata"][-1]["key"] += "/.."


ON_DISK = (
    ("nothing", shutil.rmtree, {}),
    (
        "no checkpoint",
        lambda source: [(source / n).unlink() for n in ("_METADATA", "manifest.ocdbt")]
        and shutil.rmtree(source / "d")
        or [p.unlink() if p.is_file() else shutil.rmtree(p) for p in source.iterdir()],
        {},
    ),
    ("never committed", lambda source: (source / "_METADATA").unlink(), {}),
    ("bad metadata", lambda source: (source / "_METADATA").write_text("{"), {}),
    ("bad step metadata", lambda source: (source / "_CHECKPOINT_METADATA").write_text("["), {}),
    ("no store", lambda source: (source / "manifest.ocdbt").unlink(), {}),
    (
        "bad record",
        lambda source: _edit(
            source / "_CHECKPOINT_METADATA", lambda d: d.update(custom_metadata={"linen_nnx_converter": 5})
        ),
        {},
    ),
    ("no data", lambda source: [p.unlink() for p in (source / "ocdbt.process_0" / "d").iterdir()], {}),
    ("a link", lambda source: (source / "extra").symlink_to("/etc"), {}),
    ("a pipe", lambda source: os.mkfifo(source / "extra"), {}),
    ("a key with a slash", lambda source: _edit(source / "_METADATA", _rename), {}),
    ("an unnamed array", lambda source: _edit(source / "_METADATA", lambda d: d["tree_metadata"].popitem()), {}),
    (
        "an unknown type",
        lambda source: _edit(
            source / "_METADATA",
            lambda d: next(iter(d["tree_metadata"].values()))["value_metadata"].update(value_type="string"),
        ),
        {},
    ),
    ("inside the source", lambda source: None, {"target": "source/out"}),
    ("existing", lambda source: (source.parent / "out").write_text(""), {}),
    ("too long", lambda source: None, {"target": "x" * 250}),
    ("not writable", lambda source: (source.parent / "file").write_text(""), {"target": "file/out"}),
    ("direction", lambda source: None, {"direction": "nnx_to_linen"}),
    ("no target", lambda source: None, {"target": ""}),
    ("release", lambda source: None, {"maxtext_release": "new"}),
)


class RefusalsTest(util.CheckpointTestCase):

  def test_every_refusal_of_the_code_is_in_the_list_and_no_other(self):
    self.assertMultiLineEqual(LIST.read_text(), listed(rows_of_code()), "write it anew, as this file's docstring says")
    self.assertMultiLineEqual(PAGE.read_text(), page(), "write it anew, as this file's docstring says")

  def test_every_class_is_raised(self):
    self.assertEqual({cls for cls, *_ in rows_of_code()}, set(classes()))

  def assert_in_the_list(self, error):
    """The message is one line, and one of those of its class; it speaks of the checkpoint, not of Python's objects."""
    self.assertLen(str(error).splitlines(), 1)
    self.assertNotRegex(str(error), "' object (has no|is not)")
    pattern = lambda text: ".*".join(map(re.escape, text.split("…")))
    rows = [row for row in rows_of_list() if row[0] == type(error).__name__]
    matching = [r for r in rows if re.fullmatch(f".*: expected {pattern(r[1])}, found .*\\. {pattern(r[2])}", str(error))]
    self.assertNotEmpty(matching, str(error))

  @parameterized.named_parameters(*IN_MEMORY)
  def test_in_memory(self, state, options):
    convert = (
        converter.convert_nnx_to_linen if "model" in state and "params" not in state else converter.convert_linen_to_nnx
    )
    with self.assertRaises(errors.ConversionError) as caught:
      convert(state, **options)
    self.assert_in_the_list(caught.exception)

  @parameterized.named_parameters(*ON_DISK)
  def test_on_disk(self, damage, options):
    random = np.random.default_rng(0)
    layers = {f"layers_{i}": {"w": random.random((64, 64))} for i in range(2)}
    source = self.save("source", params(**layers))
    damage(source)
    options = {"target": "out"} | options
    target = options.pop("target")
    with self.assertRaises(errors.ConversionError) as caught:
      converter.convert_checkpoint(source, target and self.tmp / target, **options)
    self.assert_in_the_list(caught.exception)


if __name__ == "__main__":
  if sys.argv[1:] == ["--write"]:
    LIST.write_text(listed(rows_of_code()))
    PAGE.write_text(page())
  else:
    absltest.main()
