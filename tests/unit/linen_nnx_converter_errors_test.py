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

"""Refusals go from process to process whole."""

import copy
from multiprocessing import pool
import pickle

from absl.testing import absltest
from absl.testing import parameterized

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

CLASSES = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.ConversionError)]


class CopiesTest(parameterized.TestCase):

  @parameterized.product(cls=CLASSES, path=(("params", "w"), "/tmp/a\nb"))
  def test_pickled_and_copied(self, cls, path):
    error = cls(path, "a", "b", "Do c.")
    error.add_note("a note")
    pickled = [pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)]
    for copied in (*pickled, copy.copy(error), copy.deepcopy(error)):
      self.assertIs(type(copied), cls)
      self.assertEqual(str(copied), str(error))
      self.assertEqual(vars(copied), vars(error))  # The path, what was expected and found, the remedy, the notes.

  def test_out_of_a_pool(self):
    """As a worker of `multiprocessing.Pool` sends it."""
    with self.assertRaises(errors.LayoutError) as caught:
      converter.detect_format({"nothing": 1})
    sent = pickle.loads(pickle.dumps(pool.ExceptionWithTraceback(caught.exception, caught.exception.__traceback__)))
    self.assertEqual((type(sent), str(sent)), (errors.LayoutError, str(caught.exception)))

  def test_one_line_keeps_the_cause(self):
    """TensorStore names the file twice before it says what is wrong."""
    path = "/mnt/run/checkpoints/2.orbax-checkpoint-tmp-linen_nnx_converter/2.orbax-checkpoint-tmp/items/ocdbt.process_0/"
    said = ValueError(f'RESOURCE_EXHAUSTED: Error writing "w" in "{path}":\n"{path}d/0": No space left on device [28]')
    self.assertEqual(errors.one_line(said, 1000), str(said).replace("\n", " "))
    self.assertRegex(errors.one_line(said, 100), "^RESOURCE_EXHAUSTED: .* … .*: No space left on device .28.$")
    self.assertLen(errors.one_line(said, 100), 100)

  @parameterized.parameters((MemoryError(), "MemoryError"), (ValueError("a\n b"), "ValueError: a b"))
  def test_an_exception_of_a_library_may_say_nothing_but_its_name(self, e, named):
    self.assertEqual(errors.named(e), named)


if __name__ == "__main__":
  absltest.main()
