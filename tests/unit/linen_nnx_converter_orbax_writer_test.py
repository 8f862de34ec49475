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

"""What Orbax is given to save, and when its handlers let the bytes be written."""

import asyncio

from absl.testing import absltest
from etils import epath
import linen_nnx_converter_util as util
import numpy as np

from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import storage_form
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf


class Content:
  """Writes ones, and sees which stores are written at a time."""

  def __init__(self, failure=None):
    self.under_way, self.seen, self.failure = set(), [], failure

  async def put_encoded(self, items):
    """There is nothing encoded."""

  async def stream(self, stores, items):
    self.under_way |= stores.keys()
    for path, store in stores.items():
      self.seen.append((path, len(self.under_way)))
      await store.write(np.ones(store.shape, store.dtype.numpy_dtype))
      await asyncio.sleep(0.01)
      if self.failure:
        raise self.failure
    self.under_way -= stores.keys()


class OrbaxWriterTest(util.CheckpointTestCase):

  def save_all_kinds(self, content):
    """Saves a leaf of each kind."""
    kinds = {"a": target_leaf.ArrayLeaf, "b": target_leaf.NumpyLeaf, "c": target_leaf.ScalarLeaf}
    leaf = lambda name, shape: kinds[name]((name,), shape, np.dtype("int32"), shape, shape, None, None, {}, True)
    leaves = {("a",): leaf("a", (4,)), ("b",): leaf("b", (4,)), ("c",): leaf("c", ())}
    pytree = orbax_writer.Pytree(abstract_state.AbstractState(leaves), content)
    form = storage_form.StorageForm(use_ocdbt=True, use_zarr3=True)
    orbax_writer.save(epath.Path(self.tmp / "out"), {"": pytree}, form=form, before_commit=lambda _: None)

  def test_arrays_of_one_kind_are_streamed_after_those_of_another(self):
    """Each stream takes the memory budget, which is for all of them."""
    content = Content()
    self.save_all_kinds(content)
    self.assertEqual(sorted(content.seen), [(("a",), 1), (("b",), 1), (("c",), 1)])

  def test_after_a_failure_nothing_else_is_streamed(self):
    content = Content(OSError("no space"))
    with self.assertRaisesRegex(OSError, "no space"):
      self.save_all_kinds(content)
    self.assertLen(content.seen, 1)


if __name__ == "__main__":
  absltest.main()
