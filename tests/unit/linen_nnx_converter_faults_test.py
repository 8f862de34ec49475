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

"""What happens to disks, files and processes: one clear line, nothing at the target, and the source as it was."""

import contextlib
import itertools
import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
import jax
from linen_nnx_converter_faulty_sources import FaultTestCase
from linen_nnx_converter_faulty_sources import params
from linen_nnx_converter_faulty_sources import SCAN
from linen_nnx_converter_faulty_sources import scanned
from linen_nnx_converter_faulty_sources import UNSCAN
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import folders
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import ocdbt_index
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import reader

MODULE = "maxtext.checkpoint_conversion.linen_nnx_converter"
FORMATS = tuple(itertools.product((True, False), (True, False)))  # use_ocdbt, use_zarr3.


@pytest.mark.integration
class DiskTest(FaultTestCase):
  """Disks that are full or cannot be written."""

  @contextlib.contextmanager
  def small_disk(self, mebibytes):
    """A file system of this size."""
    folder = pathlib.Path(tempfile.mkdtemp()).resolve()
    self.addCleanup(shutil.rmtree, folder)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(mebibytes * 1024)}k", "tmpfs", folder]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
      self.skipTest("needs the right to mount a file system")
    try:
      yield folder
    finally:
      subprocess.run(["umount", folder], check=True)

  @parameterized.parameters(*itertools.product(FORMATS, (SCAN, UNSCAN)))
  def test_a_full_disk(self, way, options):
    """Copies of data files, and chunks that are encoded anew."""
    use_ocdbt, use_zarr3 = way
    tree = {"params": {"params": params(12)}} if options is SCAN else scanned()
    source = self.save("source", tree, use_ocdbt=use_ocdbt, use_zarr3=use_zarr3)
    size = sum(p.stat().st_size for p in source.rglob("*")) / 2**20
    before = util.snapshot(source)
    with self.small_disk(max(0.25, size / 4)) as disk:
      done = run(source, disk / "out", *(["--noscan_layers"] if options is UNSCAN else []))
      self.assertEqual((done.returncode, done.stdout), (1, ""))
      self.assertLen(done.stderr.splitlines(), 1, done.stderr)
      self.assertRegex(done.stderr, f"^linen_nnx_converter: {disk}.*No space left on device.*Nothing was left at {disk}")
      self.assertEqual(os.listdir(disk), [])
    self.assertEqual(util.snapshot(source), before)

  def test_a_quota_on_the_size_of_files(self):
    source = self.save("scanned", scanned())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))
    done = run(source, self.tmp / "out", "--noscan_layers", preexec_fn=limit)
    self.assertEqual((done.returncode, done.stdout), (1, ""), done.stderr)
    self.assertLen(done.stderr.splitlines(), 1, done.stderr)
    self.assertRegex(done.stderr, "File too large")
    self.assert_nothing_left("unscanned", "scanned")

  def test_a_read_only_disk(self):
    with self.small_disk(8) as disk:
      subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
      done = run(self.source, disk / "out")
      self.assertEqual(done.returncode, 1)
      self.assertLen(done.stderr.splitlines(), 1, done.stderr)
      self.assertRegex(done.stderr, "a place that can be written|Read-only file system")

  def test_a_folder_that_cannot_be_removed(self):
    """Why is said: not every file comes back."""
    self.enterContext(absltest.mock.patch.object(folders, "_REMOVALS", 2))
    said = "expected to be removed, found OSError: .*resource busy"
    with self.small_disk(1) as disk, self.assertRaisesRegex(errors.TargetError, f"{disk}: {said}"):
      folders.remove(epath.Path(disk))


def run(source, target, *options, **kwargs):
  """Runs the command in a process of its own."""
  command = [sys.executable, "-m", MODULE, f"--source_path={source}", f"--target_path={target}", *options]
  return subprocess.run(command, capture_output=True, text=True, check=False, **kwargs)


class DamageTest(FaultTestCase):
  """Files of the source that are gone, cut short, or changed by a bit."""

  @parameterized.parameters(*itertools.product(FORMATS, (SCAN, UNSCAN)))
  @pytest.mark.integration
  def test_a_truncated_file(self, way, options):
    source = self.save("damaged", {"params": {"params": params()}}, use_ocdbt=way[0], use_zarr3=way[1])
    largest = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    if way[0]:
      self.assert_refused(errors.DamagedSourceError, "should have at least .* bytes, found", source, **options)
    else:  # Without OCDBT nothing says how long a chunk is: its decoder does.
      self.assert_refused(
          errors.ConversionError,
          "decoder/layers_2/w.*: expected chunks that can be read",
          source,
          verify="full",
          **options,
      )

  @parameterized.product(use_zarr3=(True, False), options=(SCAN, UNSCAN))
  def test_an_empty_chunk_file(self, use_zarr3, options):
    """Such as a crash of the machine leaves. No decoder is needed to see that it holds nothing."""
    source = self.save("damaged", {"params": {"params": params()}}, use_ocdbt=False, use_zarr3=use_zarr3)
    largest = max((p for p in source.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    os.truncate(largest, 0)
    name = re.escape(os.fspath(largest.relative_to(source)))
    self.assert_refused(errors.DamagedSourceError, f"expected a chunk at {name}, found 0 bytes", source, **options)

  def test_a_file_that_is_cut_short_when_its_length_was_looked_up(self):
    index = reader.Checkpoint(epath.Path(self.source)).index
    value = next(value for value in index.values.values() if value.inline is None)
    file, where = epath.Path(self.source) / value.file, (value.offset, value.nbytes)
    self.assertLen(ocdbt_index.read_range(file, *where), value.nbytes)
    os.truncate(file, value.offset + 1)
    with self.assertRaisesRegex(errors.DamagedSourceError, "expected [0-9]+ bytes from [0-9]+ on, found 1. "):
      ocdbt_index.read_range(file, *where)
    os.unlink(file)
    with self.assertRaisesRegex(errors.DamagedSourceError, "expected [0-9]+ bytes from [0-9]+ on, found 0. "):
      ocdbt_index.read_range(file, *where)

  @parameterized.parameters("manifest.ocdbt", "_METADATA", "_sharding", "array_metadatas/process_0")
  @pytest.mark.integration
  def test_a_flipped_bit_in_metadata(self, name):
    """Refused, or without effect: never another result."""
    source = self.save("source", {"params": {"params": jax_params()}})
    expected = util.flat(converter.load_checkpoint(self._converted(source, "expected")))
    whole = (source / name).read_bytes()
    random = np.random.default_rng(1)
    outcomes = {}
    for number in range(40):
      damaged = bytearray(whole)
      damaged[random.integers(len(whole))] ^= 1 << random.integers(8)
      (source / name).write_bytes(damaged)
      try:
        target = self._converted(source, f"target_{number}")
      except errors.ConversionError as e:
        outcomes[type(e).__name__] = outcomes.get(type(e).__name__, 0) + 1
        self.assertLen(str(e).splitlines(), 1)
        self.assertFalse((self.tmp / f"target_{number}").exists())
      else:
        self.assertEqual(util.flat(converter.load_checkpoint(target)), expected)
        shutil.rmtree(target)
    if name in ("manifest.ocdbt", "_METADATA"):
      self.assertNotEmpty(outcomes)

  def _converted(self, source, name):
    converter.convert_checkpoint(source, self.tmp / name)
    return self.tmp / name

  def test_a_flipped_bit_in_a_node_of_the_tree(self):
    """Nodes have checksums."""
    index = reader.Checkpoint(epath.Path(self.source)).index
    for file in index.tree_files:
      path = self.source / file
      whole = path.read_bytes()
      for place in range(0, len(whole), max(1, len(whole) // 16)):
        path.write_bytes(flipped(whole, place))
        self.assert_refused(errors.UnfinishedCheckpointError, "expected metadata that Orbax can read, found .*")
      path.write_bytes(whole)

  def test_an_array_that_the_metadata_do_not_name(self):
    """A lost line of `_METADATA` is no reason to lose an array."""
    document = json.loads((self.source / "_METADATA").read_text())
    lost = next(key for key in document["tree_metadata"] if "layers_1" in key and "wo" in key)
    del document["tree_metadata"][lost]
    (self.source / "_METADATA").write_text(json.dumps(document))
    self.assert_refused(
        errors.DamagedSourceError, r"params.params.decoder.layers_1.wo: expected a leaf in _METADATA, for in the store"
    )


def flipped(content, place):
  content = bytearray(content)
  content[place] ^= 1
  return bytes(content)


def jax_params():
  return jax.tree.map(jax.numpy.asarray, params(2))


if __name__ == "__main__":
  absltest.main()
