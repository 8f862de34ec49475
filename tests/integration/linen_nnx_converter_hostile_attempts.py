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

"""How hostile checkpoints are tried: each in a process of its own, watched."""

import json
import multiprocessing
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np

sys.path.append(str(pathlib.Path(__file__).parents[1] / "unit"))
import linen_nnx_converter_util as util  # pylint: disable=wrong-import-position

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
_SECONDS, _MEMORY = 60, 6 * 2**30  # Of address space, of which an idle process takes 4 GiB.
# Forks of a server that has imported everything and started no thread.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["maxtext.checkpoint_conversion.linen_nnx_converter.conversion", __name__])


def _attempt(source, target, secret, options, connection):
  """Converts under a limit of memory, and sends what was said, and what was opened below `secret`."""
  resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
  opened = []

  def hook(event, args):
    if event in ("open", "os.link", "shutil.copyfile"):
      paths = [os.path.realpath(arg) for arg in args if isinstance(arg, str)]
      opened.extend(path for path in paths if path.startswith(secret))

  sys.addaudithook(hook)
  try:
    converter.convert_checkpoint(source, target, **options)
    said = "converted"
  except errors.ConversionError as e:
    said = f"{type(e).__name__}: {e}"
  except BaseException as e:  # pylint: disable=broad-except
    said = f"not refused: {type(e).__name__}: {e}"
  connection.send((said, opened))


class HostileTestCase(util.CheckpointTestCase):

  def setUp(self):
    super().setUp()
    self.outside = self.tmp / "outside"
    self.outside.mkdir()
    (self.outside / "secret").write_text("secret")

  def source(self, **options):
    params = {"decoder": {f"layers_{i}": {"w": np.arange(2000.0).reshape(20, 100) + i} for i in range(2)}}
    return self.save("source", {"params": {"params": params}, "step": np.array(1, np.int32)}, **options)

  def attempt(self, source, **options) -> str:
    """Converts in a process of its own, and returns what it says, when nothing but the target has changed."""
    before = util.snapshot(self.outside), util.snapshot(source)
    receiver, sender = _SERVER.Pipe(duplex=False)
    arguments = str(source), str(self.tmp / "target"), os.path.realpath(self.outside), options, sender
    process = _SERVER.Process(target=_attempt, args=arguments)
    process.start()
    sender.close()
    try:
      self.assertTrue(receiver.poll(_SECONDS), f"nothing said in {_SECONDS} s")
      said, opened = receiver.recv()
    finally:
      process.kill()
      process.join()
    self.assertEqual(opened, [])
    self.assertNotStartsWith(said, "not refused")
    self.assertEqual((util.snapshot(self.outside), util.snapshot(source)), before)
    self.assertContainsSubset(os.listdir(self.tmp), {"outside", "source", "target"})
    self.assertLen(said.splitlines(), 1)
    self.assertEqual((self.tmp / "target").exists(), said == "converted")
    for path in (self.tmp / "target").rglob("*"):
      self.assertFalse(path.is_symlink())
      self.assertNotIn(b"secret", path.read_bytes() if path.is_file() else b"")
    return said

  def edit(self, path: pathlib.Path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def remove(path: pathlib.Path):
  subprocess.run(["rm", "-rf", path], check=True)
