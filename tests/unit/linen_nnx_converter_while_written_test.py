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

"""What is streamed is compared while it is in memory, and decoded once; what is not proven so, by decoding both sides."""

import asyncio
import itertools

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import linen_nnx_converter_util as util
import numpy as np
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import streaming
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import plan
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import decoded
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import reopen
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import while_written

FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.
JOBS = (
    {"scan_layers": False},
    {"scan_layers": False, "weight_dtype": "bfloat16"},
    {"scan_layers": False, "use_ocdbt": True},
    {"scan_layers": False, "chunk_byte_size": 2**10},
    {"scan_layers": True, "compression": "none"},
)
W_OF_LAYER_0 = ("model", "decoder", "layers", "0", "w", "value")


def scanned():
  """Scanned layers, in chunks that hold all of them."""
  random = np.random.default_rng(0).random((40, 3, 24), np.float32)
  layers = {"w": random, "b": util.array(24, 3, start=9000), "zeros": np.zeros((64, 3, 8), np.float32)}
  return {"params": {"params": {"decoder": {"layers": layers}}}, "step": np.array(7, np.int32)}


class WhileWrittenTest(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.decoded_again = []
    verify_arrays = decoded.verify_arrays

    async def seen(plan, targets, *args, **kwargs):
      self.decoded_again += targets
      await verify_arrays(plan, targets, *args, **kwargs)

    self.plant(decoded, "verify_arrays", seen)

  def plant(self, owner, name, replacement):
    self.enter_context(absltest.mock.patch.object(owner, name, replacement))

  def convert(self, kind=(True, True), target="target", **options):
    source = self.save("source", scanned(), use_ocdbt=kind[0], use_zarr3=kind[1])
    return converter.convert_checkpoint(source, self.tmp / target, **options)

  def before_verification(self, change):
    """Has `change` called with the written pytree's folder, when all is written and nothing verified at the end yet."""
    verify_written = verify.verify_written

    def changed(compared, source, items, *args, **kwargs):
      asyncio.run(change(items))
      return verify_written(compared, source, items, *args, **kwargs)

    self.plant(verify, "verify_written", changed)

  @parameterized.parameters(*itertools.product(FORMATS, JOBS))
  @pytest.mark.integration
  def test_nothing_is_decoded_again(self, kind, options):
    self.assertTrue(self.convert(kind, **options).verified)
    self.assertEmpty([path for path in self.decoded_again if path[-1] != "step"])
    found = digests.read(epath.Path(self.tmp / "target"))
    self.assertTrue(converter.verify_checkpoint(self.tmp / "target").verified)
    self.decoded_again.clear()
    converter.convert_checkpoint(self.tmp / "source", self.tmp / "full", verify="full", **options)
    self.assertLen(self.decoded_again, len(reader.Checkpoint(epath.Path(self.tmp / "target")).stored))
    full = digests.read(epath.Path(self.tmp / "full"))
    self.assertEqual(found, {name: full[name] for name in found})

  @parameterized.parameters("maxtext-0.2.4/linen_scan", "tunix/sft")
  def test_of_a_step_and_of_two_stores(self, folder):
    done = converter.convert_checkpoint(util.FIXTURES / folder, self.tmp / "target", scan_layers=False)
    self.assertGreater(done.digests, 20)
    self.assertEmpty([path for path in self.decoded_again if path[-1] != "step"])

  def test_nothing_is_opened_for_a_verification_that_is_not_wanted(self):
    opened, real = [], reopen.Arrays
    self.plant(reopen, "Arrays", lambda folder, *args, **kwargs: opened.append(folder) or real(folder, *args, **kwargs))
    self.convert(verify=False, scan_layers=False)
    self.assertEmpty(opened)
    converter.convert_checkpoint(self.tmp / "source", self.tmp / "verified", scan_layers=False)
    self.assertIn(epath.Path(self.tmp / "source"), opened)

  @parameterized.product(use_zarr3=(True, False), other=("0", "1"))
  @pytest.mark.integration
  def test_a_chunk_that_is_written_again(self, use_zarr3, other):
    """With another layer's value, or its own."""

    async def change(items):
      store = await ts.KvStore.open(ocdbt_index.writable_spec(items), context=ocdbt_index.new_context())
      chunks = (
          key for key in sorted(await store.list()) if b".w.value/" in key and b".z" not in key and b"zarr" not in key
      )
      of_layer = {key.split(b".w.")[0][-1:].decode(): key for key in chunks}
      await store.write(of_layer["0"], (await store.read(of_layer[other])).value)

    self.before_verification(change)
    if other == "1":
      with self.assertRaisesRegex(errors.VerificationError, "model/decoder/layers/0/w/value: expected .* at index"):
        self.convert((True, use_zarr3), scan_layers=False)
      self.assert_nothing_left("source")
    else:
      self.convert((True, use_zarr3), scan_layers=False)
    self.assertEqual([path for path in self.decoded_again if path[-1] != "step"], [W_OF_LAYER_0])

  @parameterized.parameters(*FORMATS)
  @pytest.mark.integration
  def test_a_block_that_is_never_written(self, *kind):
    blocks = streaming.blocks
    self.plant(streaming, "blocks", lambda *args: (block for block in blocks(*args) if block.source[-1] != "w"))
    with self.assertRaisesRegex(
        Exception, "layers.0.w.value.* (chunk .* is missing|params are missing)|3/10 params are missing"
    ):
      self.convert(kind, scan_layers=False)
    self.assert_nothing_left("source")

  @parameterized.parameters(*FORMATS)
  @pytest.mark.integration
  def test_layers_that_are_exchanged(self, *kind):
    """Found while it is written, before the rest is."""
    piece = plan.Part.piece

    def exchanged(part, region, data):
      return piece(part, region, data[:, ::-1] if data.ndim == 3 else data)

    self.plant(plan.Part, "piece", exchanged)
    self.plant(verify, "verify_written", None)
    with self.assertRaisesRegex(errors.VerificationError, "layers/./w/value: expected .* at index .*, found "):
      self.convert(kind, scan_layers=False)
    self.assert_nothing_left("source")

  def test_another_array_of_the_source_proves_nothing(self):
    source = epath.Path(self.save("source", scanned()))
    checkpoint, comparison = reader.Checkpoint(source), reopen.Arrays(source)
    w, zeros = (path for path in checkpoint.stored if path[-1] in ("w", "zeros"))

    async def same(path, other):
      ours, theirs = await comparison.open(path), await checkpoint.open(other)
      return while_written.identity(ours) == while_written.identity(theirs)

    self.assertTrue(asyncio.run(same(w, w)))
    self.assertFalse(asyncio.run(same(w, zeros)))


if __name__ == "__main__":
  absltest.main()
