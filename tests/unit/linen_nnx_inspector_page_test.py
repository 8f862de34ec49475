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

"""The inspector's page: its tree, its map, and names that are not what they seem."""

import html.parser
import re

from absl.testing import absltest
import linen_nnx_converter_util as util
from linen_nnx_inspector_runs import call
from linen_nnx_inspector_runs import LINEN_SCAN
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_inspector import inspection
from maxtext.checkpoint_conversion.linen_nnx_inspector import page

EVIL = "<script>alert('&')<|script>"


class Checker(html.parser.HTMLParser):
  """Checks that what is opened is closed, and keeps tags, attributes and text."""

  def __init__(self, text):
    super().__init__()
    self.open, self.tags, self.attributes, self.texts = [], [], [], []
    self.feed(text)
    self.close()
    assert not self.open, self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += [(tag, *attr) for attr in attrs]
    if tag != "meta":
      self.open.append(tag)

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    self.texts.append(data)


def tree(**leaves):
  """The tree of leaves of 4 bytes, as lines."""
  named = {path.replace("__", "/"): said for path, said in leaves.items()}
  return list(_lines(page.tree(named, dict.fromkeys(named, 4))))


def _lines(nodes, indent=""):
  for node in nodes:
    yield f"{indent}{node.name} {node.said} {node.leaves} {node.nbytes}"
    yield from _lines(node.children, indent + " ")


class TreeTest(absltest.TestCase):

  def test_layers_that_are_alike_are_one_node(self):
    leaves = {f"d__layers_{i}__w_{j}": "f32" for i in (0, 1, 10, *range(2, 10)) for j in (0, 1)}
    self.assertEqual(tree(**leaves), ["d  22 88", " layers_0…10  22 88", "  w_0…1 f32 2 8"])

  def test_layers_that_are_not_alike_or_not_all_there_stay_apart(self):
    self.assertEqual(tree(l_0="f32", l_1="f16", l_2="f16"), ["l_0 f32 1 4", "l_1…2 f16 2 8"])
    self.assertEqual(tree(l_0="f32", l_2="f32"), ["l_0 f32 1 4", "l_2 f32 1 4"])
    self.assertEqual(tree(l_0__a="f32", l_1__b="f32"), ["l_0  1 4", " a f32 1 4", "l_1  1 4", " b f32 1 4"])


class PageTest(util.CheckpointTestCase):

  def page(self, path):
    """The page of a checkpoint."""
    code, out, err = call(path, f"--html={self.tmp / 'page.html'}")
    self.assertEqual((code, err), (0, ""))
    self.assertIn("layout", out)
    return (self.tmp / "page.html").read_text(encoding="utf-8")

  def test_it_is_well_formed_and_needs_nothing_else(self):
    text = self.page(LINEN_SCAN)
    checker = Checker(text)
    self.assertEmpty([each for each in checker.attributes if each[1] in ("href", "src", "srcset", "action", "data")])
    self.assertIsNone(re.search(r"https?:|url\(|@import|<script", text))
    self.assertIn("Linen TrainState", checker.texts)
    self.assertIn("params/params/decoder/logits_dense/kernel  (32, 256) float32", checker.texts)

  def test_the_map_is_filled_by_sizes(self):
    rects = re.findall("<rect [^>]*>", page.page([inspection.inspect_checkpoint(LINEN_SCAN)]))
    sides = [map(float, re.findall(r'(?:width|height)="([\d.]+)"', rect)) for rect in rects]
    self.assertAlmostEqual(sum(width * height for width, height in sides) / (1000 * 420), 1, places=2)

  def test_names_are_text(self):
    params = {"decoder": {EVIL: {"kernel": np.zeros((8, 8), np.float32)}, "n\nl": {"kernel": np.zeros(8, np.float32)}}}
    text = self.page(self.save("odd <&", {"params": {"params": params}}))
    checker = Checker(text)
    self.assertNotIn("script", checker.tags)
    self.assertTrue(any(EVIL in said for said in checker.texts))
    self.assertIn("n\\nl", text)

  def test_what_has_no_leaves_or_no_bytes(self):
    self.assertNotIn("<svg", page.page([inspection.Inspection("nothing", problems=("lost",))]))
    Checker(page.page([inspection.Inspection("none", leaves={"a": "None", "b": "None"}, sizes={"a": 0, "b": 0})]))

  def test_a_file_that_is_there_or_cannot_be(self):
    (self.tmp / "there.html").write_text("mine")
    for name in ("there.html", "no/such.html"):
      code, _, err = call(LINEN_SCAN, f"--html={self.tmp / name}")
      self.assertEqual((code, err.count("\n")), (2, 1))
      self.assertStartsWith(err, f"linen_nnx_inspector: --html={self.tmp / name}: ")
    self.assertEqual((self.tmp / "there.html").read_text(), "mine")
    code, _, err = call(LINEN_SCAN, "--html=a\0.html")
    self.assertEqual((code, "--html=a\0.html: expected a new file" in err), (2, True))
    self.assertIn("--html and --steps", call("--steps", f"--html={self.tmp}/a.html", LINEN_SCAN)[2])


if __name__ == "__main__":
  absltest.main()
