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

"""Names of folders and of leaves: whatever the file system and Orbax accept, and no name is taken for another."""

import fnmatch
import functools
import itertools
import os
import pathlib
import shutil
import tempfile
from urllib import parse

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import hypothesis
from hypothesis import strategies as st
import jax.numpy as jnp
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import leaf_metadata
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify

FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.
NAMES = (
    *(
        "run%20a",
        "run#a",
        "run?a",
        "run|a",
        "%",
        "%2F",
        "%2e%2e",
        "a b",
        " a",
        "a ",
        "a.",
        ".a",
        "-x",
        "~",
        "~root",
        "$HOME",
    ),
    *(
        "a:b",
        "file:",
        "gs:",
        "{a}",
        "a*b",
        "[a",
        "a]",
        "'a\"",
        "ünï",
        "e\u0301",
        "日本",
        "a\nb",
        "a\tb",
        "\x01",
        "x" * 120,
    ),
)
BRACKETS = ("[a]", "[[]", "[!b]c", "a**b")
NO_NAMES = ("run\\a", "..\\..\\x", "a.__lock", b"b\xff".decode(errors="surrogateescape"))


def params(start, layers=2):
  """Layers in chunks of several values, one of them large enough for a data file."""
  layer = lambda i: {"kernel": jnp.asarray(util.array(32, 16, start=start + i)), "bias": util.array(3, start=start - i)}
  return {"decoder": {f"layers_{i}": layer(i) for i in range(layers)}}


def neighbour(name):
  """What a URL with the name would be taken for."""
  return pathlib.PurePath(parse.unquote(name.split("?")[0].split("#")[0].replace("\\", "/"))).name


class FoldersTest(util.CheckpointTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.saved = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.saved)
    for start, kind in itertools.product((0, 5000), FORMATS):
      with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=kind[0], use_zarr3=kind[1])) as checkpointer:
        checkpointer.save(cls.saved / f"{start}{kind}", args=ocp.args.PyTreeSave({"params": {"params": params(start)}}))

  def source(self, name, kind=(True, False)):
    """A checkpoint of that name, beside one of other values where a URL would lead."""
    (self.tmp / "sources").mkdir()
    if (other := neighbour(name)) not in ("", ".", "..", name):
      shutil.copytree(self.saved / f"5000{kind}", self.tmp / "sources" / other)
    return pathlib.Path(shutil.copytree(self.saved / f"0{kind}", self.tmp / "sources" / name))

  def assert_converted(self, target, scan_layers):
    expected = converter.convert_linen_to_nnx({"params": {"params": params(0)}}, scan_layers=scan_layers)
    self.assertEqual(util.flat(converter.load_checkpoint(target)), util.flat(expected))

  @parameterized.parameters(
      *zip(NAMES, itertools.cycle(FORMATS), itertools.cycle(("auto", "auto", "auto", "auto", "copy")))
  )
  @pytest.mark.integration
  def test_source_and_target(self, name, kind, copy_mode):
    source, target = self.source(name, kind), self.tmp / "target" / name
    before = util.snapshot(self.tmp)
    converter.convert_checkpoint(source, target, copy_mode=copy_mode)
    self.assertEqual(os.listdir(target.parent), [name])
    self.assert_converted(target, True)
    self.assertEqual(util.snapshot(self.tmp).items() & before.items(), before.items())

  @parameterized.parameters(*zip(("run%20a", "run#a", "a?b*c|d", "%2e%2e~"), FORMATS))
  @pytest.mark.integration
  def test_there_and_back(self, name, kind):
    """Streamed, resumed, verified alone, and compared."""
    source, target, back = (self.source(name, kind), self.tmp / "target" / name, self.tmp / "back" / name)
    converter.convert_checkpoint(source, target)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=kind[0], use_zarr3=kind[1])) as checkpointer:
      checkpointer.save(target, args=ocp.args.PyTreeSave(converter.load_checkpoint(target)), force=True)
    options = {"direction": "nnx_to_linen", "scan_layers": False, "verify": "full"}

    def stop(compared, source, items, *_, **__):
      shutil.copytree(items.parent, self.tmp / "left")
      raise KeyboardInterrupt

    with absltest.mock.patch.object(verify, "verify_written", stop), self.assertRaises(KeyboardInterrupt):
      converter.convert_checkpoint(target, back, **options)
    back.parent.mkdir()
    (self.tmp / "left").rename(back.parent / f"{name}{atomic_target.SUFFIX}")
    done = converter.convert_checkpoint(target, back, resume=True, **options)
    self.assertIn("4 leaves taken from the interrupted run", done.summary())
    self.assertLen(converter.verify_checkpoint(back).verified, 4)
    self.assertTrue(comparator.compare_checkpoints(source, back).is_accepted)

  @hypothesis.settings(
      max_examples=int(os.environ.get("LINEN_NNX_NAMES_EXAMPLES", "8")), deadline=None, derandomize=True, database=None
  )
  @hypothesis.given(
      st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1, max_size=20),
      st.sampled_from(FORMATS),
  )
  def test_any_name(self, name, kind):
    """Converted with every value in its place, or refused by name before anything is written."""
    hypothesis.assume(name not in (".", "..") and not name.isdigit())
    folder = self.tmp / "any"
    folder.mkdir()
    tmp, self.tmp = self.tmp, folder
    try:
      source = self.source(name, kind)
      before = util.snapshot(folder)
      try:
        converter.convert_checkpoint(source, folder / "targets" / name)
      except errors.PathNameError:
        self.assertTrue("\\" in name or name.endswith(".__lock") or "**" in name or not fnmatch.fnmatchcase(name, name))
        self.assertEqual(util.snapshot(folder), before)
      else:
        self.assert_converted(folder / "targets" / name, True)
    finally:
      self.tmp = tmp
      shutil.rmtree(folder)

  @parameterized.parameters(*itertools.product(BRACKETS, (True, False)))
  @pytest.mark.integration
  def test_a_pattern(self, name, use_ocdbt):
    """As a source; as a target, where Orbax finds again what it writes there."""
    source = self.source(name, (use_ocdbt, False))
    converter.convert_checkpoint(source, self.tmp / "target")
    self.assert_converted(self.tmp / "target", True)
    for other in (self.tmp / "targets" / name, self.tmp / name / "target"):
      if use_ocdbt or "**" in name:
        before = util.files(self.tmp)
        for dry_run in (True, False):
          with self.assertRaisesRegex(errors.PathNameError, r"expected a path without \*\* and \[...\]"):
            converter.convert_checkpoint(source, other, dry_run=dry_run)
        with self.assertRaisesRegex(errors.PathNameError, r"expected a path without \*\* and \[...\]"):
          converter.save_checkpoint({"params": {}}, other)
        self.assertEqual(util.files(self.tmp), before)
      else:
        converter.convert_checkpoint(source, other)
        self.assert_converted(other, True)

  @parameterized.parameters("[a]", "a?b", "a*b")
  def test_array_metadata_are_its_own(self, name):
    """Orbax looks for them by the folder's name as a pattern: that may find none, or a neighbour's."""
    source = self.source(name)
    other = source.parent / name.strip("[]").replace("?", "x").replace("*", "x") / "array_metadatas" / "process_1"
    other.parent.mkdir(parents=True)
    text = (source / "array_metadatas" / "process_0").read_text()
    other.write_text(text.replace("kernel", "other"))
    found = leaf_metadata.read_array_metadatas(epath.Path(source))
    self.assertCountEqual(found, [f"params.params.decoder.layers_{i}.kernel" for i in range(2)])

  @parameterized.parameters(*NO_NAMES)
  def test_what_tensorstore_takes_for_another_path_is_refused(self, name):
    source = self.source("source")
    (self.tmp / "sources" / name).mkdir()
    before = util.files(self.tmp)
    for paths in ((source, self.tmp / "targets" / name), (source, self.tmp / name / "1" / "items")):
      for dry_run in (True, False):
        with self.assertRaisesRegex(errors.PathNameError, "expected a path of UTF-8 without backslashes"):
          converter.convert_checkpoint(*paths, dry_run=dry_run)
    for refused in (
        functools.partial(converter.convert_checkpoint, self.tmp / "sources" / name, self.tmp / "target"),
        functools.partial(converter.load_checkpoint, self.tmp / "sources" / name),
        functools.partial(converter.save_checkpoint, {}, self.tmp / name),
        functools.partial(converter.verify_checkpoint, self.tmp / "sources" / name),
        functools.partial(comparator.compare_checkpoints, source, self.tmp / "sources" / name),
    ):
      with self.assertRaisesRegex(errors.PathNameError, "expected a path of UTF-8 without backslashes"):
        refused()
    self.assertEqual(util.files(self.tmp), before)

  def test_an_item_that_tensorstore_takes_for_another_path(self):
    source = self.source("source")
    (self.tmp / "step").mkdir()
    source.rename(self.tmp / "step" / "a\\b")
    with self.assertRaisesRegex(errors.PathNameError, r"a\\b: expected a path of UTF-8 without backslashes"):
      converter.convert_checkpoint(self.tmp / "step", self.tmp / "target")

  @parameterized.parameters("file:///tmp/x", "s3://bucket/x", "http://x/y", "a://b")
  def test_other_urls_are_refused(self, url):
    source = self.source("source")
    for paths in ((url, self.tmp / "target"), (source, url)):
      with self.assertRaisesRegex(errors.TargetError, f"{url}: expected a local path or gs://, found [a-z0-9]+://"):
        converter.convert_checkpoint(*paths)

  @parameterized.parameters(5, None, 1.5, (["x"],), b"/tmp/x", "a\0b", "\ud800")
  def test_what_is_no_path(self, path):
    """What neither is a path, nor can be one here; a conversion without any asks for one."""
    source = self.source("source")
    for refused in (
        functools.partial(converter.convert_checkpoint, path or 5, self.tmp / "target"),
        functools.partial(converter.convert_checkpoint, source, path or 5),
        functools.partial(converter.load_checkpoint, path),
        functools.partial(converter.save_checkpoint, {}, path),
        functools.partial(converter.verify_checkpoint, path),
        functools.partial(comparator.compare_checkpoints, source, path),
        functools.partial(inspector.inspect_checkpoint, path),
    ):
      with self.assertRaisesRegex(errors.PathNameError, "expected a path(, as str or os.PathLike| of UTF-8 without NUL)"):
        refused()

  @parameterized.parameters("2.orbax-checkpoint-tmp", "2.orbax-checkpoint-tmp-5/out", "a.partial_save")
  def test_what_would_be_taken_for_unfinished(self, name):
    with self.assertRaisesRegex(errors.PathNameError, "expected a path that no reader takes for an unfinished one"):
      converter.convert_checkpoint(self.source("source"), self.tmp / name)

  def test_what_is_no_url(self):
    """A colon and slashes inside of a path."""
    source = self.source("a:")
    converter.convert_checkpoint(f"{source.parent}/a://", f"{self.tmp}/b://c")
    self.assert_converted(self.tmp / "b:" / "c", True)


class LeavesTest(util.CheckpointTestCase):

  @parameterized.parameters((True, False), (False, True))
  @pytest.mark.integration
  def test_names(self, use_ocdbt, scan_layers):
    others = ("[a]", "a**b", "..", *(NO_NAMES[:3] if use_ocdbt else ()))
    names = [name for name in (*NAMES, *others) if name != "~root"]
    layer = lambda i: {name: util.array(2, 3, start=100 * i + j) for j, name in enumerate(names)}
    tree = {"params": {"params": {"decoder": {f"layers_{i}": layer(i) for i in range(2)}}}}
    source = self.save("source", tree, use_ocdbt=use_ocdbt)
    converter.convert_checkpoint(source, self.tmp / "target", scan_layers=scan_layers, verify="full")
    expected = converter.convert_linen_to_nnx(tree, scan_layers=scan_layers)
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "target")), util.flat(expected))

  @parameterized.parameters("run\\a", "..\\..\\x", "a.__lock", "a/b")
  def test_what_is_no_name_of_a_folder(self, name):
    """Orbax writes some of them without OCDBT, and does not find them again."""
    source = self.save("source", {"params": {"params": {"name": np.zeros(3)}}}, use_ocdbt=False)
    (source / "_METADATA").write_text((source / "_METADATA").read_text().replace('"name"', repr(name).replace("'", '"')))
    with self.assertRaisesRegex(errors.LayoutError, "expected keys that can be names of files"):
      converter.convert_checkpoint(source, self.tmp / "target")


if __name__ == "__main__":
  absltest.main()
