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

"""Where a target goes, by what stands there, and what `--overwrite` replaces: one checkpoint and nothing else."""

import os
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
from linen_nnx_converter_target_places import CURSOR
from linen_nnx_converter_target_places import LINEN
from linen_nnx_converter_target_places import TargetsTestCase
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer


class PlaceTest(TargetsTestCase):
  """What a path is taken for."""

  @parameterized.named_parameters(
      ("a_folder_named_by_digits", [], "runs/20240502", "runs/20240502/4"),
      ("beside_others_of_the_kind", ["runs/20240501/1"], "runs/20240502", "runs/20240502/4"),
      ("that_holds_steps", ["runs/20240501/1", "runs/20240501/2"], "runs/20240501", "runs/20240501/4"),
      ("that_holds_steps_in_a_folder_of_steps", ["checkpoints/7/1"], "checkpoints/7", "checkpoints/7/4"),
      ("zeros", [], "000010", "000010/4"),
      ("the_items_folder", [], "runs/20240502/items", "runs/20240502"),
      ("a_folder_named_items_that_holds_steps", ["items/1"], "items", "items/4"),
  )
  def test_the_sources_step_is_kept(self, steps, target, place):
    for name in steps:
      self.save_step(name, items=LINEN)
    conversion = converter.convert_checkpoint(self.step, self.tmp / target)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / place / "items"))
    self.assertNotIn("becomes step", conversion.summary())

  @parameterized.named_parameters(
      ("in_checkpoints", [], "checkpoints/7"),
      ("beside_a_step", ["out/1"], "out/7"),
      ("beside_a_step_with_zeros", ["out/000001"], "out/000010"),
      ("its_own_number", [], "out/4"),
      ("its_own_number_with_zeros", [], "out/0004"),
  )
  def test_a_step_is_meant(self, steps, target):
    for name in steps:
      self.save_step(name, items=LINEN)
    conversion = converter.convert_checkpoint(self.step, self.tmp / target)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / target / "items"))
    step = pathlib.Path(target).name
    self.assertIn(f"; step 4 becomes step {step}, as --target_path names it", conversion.summary())

  def test_the_sources_name_is_kept(self):
    self.step.rename(self.tmp / "run" / "000010")
    conversion = converter.convert_checkpoint(self.tmp / "run", self.tmp / "out")
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / "000010" / "items"))

  @parameterized.parameters(("000010", "000009"), ("000100", "000099"), ("10", "9"), ("0100", "0099"))
  def test_tunixs_name(self, tunix, maxtext):
    shutil.copytree(util.FIXTURES / "tunix" / "sft" / "4", self.tmp / "tunix" / tunix)
    conversion = converter.convert_checkpoint(self.tmp / "tunix", self.tmp / "out", dry_run=True)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "out" / maxtext / "items"))

  def test_an_existing_step_without_a_number_is_no_folder_of_steps(self):
    self.save_step("final", items=LINEN, extra=CURSOR)
    with self.assertRaisesRegex(errors.TargetError, "final: expected nothing there yet"):
      converter.convert_checkpoint(self.step, self.tmp / "final")
    conversion = converter.convert_checkpoint(self.step, self.tmp / "final", overwrite=True)
    self.assertEqual(os.fspath(conversion.target), str(self.tmp / "final" / "items"))


def symbolic_link(test):
  test.save_step("elsewhere", items=LINEN)
  (test.tmp / "out").mkdir()
  (test.tmp / "out" / "4").symlink_to(test.tmp / "elsewhere")


class OverwriteTest(TargetsTestCase):
  """What is replaced, and what is not."""

  @parameterized.named_parameters(
      ("folder_of_steps", "lone", lambda t: t.save_step("out/1", items=LINEN), "out", "a folder of steps: 1"),
      ("folder_with_a_file", "lone", lambda t: t.write("out/a.txt"), "out", "no _METADATA, but a.txt"),
      ("file", "lone", lambda t: t.write("out"), "out", "a file"),
      ("step", "lone", lambda t: t.save_step("out", items=LINEN), "out", "no _METADATA, but .*items"),
      (
          "item_of_a_step",
          "lone",
          lambda t: t.save_step("out/4", items=LINEN),
          "out/4/items",
          "an item of the step .*out/4",
      ),
      (
          "pytree_and_a_file",
          "lone",
          lambda t: (t.save("out", LINEN), t.write("out/a.txt")),
          "out",
          "a.txt, which is no part of a checkpoint",
      ),
      (
          "plain_pytree_and_a_folder",
          "lone",
          lambda t: (t.save("out", LINEN, use_ocdbt=False), t.write("out/mine/a.txt")),
          "out",
          "mine, which is no part of a checkpoint",
      ),
      ("file_for_a_step", "run", lambda t: t.write("out/4"), "out", "a file"),
      ("link_for_a_step", "run", symbolic_link, "out", "a symbolic link to .*elsewhere"),
      ("pytree_for_a_step", "run", lambda t: t.save("out", LINEN), "out", "a pytree that stands alone"),
      ("folder_for_a_step", "run", lambda t: t.write("out/4/a.txt"), "out", "a.txt, which the target will not have"),
      ("step_without_items", "run", lambda t: t.save_step("out/4", extra=CURSOR), "out", "no folder items"),
      (
          "step_and_a_file",
          "run",
          lambda t: (t.save_step("out/4", items=LINEN), t.write("out/4/a.txt")),
          "out",
          "a.txt, which the target will not have",
      ),
      (
          "step_and_a_file_in_its_items",
          "run",
          lambda t: (t.save_step("out/4", items=LINEN), t.write("out/4/items/a.txt")),
          "out",
          "in items, a.txt, which is no part of a checkpoint",
      ),
      (
          "step_with_an_item_of_its_own",
          "run",
          lambda t: t.save_step("out/4", items=LINEN, iter=CURSOR, extra=CURSOR),
          "out",
          "iter, which the target will not have",
      ),
      (
          "steps_in_a_step",
          "run",
          lambda t: [t.save_step(f"checkpoints/4{n}", items=LINEN) for n in ("", "/1", "/2", "/10")],
          "checkpoints/4/items",
          "a folder of steps: 1, 2, 10",
      ),
      (
          "folder_of_many_steps_for_a_step_without_a_number",
          "final",
          lambda t: (t.save_step("final", items=LINEN), [t.save_step(f"out/{n}", items=LINEN) for n in range(1, 8)]),
          "out",
          "a folder of steps: 1, 2, 3, 4, 5 and 2 more",
      ),
  )
  def test_refused(self, source, arrange, target, found):
    arrange(self)
    before, names = util.snapshot(self.tmp), util.files(self.tmp)
    with self.assertRaisesRegex(errors.TargetError, f"expected one checkpoint to replace, .* found {found}.* Choose"):
      converter.convert_checkpoint(self.tmp / source, self.tmp / target, overwrite=True)
    self.assertEqual((util.snapshot(self.tmp), util.files(self.tmp)), (before, names))

  @parameterized.named_parameters(
      ("step", "run", lambda t: t.save_step("out/4", items=CURSOR), "out", "out/4/items"),
      (
          "step_with_the_sources_items",
          "run",
          lambda t: t.save_step("out/4", items=CURSOR, extra=CURSOR),
          "out",
          "out/4/items",
      ),
      (
          "step_of_an_old_orbax",
          "run",
          lambda t: (t.save_step("out/4", items=CURSOR) / "_CHECKPOINT_METADATA").unlink(),
          "out",
          "out/4/items",
      ),
      ("pytree", "lone", lambda t: t.save("out", CURSOR | {"name": "text"}), "out", "out"),
      ("pytree_without_ocdbt", "lone", lambda t: t.save("out", {"a": {"b": CURSOR}}, use_ocdbt=False), "out", "out"),
      ("empty_folder", "lone", lambda t: (t.tmp / "out").mkdir(), "out", "out"),
  )
  def test_replaced(self, source, arrange, target, place):
    arrange(self)
    converter.convert_checkpoint(self.tmp / source, self.tmp / target, overwrite=True)
    self.assertIn("model", converter.load_checkpoint(self.tmp / place))

  @parameterized.parameters("maxtext-0.2.4/linen_scan", "tunix/rl")
  @pytest.mark.integration
  def test_its_own_target_is_replaced(self, source):
    for options in ({}, {"overwrite": True}, {"overwrite": True, "verify": "full"}, {"overwrite": True}):
      converter.convert_checkpoint(util.FIXTURES / source, self.tmp / "out", **options)

  def test_steps_beside_it_are_left_alone(self):
    for name in ("1", "2", "3", "4"):
      self.save_step(f"runs/20240501/{name}", items=CURSOR)
    others = [util.snapshot(self.tmp / "runs" / "20240501" / name) for name in ("1", "2", "3")]
    converter.convert_checkpoint(self.step, self.tmp / "runs" / "20240501", overwrite=True)
    self.assertEqual([util.snapshot(self.tmp / "runs" / "20240501" / name) for name in ("1", "2", "3")], others)
    self.assertIn("model", converter.load_checkpoint(self.tmp / "runs" / "20240501" / "4"))

  @parameterized.parameters(False, True)
  def test_something_appears_meanwhile(self, exists):
    """In the checkpoint that is about to be replaced, or where nothing stood."""
    if exists:
      self.save_step("out/4", items=LINEN)
    real = orbax_writer.save

    def save(*args, before_commit, **kwargs):
      def and_appear(*folders):
        before_commit(*folders)
        self.write("out/4/mine.txt")

      real(*args, before_commit=and_appear, **kwargs)

    with (
        absltest.mock.patch.object(orbax_writer, "save", save),
        self.assertRaisesRegex(errors.TargetError, "out/4: expected one checkpoint .*, found mine.txt, which"),
    ):
      converter.convert_checkpoint(self.step, self.tmp / "out", overwrite=True)
    self.assertEqual((self.tmp / "out" / "4" / "mine.txt").read_text(), "mine")
    self.assertEqual((self.tmp / "out" / "4" / "items" / "_METADATA").exists(), exists)
    self.assertEqual(os.listdir(self.tmp / "out"), ["4"])


if __name__ == "__main__":
  absltest.main()
