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

"""Checkpoints of Tunix, two pytrees with a store each, whose bytes go to the target by reference."""

import errno
import itertools
import os
import shutil

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import by_reference
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import leaf_routes

REFERENCE, RAW, STREAMED = leaf_routes.Way.REFERENCE, leaf_routes.Way.RAW, leaf_routes.Way.STREAMED
FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.


class TwoStoresTest(util.CheckpointTestCase):
  """Checkpoints of Tunix: two pytrees, each with a store of its own, become one."""

  def setUp(self):
    super().setUp()
    random = np.random.default_rng(1)
    weights = lambda: random.bytes(2**15)
    boxed = lambda data: {"value": np.frombuffer(data, np.float16).reshape(128, -1)}
    params = lambda: {"decoder": {name: {"kernel": boxed(weights())} for name in ("mlp", "out")}}
    count = lambda n: {"value": np.array(n, np.int32)}
    self.model = params()
    self.opt_state = {"0": {"count": count(6), "mu": params(), "nu": params()}, "2": {"count": count(6)}}
    self.optimizer = {"opt_state": self.opt_state, "step": count(6)}

  def save_items(self, *, unbox=False, optimizer_options=None, **options):
    """Saves a step of Tunix, and returns its folder."""
    unboxed = lambda tree: jax.tree.map(lambda box: box["value"], tree, is_leaf=lambda node: "value" in node)
    kept = unboxed if unbox else lambda tree: tree
    self.save("run/6/model_params", kept(self.model), **options)
    self.save("run/6/optimizer_state", kept(self.optimizer), **(optimizer_options or options))
    return self.tmp / "run" / "6"

  def expected(self):
    unboxed = lambda tree: {path.removesuffix("/value"): leaf for path, leaf in util.flat(tree).items()}
    expected = {f"params/params/{path}": leaf for path, leaf in unboxed(self.model).items()}
    for name in ("mu", "nu"):
      moments = unboxed(self.opt_state["0"][name])
      expected |= {f"opt_state/0/{name}/params/{path}": leaf for path, leaf in moments.items()}
    counts = {f"opt_state/{place}/count": util.bits(np.array(6, np.int32)) for place in (0, 2)}
    return expected | counts | {"opt_state/1": None, "step": util.bits(np.array(6, np.int32))}

  def assert_read(self):
    """The target is whole, also when the source is gone."""
    shutil.rmtree(self.tmp / "run")
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "target")), self.expected())

  @parameterized.parameters(*itertools.product(FORMATS, (False, True), ("auto", "link", "copy")))
  @pytest.mark.integration
  def test_all_but_the_step_goes_by_reference(self, way, unbox, copy_mode):
    use_ocdbt, use_zarr3 = way
    source = self.save_items(unbox=unbox, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    before = util.snapshot(source)
    done = converter.convert_checkpoint(source, self.tmp / "target", copy_mode=copy_mode)
    how = REFERENCE if use_ocdbt or copy_mode == "link" else RAW
    self.assertEqual(done.nbytes, {REFERENCE: 0, RAW: 0, STREAMED: 4} | {how: 6 * 2**15 + 8})
    self.assertEqual([path for path, way in done.ways.items() if way == STREAMED], [("step",)])
    self.assertTrue(done.verified)
    self.assertEqual(util.snapshot(source), before)
    own = util.own_bytes(self.tmp / "target")
    if how == RAW or copy_mode == "copy":
      self.assertEqual(own, util.all_bytes(self.tmp / "target"))
    else:
      self.assertLess(own, 2**14)
    self.assert_read()

  def test_the_next_conversion(self):
    """The data files keep their places below the items' folders."""
    converter.convert_checkpoint(self.save_items(), self.tmp / "first")
    done = converter.convert_checkpoint(self.tmp / "first", self.tmp / "target", direction="linen_to_linen")
    self.assertEqual(done.nbytes[STREAMED], 0)
    shutil.rmtree(self.tmp / "first")
    self.assert_read()

  def test_another_file_system_is_refused_for_links(self):
    failed = OSError(errno.EXDEV, "another file system")
    with (
        absltest.mock.patch.object(os, "link", side_effect=failed),
        self.assertRaisesRegex(errors.TargetError, "expected a file system on which .* can be linked"),
    ):
      converter.convert_checkpoint(self.save_items(), self.tmp / "target", copy_mode="link")
    self.assert_nothing_left("run")

  @pytest.mark.integration
  def test_what_is_left_out_does_not_lie_dead_in_the_target(self):
    """Gradients of micro-batches, in wrappers of which none wait."""
    random = np.random.default_rng(2)
    boxed = lambda data: {"value": np.frombuffer(data, np.float16).reshape(128, -1)}
    gradients = {"decoder": {name: {"kernel": boxed(random.bytes(2**21))} for name in ("mlp", "out")}}
    self.model["decoder"] = {name: {"kernel": boxed(random.bytes(2**21))} for name in ("mlp", "out")}
    for name in ("mu", "nu"):
      self.opt_state["0"][name] = jax.tree.map(np.copy, self.model)
    zero = {"value": np.array(0, np.int32)}
    wrapper = {"acc_grads": gradients, "mini_step": zero, "gradient_step": zero, "inner_opt_state": self.opt_state}
    self.optimizer["opt_state"] = wrapper
    source = self.save_items()
    for name in ("model_params", "optimizer_state"):
      util.in_one_file(source / name)
    done = converter.convert_checkpoint(source, self.tmp / "linked", copy_mode="link")
    self.assertEqual(done.nbytes, {REFERENCE: 6 * 2**21 + 8, RAW: 0, STREAMED: 4})
    done = converter.convert_checkpoint(source, self.tmp / "target")
    self.assertEqual(done.nbytes, {REFERENCE: 0, RAW: 6 * 2**21 + 8, STREAMED: 4})
    self.assertLess(util.all_bytes(self.tmp / "target"), 1.1 * 6 * 2**21)
    self.assert_read()

  @parameterized.parameters(
      ({"use_ocdbt": True}, {"use_ocdbt": False}),
      ({"use_ocdbt": False}, {"use_ocdbt": True}),
      ({"use_zarr3": True}, {"use_zarr3": False}),
      ({"use_ocdbt": False, "use_zarr3": False}, {"use_ocdbt": False, "use_zarr3": True}),
  )
  @pytest.mark.integration
  def test_stores_of_two_kinds_are_streamed(self, options, optimizer_options):
    source = self.save_items(optimizer_options=optimizer_options, **options)
    done = converter.convert_checkpoint(source, self.tmp / "target")
    self.assertEqual(done.nbytes, {REFERENCE: 0, RAW: 0, STREAMED: 6 * 2**15 + 12})
    self.assert_read()

  @parameterized.parameters("model_params", "optimizer_state")
  def test_a_missing_data_file(self, item):
    source = self.save_items()
    max((p for p in (source / item).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size).unlink()
    with self.assertRaisesRegex(errors.DamagedSourceError, f"^{item}/.*kernel.*found no such file"):
      converter.convert_checkpoint(source, self.tmp / "target")
    self.assert_nothing_left("run")

  def test_a_damaged_reference_is_found(self):
    source = self.save_items()
    self.enter_context(absltest.mock.patch.object(by_reference, "rename", util.swapped))
    with self.assertRaisesRegex(errors.VerificationError, "kernel"):
      converter.convert_checkpoint(source, self.tmp / "target")
    self.assert_nothing_left("run")


if __name__ == "__main__":
  absltest.main()
