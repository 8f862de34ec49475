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

"""The inspector's page in a real browser.

Needs Playwright (`uv run --group browser …`) and a Chromium, in CHROMIUM or on the path.
"""

import os
import pathlib
import shutil
import tempfile

from absl.testing import absltest
import pytest

from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-main-2026-05-14" / "linen_unscan"
# As root, as CI may run it, Chromium needs the first; the others keep it from calling home.
OPTIONS = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync")


@pytest.mark.integration
class PageTest(absltest.TestCase):

  def setUp(self):
    super().setUp()
    from playwright import sync_api  # pylint: disable=import-outside-toplevel

    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    assert executable, "no Chromium: install it, or say where it is with CHROMIUM"
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    inspector.main(["program", str(SOURCE), f"--html={tmp / 'page.html'}"])  # Before Playwright's event loop.
    playwright = sync_api.sync_playwright().start()
    self.addCleanup(playwright.stop)
    browser = playwright.chromium.launch(executable_path=executable, args=OPTIONS)
    self.addCleanup(browser.close)
    self.page = browser.new_context(viewport={"width": 480, "height": 800}, java_script_enabled=False).new_page()
    self.requests, self.messages = [], []
    self.page.on("request", lambda request: self.requests.append(request.url))
    self.page.on("console", lambda message: self.messages.append(message.text))
    self.page.goto((tmp / "page.html").as_uri())

  def test_without_script_and_on_a_narrow_screen(self):
    page = self.page
    self.assertEqual((self.requests, self.messages), ([page.url], []))
    self.assertIn("linen_unscan/2/items", page.locator("h1").inner_text())
    self.assertLessEqual(page.locator("body").bounding_box()["width"], 480)
    params = page.locator(".tree > details").last
    summary = lambda name: params.locator("summary", has_text=name).first
    self.assertFalse(summary("layers_0…3").is_visible())
    summary("decoder").click()
    summary("layers_0…3").click()
    self.assertTrue(summary("mlp").is_visible())

  def test_the_map(self):
    boxes = [rect.bounding_box() for rect in self.page.locator("svg rect").all()]
    self.assertGreater(len(boxes), 20)
    whole = self.page.locator("svg").bounding_box()
    area = sum(box["width"] * box["height"] for box in boxes) / (whole["width"] * whole["height"])
    self.assertAlmostEqual(area, 1, delta=0.05)


if __name__ == "__main__":
  absltest.main()
