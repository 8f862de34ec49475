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

"""Digests of leaves: anyone can take them again, and a target alone is verified by them."""

import contextlib
import hashlib
import io
import itertools
import json
import pathlib
import shutil

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import jax
import jax.numpy as jnp
import linen_nnx_converter_util as util
import numpy as np
import orbax.checkpoint as ocp
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import __main__ as command
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader
from maxtext.checkpoint_conversion.linen_nnx_converter.verification import digests

WEIGHT = "model.decoder.layers.2.wi_0.kernel.value"


def taken_again(array, block):
  """The digest, as `digests.py` says how to take it."""
  digest = hashlib.sha256()
  for i in np.ndindex(*(-(-size // step) for size, step in zip(array.shape, block))):
    part = array[tuple(slice(n * step, (n + 1) * step) for n, step in zip(i, block))]
    digest.update(hashlib.sha256(part.tobytes()).digest())
  return digest.hexdigest()


def scanned(layers=4):
  """Scanned layers of several dtypes, incompressible so that a flipped bit stays one."""
  random = np.random.default_rng(0)
  bits = lambda dtype, *shape: np.frombuffer(random.bytes(np.prod(shape) * np.dtype(dtype).itemsize), dtype).reshape(
      shape
  )
  layer_stack = {
      "wi_0": {"kernel": bits(np.uint16, 400, layers, 130).view(jnp.bfloat16)},
      "wo": {"kernel": bits(np.uint8, 50, layers, 7).view(jnp.float8_e4m3fn), "gain": bits(np.uint32, layers)},
  }
  params = {"decoder": {"layers": layer_stack, "decoder_norm": {"scale": bits(np.int64, 3, 5)}}}
  return {"params": {"params": params}, "step": np.array(3, np.int32)}


class DigestsTest(util.CheckpointTestCase):

  def source(self, tree=None, **options):
    tree = scanned() if tree is None else tree
    save_args = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=32768), tree)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options)) as checkpointer:
      checkpointer.save(self.tmp / "source", args=ocp.args.PyTreeSave(tree, save_args))
    return self.tmp / "source"

  def converted(self, verify=True, scan_layers=False, **options):
    source = self.source(**options)
    converter.convert_checkpoint(source, self.tmp / "target", scan_layers=scan_layers, verify=verify)
    return self.tmp / "target"

  def call(self, *args):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      code = converter.main([*map(str, args)])
    return code, out.getvalue(), err.getvalue()

  def assert_damaged(self, target, *mentioned):
    code, out, err = self.call("--verify_only", f"--target_path={target}")
    self.assertEqual((code, out), (command.VERIFICATION_FAILED, ""), err)
    self.assertLen(err.splitlines(), 1)
    for text in mentioned:
      self.assertIn(text, err)

  @parameterized.product(use_ocdbt=(True, False), use_zarr3=(True, False), verify=(True, "full"))
  @pytest.mark.integration
  def test_every_digest_can_be_taken_again(self, use_ocdbt, use_zarr3, verify):
    target = self.converted(verify, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    stored = reader.Checkpoint(epath.Path(target))
    on_record = json.loads((target / digests.FILE).read_text())["leaves"]
    for path, leaf in stored.stored.items():
      if leaf.name in on_record or verify == "full":
        array, kept = stored.read(path), on_record[leaf.name]
        self.assertEqual((tuple(kept["shape"]), kept["dtype"]), (array.shape, str(array.dtype)))
        self.assertEqual(kept["sha256"], taken_again(array, kept["block"]), leaf.name)
    self.assertIn(WEIGHT, on_record)
    self.assertGreater(
        stored.stored[("model", "decoder", "layers", "2", "wi_0", "kernel", "value")].shape[0],
        on_record[WEIGHT]["block"][0],
    )
    self.assertLen(converter.verify_checkpoint(target).verified, len(on_record))

  def test_what_several_processes_have_read(self):
    """Each its own blocks of a leaf, and one of another leaf, of which a block is read by nobody."""
    leaves = {("a", "w"): util.array(6, 10), ("b",): util.array(4, 4)}
    blocks = {("a", "w"): (3, 5), ("b",): (2, 4)}
    alone, first, second = (digests.Collector(leaves, blocks) for _ in range(3))
    for i, box in enumerate(itertools.product(((0, 3), (3, 6)), ((0, 5), (5, 10)))):
      for collector in (alone, (first, second)[i % 2]):
        collector.add(("a", "w"), box, leaves["a", "w"][tuple(slice(*bounds) for bounds in box)])
    second.add(("b",), ((0, 2), (0, 4)), leaves["b",][:2])
    self.assertEmpty(first.digests() | second.digests())
    first.merge(json.loads(json.dumps(second.parts())))
    self.assertEqual(first.digests(), alone.digests())
    self.assertLen(first.digests(), 1)
    second.add(("a", "w"), ((0, 4), (0, 10)), leaves["a", "w"][:4])  # Cuts through blocks.
    first.merge(json.loads(json.dumps(second.parts())))
    self.assertEmpty(first.digests())

  def test_leaves_by_reference_have_none_unless_all_is_decoded(self):
    source = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
    by_reference = converter.convert_checkpoint(source, self.tmp / "target")
    self.assertIn("; digests of 1 of 39 leaves, --verify=full for all", by_reference.summary())
    code, out, err = self.call("--verify_only", f"--target_path={self.tmp}/target")
    self.assertEqual((code, err), (0, ""))
    self.assertRegex(
        out, r"^verified 1 of 39 leaves by their digests in .* s, 0\.0 MiB; 38 leaves have no digest and were NOT"
    )
    full = converter.convert_checkpoint(source, self.tmp / "target", overwrite=True, verify="full")
    self.assertIn("; digests of all leaves", full.summary())
    self.assertEqual(full.record()["digests"], 39)
    self.assertStartsWith(self.call("--verify_only", f"--target_path={self.tmp}/target")[1], "verified 39 of 39 leaves")

  def test_a_conversion_of_a_target_takes_digests_of_its_own(self):
    target = self.converted("full")
    converter.convert_checkpoint(target, self.tmp / "back", scan_layers=True, verify="full")
    self.assertEqual(
        set(digests.read(epath.Path(self.tmp / "back"))),
        {leaf.name for leaf in reader.Checkpoint(epath.Path(self.tmp / "back")).stored.values()},
    )
    converter.convert_checkpoint(target, self.tmp / "unverified", scan_layers=True, verify=False)
    with self.assertRaisesRegex(errors.NotACheckpointError, "Nothing was verified"):
      converter.verify_checkpoint(self.tmp / "unverified")

  def test_layers_of_different_chunks_that_are_stacked(self):
    """The boxes in which they are compared cut through the target's chunks."""
    random = np.random.default_rng(0)
    kernel = lambda: np.frombuffer(random.bytes(4 * 64 * 48), np.uint32).reshape(64, 48)
    tree = {"params": {"params": {"decoder": {f"layers_{i}": {"kernel": kernel()} for i in range(2)}}}}
    sizes = {0: 1024, 1: 1600}
    save_args = {
        "params": {
            "params": {"decoder": {f"layers_{i}": {"kernel": ocp.SaveArgs(chunk_byte_size=sizes[i])} for i in range(2)}}
        }
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
      checkpointer.save(self.tmp / "source", args=ocp.args.PyTreeSave(tree, save_args))
    shapes = [leaf.chunk_shape for leaf in reader.Checkpoint(epath.Path(self.tmp / "source")).stored.values()]
    self.assertLen(set(shapes), 2)
    converter.convert_checkpoint(self.tmp / "source", self.tmp / "target")
    self.assertEmpty(converter.verify_checkpoint(self.tmp / "target").without_digest)

  @parameterized.product(use_ocdbt=(True, False), use_zarr3=(True, False))
  @pytest.mark.integration
  def test_a_flipped_bit_is_found(self, use_ocdbt, use_zarr3):
    target = self.converted(use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    converter.verify_checkpoint(target)
    index = reader.Checkpoint(epath.Path(target)).index
    value = max((v for key, v in index.values.items() if key.startswith(WEIGHT + "/")), key=lambda value: value.nbytes)
    flip(target / value.file, value.offset + value.nbytes // 2)
    self.assert_damaged(
        target, "model/decoder/layers/2/wi_0/kernel/value: expected the digest ", "The checkpoint is damaged"
    )
    flip(target / value.file, value.offset + value.nbytes // 2)
    converter.verify_checkpoint(target)
    flip(target / value.file, value.offset)  # The magic number of its encoding.
    self.assert_damaged(target, "model/decoder/layers/2/wi_0/kernel/value: expected chunks that can be read, found ")

  def test_every_leaf_that_differs_is_named(self):
    target = self.converted()
    index = reader.Checkpoint(epath.Path(target)).index
    for i in (1, 3):
      key = next(
          k
          for k in index.values
          if k.startswith(f"model.decoder.layers.{i}.wi_0.kernel.value/") and index.values[k].inline is None
      )
      flip(target / index.values[key].file, index.values[key].offset + 1000)
    self.assert_damaged(
        target,
        "layers/1/wi_0/kernel/value: expected",
        ", and 1 more leaves that differ: model/decoder/layers/3/wi_0/kernel/value.",
    )

  @pytest.mark.integration
  def test_every_byte_of_the_small_files_matters_or_is_harmless(self):
    """A bit that flips in the tree's nodes, the manifest or the metadata: found, or nothing was changed by it."""
    target = self.converted()
    before = values(target)
    random = np.random.default_rng(7)
    small = [path for path in target.rglob("*") if path.is_file() and path.stat().st_size < 20_000]
    found = 0
    for path in sorted(small):
      for at in random.integers(0, max(1, path.stat().st_size), 4):
        flip(path, int(at))
        with self.subTest(f"{path.name} at {at}"):
          code, _, err = self.call("--verify_only", f"--target_path={target}")
          self.assertIn(code, (0, 2), err)
          self.assertLen(err.splitlines(), int(code != 0))
          if code == 0:
            self.assertEqual(values(target), before)
          found += code != 0
        flip(path, int(at))
    self.assertGreater(found, 5)

  @parameterized.parameters("truncated", "removed")
  def test_a_data_file_that_is_not_whole(self, how):
    target = self.converted()
    value = max(reader.Checkpoint(epath.Path(target)).index.values.values(), key=lambda v: (v.nbytes, v.offset))
    data = target / value.file
    data.unlink() if how == "removed" else data.write_bytes(data.read_bytes()[: value.offset + value.nbytes // 2])
    self.assert_damaged(target, "The checkpoint is damaged")

  def test_the_digests_themselves(self):
    target = self.converted()
    kept = (target / digests.FILE).read_text()
    (target / digests.FILE).write_text(kept.replace("uint32", "uint31", 1))
    self.assert_damaged(target, f"{digests.FILE}: expected the digests that were written")
    (target / digests.FILE).write_text(kept[:100])
    self.assert_damaged(target, f"{digests.FILE}: expected the digests that were written")
    (target / digests.FILE).unlink()
    code, _, err = self.call("--verify_only", f"--target_path={target}")
    self.assertEqual(code, command.REFUSED)
    self.assertIn("found none. Nothing was verified", err)
    digests.write(epath.Path(target), {})
    code, _, err = self.call("--verify_only", f"--target_path={target}")
    self.assertEqual(code, command.REFUSED)
    self.assertIn("leaves with one. Nothing was verified", err)

  def test_leaves_that_are_gone_or_of_another_shape(self):
    target = self.converted()
    kept = digests.read(epath.Path(target))
    gone = digests.Digest((2,), "float32", (2,), "0" * 64)
    other = digests.Digest((9, 9), "float32", (9, 9), "0" * 64)
    digests.write(epath.Path(target), kept | {"model.gone": gone, WEIGHT: other})
    self.assert_damaged(
        target, "expected (9, 9) float32, found (400, 130) bfloat16, and 1 more leaves that differ: model.gone"
    )

  @parameterized.named_parameters(
      ("no_target", ["--verify_only"], "--target_path: expected a path, found none"),
      (
          "a_source",
          ["--verify_only", "--target_path=x", "--source_path=y"],
          "no flag of a conversion, found --source_path",
      ),
      ("a_config", ["--verify_only", "--target_path=x", "base.yml"], "no flag of a conversion, found base.yml"),
      ("nothing_there", ["--verify_only", "--target_path=/nowhere"], "found nothing. Check --target_path."),
  )
  def test_a_refusal(self, args, message):
    code, out, err = self.call(*args)
    self.assertEqual((code, out), (command.REFUSED, ""))
    self.assertIn(message, err)
    self.assertLen(err.splitlines(), 1)

  def test_orbax_restores_a_step_with_the_file_of_digests(self):
    shutil.copytree(util.FIXTURES / "maxtext-0.2.4" / "linen_scan", self.tmp / "source")
    converter.convert_checkpoint(self.tmp / "source", self.tmp / "target", verify="full")
    self.assertTrue((self.tmp / "target" / "2" / "items" / digests.FILE).exists())
    with ocp.CheckpointManager(self.tmp / "target", item_names=("items",)) as manager:
      self.assertEqual(manager.latest_step(), 2)
      restored = manager.restore(2, args=ocp.args.Composite(items=ocp.args.PyTreeRestore()))["items"]
    self.assertEqual(util.flat(restored), util.flat(converter.load_checkpoint(self.tmp / "target")))


def flip(path: pathlib.Path, at: int):
  """Flips a bit of a file, which others may be linked to."""
  content = bytearray(path.read_bytes())
  content[at] ^= 16
  path.unlink()
  path.write_bytes(content)


def values(folder):
  stored = reader.Checkpoint(epath.Path(folder))
  return {path: util.bits(stored.read(path)) for path in stored.stored}


if __name__ == "__main__":
  absltest.main()
