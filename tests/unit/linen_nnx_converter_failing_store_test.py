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

"""Google Cloud Storage that fails: once, thrice, for ever; and a conversion there that is killed."""

import asyncio
import itertools
import subprocess
import sys
import time
import types

from absl.testing import absltest
from absl.testing import parameterized
from etils import epath
from gcsfs import retry
import linen_nnx_converter_cloud as cloud_lib
import linen_nnx_converter_util as util
import pytest
import tensorstore as ts

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

SOURCE = util.FIXTURES / "maxtext-0.2.4" / "linen_scan"
PLAIN = {"direction": "nnx_to_nnx", "nnx_values": "plain"}
SLICED = {"direction": "nnx_to_nnx", "scan_layers": False}
RAW = PLAIN | {"target_data_file_size": 2**30}
KINDS = (cloud_lib.LIST, cloud_lib.STAT, cloud_lib.READ, cloud_lib.UPLOAD, cloud_lib.COPY, cloud_lib.DELETE)
FAILURES = (503, 429, cloud_lib.CLOSED)
KILLED = """
import sys
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
converter.convert_checkpoint("gs://bucket/nnx", sys.argv[1], direction="nnx_to_nnx", scan_layers=False)
"""

_sleep, _Context = asyncio.sleep, ts.Context


async def _doze(seconds):
  await _sleep(seconds / 1000)


def _context(spec=None, parent=None):
  """A context whose retries are as many as gcsfs has, and as quick."""
  quick = {"max_retries": 5, "initial_delay": "1ms", "max_delay": "32ms"}
  return _Context({**(spec or {}), "gcs_request_retries": quick}, parent)


class FailingStoreTest(util.CheckpointTestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.cloud = cls.enterClassContext(cloud_lib.Cloud().serving())
    converter.convert_checkpoint(SOURCE, "gs://bucket/nnx")

  def setUp(self):
    super().setUp()
    # Not the tries, but the time between them.
    self.enter_context(absltest.mock.patch.object(retry, "asyncio", types.SimpleNamespace(sleep=_doze)))
    self.enter_context(absltest.mock.patch.object(ts, "Context", _context))

  def names(self, name):
    """What is in the bucket, or here, under a name or one that begins so."""
    return [item["name"] for item in self.cloud.storage.get_file_list("bucket", name)[0]]

  @parameterized.parameters(*zip(KINDS, itertools.cycle(FAILURES)))
  def test_it_recovers(self, kind, status):
    with self.cloud.failing(kind, times=3, status=status) as failure:
      self.assertTrue(converter.convert_checkpoint("gs://bucket/nnx", f"gs://bucket/recovered_{kind}", **PLAIN).verified)
      self.assertEqual(failure.times, 0)

  @parameterized.parameters(*itertools.product(KINDS, FAILURES))
  @pytest.mark.integration
  def test_any_conversion_recovers(self, kind, status):
    nnx = "gs://bucket/nnx"
    jobs = {"up": (SOURCE, {}), "raw": (nnx, RAW), "sliced": (nnx, SLICED)}
    for name, (source, options) in jobs.items():
      with self.subTest(name), self.cloud.failing(kind, after=4, times=4, status=status):
        target = f"gs://bucket/{name}_{kind}_{status}"
        self.assertTrue(converter.convert_checkpoint(source, target, **options).verified)
    with self.cloud.failing(kind, after=4, times=4, status=status):
      self.assertTrue(converter.convert_checkpoint(nnx, self.tmp / "out", **SLICED).verified)

  @parameterized.parameters(*itertools.product(KINDS[:-1], (0, 3)))
  def test_it_fails_for_good(self, kind, after):
    """One line, and nothing is left."""
    target = f"failed_{kind}_{after}"
    with (
        self.cloud.failing(kind, after=after, status=503 if after else cloud_lib.CLOSED),
        self.assertRaisesRegex(errors.AccessError, "^gs://bucket/.* expected .*, found .*try again.$") as raised,
    ):
      converter.convert_checkpoint("gs://bucket/nnx", f"gs://bucket/{target}", **PLAIN)
    self.assertLen(str(raised.exception).splitlines(), 1)
    self.assertEmpty(self.names(target))

  def test_what_cannot_be_removed_is_named(self):
    with (
        self.cloud.failing(cloud_lib.DELETE),
        self.assertRaisesRegex(
            errors.TargetError, "^gs://bucket/stays/2: expected to be removed, .* remove it by hand.$"
        ),
    ):
      converter.convert_checkpoint("gs://bucket/nnx", "gs://bucket/stays", **PLAIN)
    self.assertNotIn("stays/2/commit_success.txt", self.names("stays"))

  def test_what_is_read_alone(self):
    for call in (converter.verify_checkpoint, converter.load_checkpoint):
      with (
          self.cloud.failing(cloud_lib.READ, after=4),
          self.assertRaisesRegex(errors.AccessError, "gs://bucket/nnx.* expected .* found .*try again.$"),
      ):
        call("gs://bucket/nnx")

  @parameterized.parameters(8, 16, 28)
  @pytest.mark.integration
  def test_a_killed_conversion_is_resumed(self, uploads):
    """Nothing counts as finished; another run is refused, and one that resumes takes what there is."""
    target = f"gs://bucket/killed_{uploads}"
    with self.cloud.counted() as count:
      self.cloud.seconds = 0.02
      run = subprocess.Popen([sys.executable, "-c", KILLED, target], stderr=subprocess.PIPE)
      while count.requests[cloud_lib.UPLOAD] < uploads and run.poll() is None:
        time.sleep(0.002)
      run.kill()
      self.assertEqual(run.wait(), -9, run.stderr.read())
      self.cloud.seconds = 0.0
    self.assertFalse((epath.Path(target) / "2" / "commit_success.txt").exists())
    with self.assertRaisesRegex(
        errors.TargetError, f"{target}/2: .* found what a conversion .* go on from there with --resume"
    ):
      converter.convert_checkpoint("gs://bucket/nnx", target, **SLICED)
    done = converter.convert_checkpoint("gs://bucket/nnx", target, resume=True, **SLICED)
    self.assertTrue(done.verified)
    self.assertRegex(
        done.resumed, "nothing to resume, for no leaf" if uploads == 8 else "108 leaves taken from the interr"
    )
    self.assertEmpty([name for name in self.names(f"killed_{uploads}") if ".orbax-checkpoint-tmp" in name])
    loaded = [converter.load_checkpoint(path) for path in (target, self._sliced())]
    self.assertEqual(*map(util.flat, loaded))

  def _sliced(self):
    converter.convert_checkpoint("gs://bucket/nnx", self.tmp / "sliced", **SLICED)
    return self.tmp / "sliced"


if __name__ == "__main__":
  absltest.main()
