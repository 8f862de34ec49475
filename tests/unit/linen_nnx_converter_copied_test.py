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


"""Tests of files that are compared while they are copied."""

import json
import os
import pathlib

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import durable
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import copied
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import encoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify

_CONTENT = bytes(range(256)) * 3000  # Three pieces, of which the last is not whole.


class CopiedFilesTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.old, self.new = self.tmp / "old", self.tmp / "new"
    self.old.write_bytes(_CONTENT)
    self.files = copied.CopiedFiles()

  def test_a_copy(self):
    durable.copy(self.old, self.new, self.files.watch)
    self.assertEqual(self.new.read_bytes(), _CONTENT)
    self.assertTrue(self.files.have(self.old, self.new))
    self.assertFalse(self.files.have(self.new, self.old))

  def test_what_another_process_has_compared(self):
    durable.copy(self.old, self.new, self.files.watch)
    other = copied.CopiedFiles()
    other.merge(json.loads(json.dumps(self.files.parts())))
    self.assertTrue(other.have(self.old, self.new))

  def test_an_empty_file(self):
    self.old.write_bytes(b"")
    durable.copy(self.old, self.new, self.files.watch)
    self.assertTrue(self.files.have(self.old, self.new))

  @parameterized.parameters(0, 2**18, len(_CONTENT) - 1)
  def test_a_wrong_byte(self, at):
    with self.files.watch(self.old, self.touched()) as see:
      self.new.write_bytes(_CONTENT[:at] + b"\xff\xff"[: 1 + (_CONTENT[at] == 255)] + _CONTENT[at + 1 :])
      see(len(_CONTENT))
    self.assertFalse(self.files.have(self.old, self.new))

  @parameterized.parameters(_CONTENT[:-1], _CONTENT + b"0")
  def test_another_length(self, content):
    with self.files.watch(self.old, self.touched()) as see:
      self.new.write_bytes(content)
      see(len(_CONTENT) - 1)
    self.assertFalse(self.files.have(self.old, self.new))

  def test_what_was_not_compared_to_its_end(self):
    with self.files.watch(self.old, self.touched()) as see:
      self.new.write_bytes(_CONTENT)
      see(2**18)
    self.assertFalse(self.files.have(self.old, self.new))

  def test_a_file_that_is_written_to_later(self):
    durable.copy(self.old, self.new, self.files.watch)
    _change(self.new)
    self.assertFalse(self.files.have(self.old, self.new))

  def touched(self):
    self.new.touch()
    return self.new


class CopiedCheckpointTest(util.CheckpointTestCase):

  def plant(self, owner, name, replacement):
    self.enter_context(absltest.mock.patch.object(owner, name, replacement))

  def convert(self, use_ocdbt):
    layers = {"w": np.random.default_rng(0).random((40, 3, 24), np.float32)}
    state = {"params": {"params": {"decoder": {"layers": layers}}}, "step": np.array(7, np.int32)}
    source = self.save("source", state, use_ocdbt=use_ocdbt)
    return converter.convert_checkpoint(source, self.tmp / "target", copy_mode="copy")

  @parameterized.parameters(True, False)
  def test_nothing_is_read_again(self, use_ocdbt):
    read = []
    self.plant(encoded, "_are_equal_ranges", lambda *args: read.append(args))
    self.assertTrue(self.convert(use_ocdbt).verified)
    self.assertEmpty(read)

  @parameterized.parameters(True, False)
  def test_a_byte_that_is_copied_wrong(self, use_ocdbt):
    real = durable._copy_piece

    def copy_wrong(old, new, begin, size):
      count = real(old, new, begin, size)
      if count > 5000:  # A chunk; what has fewer bytes are nodes of the tree of keys.
        os.pwrite(new.fileno(), bytes([os.pread(old.fileno(), 1, begin + 100)[0] ^ 1]), begin + 100)
      return count

    self.plant(durable, "_copy_piece", copy_wrong)
    with self.assertRaises(errors.VerificationError):
      self.convert(use_ocdbt)
    self.assertFalse((self.tmp / "target").exists())

  @parameterized.parameters(True, False)
  def test_a_byte_that_changes_after_it_was_copied(self, use_ocdbt):
    real = verify.verify_written

    def changed(compared, source, items, *args, **kwargs):
      same = {path.name for path in (self.tmp / "source").rglob("*")}
      files = [path for path in pathlib.Path(items).rglob("*") if path.is_file() and path.name in same]
      _change(max(files, key=lambda path: path.stat().st_size))
      return real(compared, source, items, *args, **kwargs)

    self.plant(verify, "verify_written", changed)
    with self.assertRaises(errors.VerificationError):
      self.convert(use_ocdbt)


def _change(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


if __name__ == "__main__":
  absltest.main()
