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

"""The page of a comparison in a real browser.

Needs Playwright (`uv run --group browser …`) and a Chromium, in CHROMIUM or on the path.
"""

import os
import pathlib
import shutil
import tempfile

from absl.testing import absltest
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator

FIXTURES = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter"
A, B = FIXTURES / "maxtext-main-2026-05-14" / "nnx_scan", FIXTURES / "maxtext-main-2026-05-14" / "nnx_unscan"

# As root, as CI may run it, Chromium needs the first; the others keep it from calling home.
OPTIONS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.mark.integration
class PageTest(absltest.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    from playwright import sync_api  # pylint: disable=import-outside-toplevel

    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "no Chromium: install it, or say where it is with CHROMIUM"
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    cls.pages = {}
    for name, a, b in (("different", A, B), ("equal", A, A)):  # Before Playwright, which keeps an event loop running.
      cls.pages[name] = cls.tmp / f"{name}.html"
      comparator.main(["program", str(a), str(b), f"--html={cls.pages[name]}", f"--json={cls.tmp}/report.json"])
    playwright = sync_api.sync_playwright().start()
    cls.addClassCleanup(playwright.stop)
    cls.browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
    cls.addClassCleanup(cls.browser.close)

  def open(self, name="different", **options):
    """Opens a page; keeps what it asks for and what the browser says of it."""
    context = self.browser.new_context(viewport={"width": 1200, "height": 900}, **options)
    self.addCleanup(context.close)
    page = context.new_page()
    self.requests, self.messages = [], []
    page.on("request", lambda request: self.requests.append(request.url))
    page.on("console", lambda message: self.messages.append(message.text))
    page.on("pageerror", lambda error: self.messages.append(str(error)))
    page.goto(self.pages[name].as_uri())
    return page

  def test_the_page_needs_nothing_else_and_the_browser_has_nothing_to_say(self):
    page = self.open()
    self.assertEqual(self.requests, [page.url])
    self.assertEqual(self.messages, [])
    self.assertEqual(page.evaluate("document.compatMode"), "CSS1Compat")
    self.assertIn("different: 204 leaves", page.locator("h1").inner_text())
    self.assertFalse(page.evaluate("document.documentElement.scrollWidth > innerWidth"))

  def test_a_link_opens_the_leaf_with_what_was_found(self):
    page = self.open()
    link = page.locator("#values a").first
    found = page.locator(link.get_attribute("href"))
    self.assertFalse(found.is_visible())
    link.click()
    found.wait_for(state="visible", timeout=5000)
    self.assertIn("1,024 of 1,024 differ", found.inner_text())

  def test_the_tree_opens_where_something_differs_and_is_coloured(self):
    page = self.open()
    color = lambda name: page.locator(f".tree .{name}").first.evaluate("e => getComputedStyle(e).color")
    self.assertLen({color(name) for name in ("equal", "far", "structure")}, 3)
    closed = page.locator(".tree details:not(.leaf):not([open]) > summary")
    self.assertGreater(closed.count(), 0)
    self.assertEqual({item.get_attribute("class") for item in closed.all()}, {"equal"})
    closed.first.click()
    self.assertTrue(page.locator(".tree details[open] > .leaf.equal").first.is_visible())

  def test_a_dark_and_narrow_screen(self):
    page = self.open(color_scheme="dark")
    page.set_viewport_size({"width": 480, "height": 800})
    light = lambda color: sum(int(part) for part in color[4:-1].split(",")[:3])
    text = page.evaluate("getComputedStyle(document.querySelector('h2')).color")
    self.assertGreater(light(text), 600)
    self.assertFalse(page.evaluate("document.documentElement.scrollWidth > innerWidth"))

  def test_equal_checkpoints(self):
    page = self.open("equal")
    self.assertEqual(page.locator("h1").get_attribute("class"), "equal")
    self.assertEqual(page.locator("#values, #structure").count(), 0)
    self.assertEqual(page.locator(".tree .leaf").count(), 204)


if __name__ == "__main__":
  absltest.main()
