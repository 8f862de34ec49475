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

"""What is asked of Google Cloud Storage: how often, for how many bytes, and whether `--dry_run` knows."""

from absl.testing import absltest
import linen_nnx_converter_cloud as cloud_lib
import linen_nnx_converter_util as util
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion import linen_nnx_inspector as inspector
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.copying import transfers
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import source_files

PLAIN = {"direction": "nnx_to_nnx", "nnx_values": "plain"}
RAW = PLAIN | {"target_data_file_size": 2**30}
OTHER_CHUNKS = {"direction": "nnx_to_nnx", "chunk_byte_size": 2**16}
# What an estimate may be off: a few requests of few, and bytes of metadata, which it does not count; shares of requests,
# and of bytes. TensorStore reads together what is wanted at the same time: of one conversion in small chunks, 202 to 358
# requests were seen.
FEW, METADATA = 10, 2**19
SHARES, STREAMED_SHARES = (0.25, 0.02), (0.5, 0.2)


class RequestsTest(util.CheckpointTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cloud = cls.enterClassContext(cloud_lib.Cloud().serving())

  def saved(self, name, layers, elements):
    """Saves a state of unscanned layers there, and returns its URL and its bytes."""
    random = np.random.default_rng(0)
    layer = lambda: {"kernel": random.standard_normal((elements // 64, 64), np.float32)}
    params = {"decoder": {f"layers_{i}": layer() for i in range(layers)}}
    source = self.save(name, util.linen(params, count=1))
    converter.convert_checkpoint(source, f"gs://bucket/{name}", scan_layers=False)
    return f"gs://bucket/{name}", 3 * 4 * layers * elements

  def counted(self, function, *arguments, **options) -> cloud_lib.Count:
    with self.cloud.counted() as count:
      function(*arguments, **options)
    return count

  def test_names_take_no_request_for_each(self):
    """An object of the source is read or copied; whether it is there, and how large, the list of all has said."""
    counts = []
    for layers in (5, 50):
      source, _ = self.saved(f"of_{layers}", layers, 64)
      target = f"{source}_plain"
      dry = self.counted(converter.convert_checkpoint, source, target, dry_run=True, **PLAIN)
      done = self.counted(converter.convert_checkpoint, source, target, **PLAIN)
      look = self.counted(inspector.inspect_checkpoint, source)
      local = self.counted(converter.convert_checkpoint, source, self.tmp / f"local_{layers}")
      verified = self.counted(converter.verify_checkpoint, source)
      counts.append([sum(count.requests.values()) for count in (dry, done, look, local, verified)])
      asked = {name for count in (dry, done, look, local) for kind, name in count.names if kind == cloud_lib.STAT}
      self.assertEmpty([name for name in asked if name.startswith(f"of_{layers}/items/")])
    for few, many in zip(*counts):
      self.assertLess(many, 1.25 * few)
    for most, counted in zip((30, 150, 45, 50, 60), counts[1]):
      self.assertLess(counted, most)

  @pytest.mark.integration
  def test_dry_run_knows(self):
    """Within those shares, of a checkpoint of 48 MiB."""
    source, _ = self.saved("source", 64, 2**16)
    for number, (options, place) in enumerate(
        (
            *((options, source) for options in (PLAIN, PLAIN | {"verify": False}, RAW, OTHER_CHUNKS, PLAIN)),
            ({"scan_layers": False}, self.tmp / "source"),
        )
    ):
      target = self.tmp / "out" if number == 4 else f"gs://bucket/target_{number}"
      with self.subTest(f"{options} {place} {target}"):
        self._assert_known(place, target, options)

  def _assert_known(self, source, target, options):
    estimates, real = [], transfers.estimate

    def estimate(*arguments):
      estimates.append(real(*arguments))
      return estimates[0]

    with absltest.mock.patch.object(transfers, "estimate", estimate):
      cost = converter.convert_checkpoint(source, target, dry_run=True, **options).cost
    self.assertRegex(cost, "; about [0-9]+ requests to gs://, [0-9.]+ [a-zA-Z]+ read, .* written, .* copied by the store")
    count, (found,) = self.counted(converter.convert_checkpoint, source, target, **options), estimates
    requests = sum(count.requests.values())
    of_requests, of_bytes = STREAMED_SHARES if options == OTHER_CHUNKS else SHARES
    self.assertAlmostEqual(found.requests, requests, delta=max(FEW, of_requests * requests))
    for kind, expected in (
        (cloud_lib.READ, found.read),
        (cloud_lib.UPLOAD, found.written),
        (cloud_lib.COPY, found.copied),
    ):
      self.assertAlmostEqual(count.nbytes[kind], expected, delta=of_bytes * expected + METADATA, msg=kind)

  def test_files_are_copied_by_the_server_and_in_parallel(self):
    source, nbytes = self.saved("many_files", 8, 2**12)
    converter.convert_checkpoint(source, "gs://bucket/files", use_ocdbt=False, **PLAIN | {"nnx_values": "boxed"})
    self.cloud.seconds = 0.02
    count = self.counted(converter.convert_checkpoint, "gs://bucket/files", "gs://bucket/others", **PLAIN)
    self.cloud.seconds = 0.0
    self.assertGreater(count.nbytes[cloud_lib.COPY], 0.9 * nbytes)  # It shrinks a little.
    self.assertLess(count.nbytes[cloud_lib.READ], nbytes / 2)
    self.assertGreater(count.most_at_once, 16)

  def test_what_is_uploaded_and_downloaded_is_not_read_again(self):
    """Checksums that the store keeps verify it, against those that are taken here."""
    source, nbytes = self.saved("once", 8, 2**14)
    count = self.counted(converter.convert_checkpoint, self.tmp / "once", "gs://bucket/up", scan_layers=False)
    self.assertLess(count.nbytes[cloud_lib.READ], nbytes / 8)
    count = self.counted(converter.convert_checkpoint, source, self.tmp / "down", **PLAIN)
    self.assertAlmostEqual(count.nbytes[cloud_lib.READ], nbytes, delta=nbytes / 8)

  def test_a_source_that_changes_meanwhile(self):
    source, _ = self.saved("changing", 2, 64)
    real = source_files.check_unchanged

    def check(folder, stamps):
      (folder / "_METADATA").write_text((folder / "_METADATA").read_text())
      real(folder, stamps)

    with (
        absltest.mock.patch.object(source_files, "check_unchanged", check),
        self.assertRaisesRegex(errors.SourceChangedError, "changing/_METADATA: .* found another one"),
    ):
      converter.convert_checkpoint(source, "gs://bucket/never", **PLAIN)
    self.assertEmpty(self.cloud.storage.get_file_list("bucket", "never")[0])


if __name__ == "__main__":
  absltest.main()
