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

"""Whole conversions without the API of Orbax V0, which Orbax 1.0 removes: `storage/orbax_writer.save` made of V1's.

V1 makes the temporary folder, the metadata of the step and its file, and commits. The files of a pytree, which V0's
handlers frame today, are written here. It is no part of `src`: V1 saves no pytree that stands alone, and names differ
by release.
"""

import asyncio
import base64
import contextlib
import json
import types

from absl.testing import absltest
from absl.testing import parameterized
import jax
import linen_nnx_converter_util as util
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata_store
from orbax.checkpoint.experimental import v1
import tensorstore as ts

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import target_leaves
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import locations
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import orbax_writer
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import target_leaf
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import write_specs

V0 = (
    "Checkpointer",
    "CompositeCheckpointHandler",
    "PyTreeCheckpointHandler",
    "PyTreeCheckpointer",
    "args",
    "type_handlers",
)
PYTREE = v1.handlers.PyTreeHandler
VALUE_TYPES = {leaf: name for name, leaf in target_leaves._LEAF_TYPES.items()} | {type(None): "None"}


def save(path, pytrees, *, form, before_commit):
  """`orbax_writer.save`. The place is a staging folder: what `before_commit` raises prevents the target here too."""
  items = {name: _Pytree(each.leaves, each.content, form.use_ocdbt, form.use_zarr3) for name, each in pytrees.items()}
  v1.save_checkpointables(path, items)
  (path / "orbax.checkpoint").unlink()  # V1's file goes along with the step's items where the source has it.
  # What loads it is V1's handler of pytrees, not that of objects which save themselves.
  locations.update_step_metadata(path, {name: f"{PYTREE.__module__}.{PYTREE.__qualname__}" for name in items}, {})
  return before_commit(path)


class _Pytree(v1.StatefulCheckpointable):
  """A pytree that writes its own files."""

  def __init__(self, leaves, content, use_ocdbt, use_zarr3):
    self._tree, self._content, self._use_ocdbt, self._use_zarr3 = leaves, content, use_ocdbt, use_zarr3
    self._context = ocdbt_index.new_context()
    self._arrays = {p: leaf for p, leaf in leaves.leaves.items() if isinstance(leaf, target_leaf.TargetLeaf)}

  async def save(self, directory):
    return self._write(await directory.await_creation())

  async def load(self, directory):
    raise NotImplementedError

  async def _write(self, folder):
    await self._content.put_encoded(folder)
    streamed = {path: leaf for path, leaf in self._arrays.items() if leaf.is_streamed}
    opened = await asyncio.gather(*(self._open(folder, path, leaf) for path, leaf in streamed.items()))
    await self._content.stream(dict(zip(streamed, opened)), folder)
    if self._use_ocdbt:  # What was copied raw is in the stores of processes.
      await orbax_writer.merge_stores(folder, self._context, use_zarr3=self._use_zarr3)
    await self._write_metadata(folder)

  async def _open(self, folder, path, leaf):
    name, process = ".".join(path), folder / "ocdbt.process_0"
    place = ocdbt_index.spec(folder, use_ocdbt=False)
    store = ocdbt_index.writable_spec(process) | {"path": f"{name}/"} if self._use_ocdbt else None
    return await ts.open(
        {
            "driver": "zarr3" if self._use_zarr3 else "zarr",
            "kvstore": store or place | {"path": place["path"] + name},
        },
        create=True,
        context=self._context,
        dtype=leaf.dtype,
        shape=leaf.shape,
        chunk_layout=ts.ChunkLayout(write_chunk_shape=leaf.chunk_shape),
    )

  async def _write_metadata(self, folder):
    info = lambda path: types.SimpleNamespace(
        name=".".join(path), is_ocdbt_checkpoint=self._use_ocdbt, use_zarr3=self._use_zarr3
    )
    arrays = {path: leaf for path, leaf in self._arrays.items() if isinstance(leaf, target_leaf.ArrayLeaf)}
    await array_metadata_store.Store().write(
        checkpoint_dir=folder,
        array_metadatas=[write_specs.array_metadata_of(leaf, info(path), None) for path, leaf in arrays.items()],
        process_index=0,
    )
    name = lambda path: base64.urlsafe_b64encode(".".join(path).encode()).decode()
    (folder / "_sharding").write_text(json.dumps({name(p): leaf.sharding for p, leaf in arrays.items() if leaf.sharding}))
    document = {
        "tree_metadata": {str(path): self._entry(path, leaf) for path, leaf in self._tree.leaves.items()},
        "use_ocdbt": self._use_ocdbt,
        "use_zarr3": self._use_zarr3,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / "_METADATA").write_text(json.dumps(document))

  def _entry(self, path, leaf):
    kinds = [1 if path[:i] in self._tree.lists else 2 for i in range(len(path))]  # Orbax's, of lists and of dicts.
    value = {"value_type": VALUE_TYPES[type(leaf)], "skip_deserialize": leaf is None}
    value |= {"write_shape": list(leaf.write_shape)} if isinstance(leaf, target_leaf.ArrayLeaf) else {}
    return {
        "key_metadata": [{"key": key, "key_type": kind} for key, kind in zip(path, kinds)],
        "value_metadata": value,
    }


class WithoutV0Test(util.CheckpointTestCase):

  @parameterized.parameters((True, True), (False, False))
  def test_a_conversion_and_its_inverse(self, use_ocdbt, use_zarr3):
    """Layers are sliced out of the chunks that hold them all, so streamed, and stacked by reference, or raw."""
    params = {"decoder": {"layers": {"mlp": {"kernel": util.array(4, 3, 5)}}, "decoder_norm": {"scale": util.array(4)}}}
    linen = jax.tree.map(jax.numpy.asarray, util.linen(params))
    saving = v1.options.ArrayOptions.Saving(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    with contextlib.ExitStack() as stack:
      for name in V0:
        stack.enter_context(absltest.mock.patch.object(ocp, name, None))
      stack.enter_context(absltest.mock.patch.object(orbax_writer, "save", save))
      with v1.Context(array_options=v1.options.ArrayOptions(saving=saving)):
        v1.save_checkpointables(self.tmp / "in", {"state": linen})
      for source, target, scan_layers in (("in", "nnx", False), ("nnx", "out", True)):
        options = {"scan_layers": scan_layers, "verify": "full"}
        self.assertTrue(converter.convert_checkpoint(self.tmp / source, self.tmp / target, **options).verified)
      nnx, out = (v1.load_checkpointables(self.tmp / name)["state"] for name in ("nnx", "out"))
    self.assertEqual(util.flat(nnx), util.flat(converter.convert_linen_to_nnx(linen, scan_layers=False)))
    self.assertEqual(util.flat(out), util.flat(linen))
    converter.convert_checkpoint(self.tmp / "in", self.tmp / "by_v0", scan_layers=False)
    tree = lambda name: json.loads((self.tmp / name / "state" / "_METADATA").read_text())["tree_metadata"]
    self.assertEqual(tree("nnx"), tree("by_v0"))


if __name__ == "__main__":
  absltest.main()
