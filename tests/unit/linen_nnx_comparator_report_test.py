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

"""The order of what is reported, the JSON and the page, of literal comparisons."""

import dataclasses
import html.parser
import json
import math
import re

from absl.testing import absltest
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_comparator import alignment
from maxtext.checkpoint_conversion.linen_nnx_comparator import difference
from maxtext.checkpoint_conversion.linen_nnx_comparator import page
from maxtext.checkpoint_conversion.linen_nnx_comparator import report
from maxtext.checkpoint_conversion.linen_nnx_converter.layers import leaf_moves

VOID = {"meta", "br"}


def outcome(name, a, b, structure=None, failure=None, tolerance=None):
  """A leaf of these values, found at `name`; None is no leaf."""
  keys = tuple(name.split("/"))
  arrays = [None if values is None else np.asarray(values, np.float32) for values in (a, b)]
  move = leaf_moves.copy(("source", *keys))
  leaves = [None if array is None else alignment.Leaf(move, "params", array) for array in arrays]
  values = difference.Difference()
  if a is not None and b is not None:
    values = difference.measure(*arrays, (0,) * arrays[0].ndim, tolerance)
  return alignment.Pair(keys, *leaves, structure, values, failure)


def comparison(*outcomes, **options):
  trees = alignment.Tree({}, {}, "Linen TrainState", True, "/a"), alignment.Tree({}, {}, "NNX TrainStateNNX", False, "/b")
  return report.Comparison(trees, outcomes, **options)


MIXED = comparison(
    outcome("m/equal", [1, 2], [1, 2]),
    outcome("m/slightly", [1.0, 2], [1.0000001, 2]),
    outcome("m/much", [1, 2], [1, 3]),
    outcome("m/nan", [1, 2], [1, math.nan]),
    outcome("m/gone", [1, 2], None, alignment.ONLY_A),
    outcome("m/damaged", [1, 2], [1, 2], alignment.UNREADABLE, "cannot be read"),
    outcome("n/much more", [1, 2], [-1, 2]),
)


class ReportTest(absltest.TestCase):

  def test_the_worst_come_first(self):
    names = [found.path for found in MIXED.worst_first()]
    self.assertCountEqual(names[:2], ["m/gone", "m/damaged"])
    self.assertEqual(names[2:], ["m/nan", "n/much more", "m/much", "m/slightly"])
    top = report.branches(MIXED.ranked(), 0)
    self.assertEqual([name for name, *_ in top], ["m", "n"])
    self.assertEqual([name for name, *_ in report.branches(top[0][2], 1)][2:], ["nan", "much", "slightly", "equal"])

  def test_grades(self):
    grades = {found.path: report.grade(found) for found in MIXED.leaves}
    self.assertEqual(
        grades,
        {
            "m/equal": "equal",
            "m/slightly": "near",
            "m/much": "far",
            "m/nan": "far",
            "m/gone": "structure",
            "m/damaged": "structure",
            "n/much more": "far",
        },
    )
    within = outcome("w", [1.0], [1.5], tolerance=difference.Tolerance(1.0))
    self.assertEqual((within.status, report.grade(within)), ("within tolerance", "near"))

  def test_another_model_and_another_step_come_first(self):
    step = dataclasses.replace(outcome("optimizer/step", 2, 4), a=None)
    step = dataclasses.replace(
        step, a=dataclasses.replace(step.b, part="step"), b=dataclasses.replace(step.b, part="step")
    )
    unlike = comparison(*MIXED.leaves, step, notes=["another note"])
    self.assertEqual(
        [said for title, said in report.head(unlike) if title == "note"],
        [
            "Not of one model: 1 of 7 params are on one side only, or of another shape.",
            "Not of one step: A is of step 2.0, B of step 4.0.",
            "another note",
        ],
    )
    self.assertEqual(next(report.head(unlike))[0], "note")
    self.assertEqual(report.as_json(unlike)["notes"][2], "another note")

  def test_json_is_strict(self):
    huge = difference.measure(np.array([1.7e308]), np.array([-1.7e308]), (0,))  # Their difference overflows float64.
    document = report.as_json(comparison(dataclasses.replace(MIXED.leaves[0], values=huge), *MIXED.leaves))
    text = json.dumps(document, allow_nan=False)
    self.assertEqual(json.loads(text)["worst_first"][-1]["path"], "m/slightly")
    found = next(item for item in document["worst_first"] if item["path"] == "m/equal")
    self.assertEqual(found["difference"]["largest_absolute"]["value"], "inf")

  def test_a_leaf_that_cannot_be_read_says_why(self):
    damaged = next(found for found in MIXED.leaves if found.failure)
    self.assertEqual(report.detail(damaged), "unreadable: cannot be read")


class Checker(html.parser.HTMLParser):
  """Checks that what is opened is closed, and keeps attributes and text."""

  def __init__(self):
    super().__init__()
    self.open, self.attributes, self.texts = [], [], []

  def handle_starttag(self, tag, attrs):
    self.attributes += attrs
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.attributes += attrs

  def handle_endtag(self, tag):
    assert self.open.pop() == tag, tag

  def handle_data(self, data):
    self.texts.append(data)


class PageTest(absltest.TestCase):

  def check(self, text):
    checker = Checker()
    checker.feed(text)
    checker.close()
    self.assertEmpty(checker.open)
    return checker

  def test_it_is_well_formed_and_links_to_itself_alone(self):
    text = page.page(MIXED)
    checker = self.check(text)
    ids = [value for name, value in checker.attributes if name == "id"]
    self.assertLen(set(ids), len(ids))
    links = [value for name, value in checker.attributes if name in ("href", "src", "srcset", "action", "data")]
    self.assertLen(links, 6)
    self.assertContainsSubset([link.removeprefix("#") for link in links], ids)
    self.assertIsNone(re.search(r"https?:|url\(|@import|<script", text))

  def test_names_and_messages_are_text(self):
    evil = "<script>alert('&')</script>"
    found = outcome(evil.replace("/", "|"), [1], [2])
    checker = self.check(page.page(comparison(found, notes=[evil])))
    self.assertNotIn("script", checker.open)
    self.assertTrue(any(evil in text for text in checker.texts))
    self.assertIn("&lt;script&gt;", page.page(comparison(found, notes=[evil])))

  def test_a_large_tree_starts_closed(self):
    many = comparison(*(outcome(f"m/{i}", [1], [2]) for i in range(300)))
    text = page.page(many)
    self.assertNotIn("<details open", text)
    self.assertIn("100 of 300", text)
    self.assertIn("<details open", page.page(MIXED))


if __name__ == "__main__":
  absltest.main()
