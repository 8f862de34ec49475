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

"""The forms in which Orbax stores leaves, kept through a conversion."""

import asyncio
import itertools
import json
import os
import pathlib
import subprocess
import sys

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import jax
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.path import async_path
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors


class OrbaxVariantsTest(util.CheckpointTestCase):
  """OCDBT on and off, zarr 2 and 3, several chunks an array, value types."""

  @parameterized.parameters(*itertools.product((True, False), (True, False)))
  @pytest.mark.integration
  def test_storage_formats(self, use_ocdbt, use_zarr3):
    tree = util.linen(util.unscanned_params(11))
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    converter.convert_checkpoint(source, self.tmp / "scanned")
    converter.convert_checkpoint(self.tmp / "scanned", self.tmp / "flat", scan_layers=False)
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "flat")), util.flat(tree))
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "scanned")), util.flat(converter.convert_linen_to_nnx(tree))
    )
    for name in ("scanned", "flat"):
      self.assertEqual((self.tmp / name / "manifest.ocdbt").exists(), use_ocdbt)
      self.assertEqual(json.loads((self.tmp / name / "_METADATA").read_text())["use_zarr3"], use_zarr3)

  @parameterized.parameters(True, False)
  def test_what_is_streamed_is_compressed_at_the_quicker_level(self, use_zarr3):
    scanned = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tree = {"params": {"params": {"decoder": {"layers": {"w": scanned}}}}}
    source = self.save("source", tree, use_ocdbt=False, use_zarr3=use_zarr3)
    converter.convert_checkpoint(source, self.tmp / "out", direction="linen_to_linen", scan_layers=False)
    metadata = self.tmp / "out" / "params.params.decoder.layers_1.w" / ("zarr.json" if use_zarr3 else ".zarray")
    compression = json.loads(metadata.read_text())
    if use_zarr3:
      compression = compression["codecs"][0]["configuration"]["codecs"][-1]["configuration"]
    self.assertEqual((compression if use_zarr3 else compression["compressor"])["level"], 1)
    found = ocp.PyTreeCheckpointer().restore(self.tmp / "out")["params"]["params"]["decoder"]
    np.testing.assert_array_equal(found["layers_1"]["w"], scanned[:, 1])

  @pytest.mark.integration
  def test_eight_devices_write_several_chunks_an_array(self):
    """A process of its own, for the number of devices is fixed when JAX starts."""
    script = pathlib.Path(__file__).parent / "linen_nnx_converter_eight_devices.py"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    subprocess.run([sys.executable, script, self.tmp / "source", "save"], check=True, env=env)
    chunks = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.tmp / "source")).tree["params"]["params"]["decoder"]
    self.assertEqual(chunks["layers_0"]["kernel"].storage.chunk_shape, (4, 12))
    for use in ("scanned", "flat"):
      kwargs = {"direction": "linen_to_linen", "scan_layers": use == "scanned"}
      converter.convert_checkpoint(self.tmp / ("source" if use == "scanned" else "scanned"), self.tmp / use, **kwargs)
    self.assertEqual(
        util.flat(converter.load_checkpoint(self.tmp / "flat")), util.flat(converter.load_checkpoint(self.tmp / "source"))
    )
    subprocess.run([sys.executable, script, self.tmp / "scanned", "restore_sharded"], check=True, env=env)

  def test_value_types(self):
    """NumPy arrays, Python scalars, strings, raw and typed PRNG keys, small dtypes, empty nodes."""
    dtypes = ("int4", "uint8", "bool", "float8_e4m3fn", "bfloat16", "float64", "int64", "complex64")
    params = {dtype: np.asarray([0, 1, 1]).astype(jax.numpy.dtype(dtype)) for dtype in dtypes}
    params |= {"jax": jax.numpy.arange(3), "key": jax.random.key(3), "zeros": jax.numpy.zeros((3, 3))}
    tree = {"params": {"params": params}, "opt_state": {"note": "a string", "lr": 0.5, "none": None}, "step": 7}
    source = self.save("source", tree)
    converter.convert_checkpoint(source, self.tmp / "nnx", nnx_values="plain")
    nnx = ocp.PyTreeCheckpointer().restore(self.tmp / "nnx")
    self.assertEqual(nnx["optimizer"]["step"], 7)
    self.assertEqual(nnx["optimizer"]["opt_state"], {"note": "a string", "lr": 0.5})
    self.assertEqual(str(jax.random.key_impl(nnx["model"]["key"])), str(jax.random.key_impl(params["key"])))
    converter.convert_checkpoint(self.tmp / "nnx", self.tmp / "linen")
    restored = [ocp.PyTreeCheckpointer().restore(path) for path in (source, self.tmp / "linen")]
    for state in restored:
      state["params"]["params"]["key"] = jax.random.key_data(state["params"]["params"]["key"])
    self.assertEqual(*map(util.flat, restored))
    types = lambda path: {
        k: v["value_metadata"]["value_type"]
        for k, v in json.loads((path / "_METADATA").read_text())["tree_metadata"].items()
    }
    self.assertEqual(types(source), types(self.tmp / "linen"))

  @parameterized.parameters(np.int32, np.int64)
  def test_a_stored_step_is_cast(self, dtype):
    for step, value_type in ((dtype(9), "scalar"), (np.asarray(9, dtype), "array")):
      source = self.save(value_type, {"params": {"params": {"w": util.array(2)}}, "step": step})
      converter.convert_checkpoint(source, self.tmp / f"{value_type}_nnx")
      metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.tmp / f"{value_type}_nnx")).tree
      self.assertEqual(metadata["optimizer"]["step"].dtype, np.uint32)
      self.assertEqual(converter.load_checkpoint(self.tmp / f"{value_type}_nnx")["optimizer"]["step"], 9)

  def test_chunks_that_hold_the_fill_value_may_be_absent(self):
    """As writers before Orbax 0.11 left them out."""
    source = self.save(
        "source", {"params": {"params": {"w": np.zeros((3, 3), np.float32)}}}, use_ocdbt=False, use_zarr3=False
    )
    (source / "params.params.w" / "0.0").unlink()
    with self.assertRaisesRegex(
        errors.DamagedSourceError, "params/params/w: expected its chunk at .*/0.0, found no such key"
    ):
      converter.convert_checkpoint(source, self.tmp / "target")
    self.assert_nothing_left("source")
    document = json.loads((source / "_METADATA").read_text())
    document["store_array_data_equal_to_fill_value"] = False
    (source / "_METADATA").write_text(json.dumps(document))
    converter.convert_checkpoint(source, self.tmp / "target")
    np.testing.assert_array_equal(converter.load_checkpoint(self.tmp / "target")["model"]["w"]["value"], np.zeros((3, 3)))

  def test_chunks_that_are_named_by_slashes(self):
    """Orbax reads them, and misses them when it merges stores."""
    tree = {"params": {"params": {"w": np.zeros((3, 3), np.float32)}}, "step": np.array(1, np.int32)}
    source = self.save("source", tree)
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{source}/", "path": "params.params.w/"},
        "metadata": {"shape": [3, 3], "chunks": [3, 2], "dtype": "<f4", "dimension_separator": "/"},
    }
    ts.open(spec, create=True, delete_existing=True).result().write(util.array(3, 3)).result()
    converter.convert_checkpoint(source, self.tmp / "target")
    found = ocp.PyTreeCheckpointer().restore(self.tmp / "target")["model"]["w"]["value"]
    np.testing.assert_array_equal(found, util.array(3, 3))

  def test_in_memory_save_and_load(self):
    tree = util.linen(util.unscanned_params(2))
    converter.save_checkpoint(tree, self.tmp / "saved")
    self.assertEqual(util.flat(converter.load_checkpoint(self.tmp / "saved")), util.flat(tree))
    with self.assertRaises(errors.TargetError):
      converter.save_checkpoint(tree, self.tmp / "saved")

  def test_scalars_can_be_stacked(self):
    layers = {f"layers_{i}": {"gain": np.float32(i), "bias": i} for i in range(3)}  # Both of Orbax's value type `scalar`.
    source = self.save("source", {"params": {"params": {"decoder": layers}}})
    converter.convert_checkpoint(source, self.tmp / "scanned", nnx_values="plain")
    stack = converter.load_checkpoint(self.tmp / "scanned")["model"]["decoder"]["layers"]
    self.assertEqual(util.flat(stack), util.flat({"gain": np.float32([0, 1, 2]), "bias": np.int64([0, 1, 2])}))
    converter.convert_checkpoint(self.tmp / "scanned", self.tmp / "flat", scan_layers=False)
    self.assertEqual(converter.load_checkpoint(self.tmp / "flat")["params"]["params"]["decoder"], layers)

  def test_slow_creation_of_folders(self):
    """Orbax makes an item's folder anew if it exists; whatever was written there before is gone."""
    mkdir = async_path.mkdir

    async def slow_mkdir(*args, **kwargs):
      await asyncio.sleep(0.3)
      await mkdir(*args, **kwargs)

    with absltest.mock.patch.object(async_path, "mkdir", slow_mkdir):
      converter.convert_checkpoint(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "nnx")


if __name__ == "__main__":
  absltest.main()
