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

"""Everything works where an event loop runs already, as in Jupyter and Colab."""

import asyncio
import contextvars
import os
import signal

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_util as util
import pytest

from maxtext.checkpoint_conversion import linen_nnx_comparator as comparator
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import progress
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import coroutines

STREAMED, BY_REFERENCE = {"scan_layers": False}, {"direction": "linen_to_linen"}


def scanned():
  tree = util.linen(util.unscanned_params())
  return converter.convert_nnx_to_linen(converter.convert_linen_to_nnx(tree, scan_layers=True))


class InARunningLoop(util.CheckpointTestCase):
  """Runs each test inside a loop that was started as Jupyter starts its own, so that Ctrl-C raises KeyboardInterrupt."""

  def _callTestMethod(self, method):
    async def inside():
      super(InARunningLoop, self)._callTestMethod(method)

    loop = asyncio.new_event_loop()
    try:
      loop.run_until_complete(inside())
    finally:
      loop.close()

  def interrupt(self, *_):
    """Ctrl-C."""
    os.kill(os.getpid(), signal.SIGINT)


class Unprintable:

  def __repr__(self):
    raise AssertionError("printed for nobody")


class CoroutinesTest(absltest.TestCase):

  def test_a_result_is_not_printed(self):
    """As asyncio's own `run` does when it is done; an index of 20,000 leaves takes it half a second."""

    async def made():
      return Unprintable()

    self.assertIsInstance(coroutines.run(made()), Unprintable)


class EventLoopTest(InARunningLoop):

  @parameterized.parameters((True, STREAMED), (True, BY_REFERENCE), (False, STREAMED))
  @pytest.mark.integration
  def test_convert_verify_load_compare(self, use_ocdbt, options):
    source = self.save("source", scanned(), use_ocdbt=use_ocdbt)
    self.assertTrue(
        converter.convert_checkpoint(source, self.tmp / "out", verify="full", resume=True, **options).verified
    )
    self.assertEqual(converter.verify_checkpoint(self.tmp / "out").without_digest, ())
    self.assertTrue(comparator.compare_checkpoints(source, self.tmp / "out").is_accepted)
    converter.save_checkpoint(converter.load_checkpoint(self.tmp / "out"), self.tmp / "saved")
    self.assertTrue(comparator.compare_checkpoints(source, self.tmp / "saved").is_accepted)

  def test_a_failure_inside_leaves_nothing(self):
    source = self.save("source", scanned(), use_ocdbt=False)
    chunk = source / "params.params.decoder.layers.mlp.wi_0.kernel" / "0.0.0"
    chunk.write_bytes(b"\0" * chunk.stat().st_size)
    with self.assertRaisesRegex(errors.DamagedSourceError, "layers/mlp/wi_0/kernel: expected chunks that can be read"):
      converter.convert_checkpoint(source, self.tmp / "out", **STREAMED)
    self.assert_nothing_left("source")

  @parameterized.parameters("writing", "verifying")
  # Ctrl-C ends the loop, Orbax's too, in the middle of what TensorStore does.
  @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine .* was never awaited")
  def test_ctrl_c_leaves_nothing(self, phase):
    source = self.save("source", scanned())
    told = progress.Progress()
    told.start = lambda now, _: setattr(told, "advance", self.interrupt if now == phase else lambda _: None)
    with self.assertRaises(KeyboardInterrupt):
      converter.convert_checkpoint(source, self.tmp / "out", verify="full", progress=told, **STREAMED)
    self.assert_nothing_left("source")


class RunTest(InARunningLoop):

  def test_results_exceptions_and_context(self):
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("set")

    async def value():
      return variable.get()

    async def failure():
      raise KeyError("as it is")

    self.assertEqual(coroutines.run(value()), "set")
    with self.assertRaisesRegex(KeyError, "as it is"):
      coroutines.run(failure())

  def test_ctrl_c_cancels(self):
    ended = []

    async def wait():
      try:
        asyncio.get_running_loop().call_later(0.1, self.interrupt)
        await asyncio.sleep(60)
      finally:
        ended.append(True)

    with self.assertRaises(KeyboardInterrupt):
      coroutines.run(wait())
    self.assertEqual(ended, [True])


class WithoutALoopTest(absltest.TestCase):

  def test_no_text_is_made_of_a_result(self):
    """An index of a million keys took longer to print, for an error that `asyncio` drops, than to read."""

    printed = []

    class Large:

      def __repr__(self):
        printed.append("Large")
        return ""

    async def large():
      return Large()

    coroutines.run(large())
    self.assertEmpty(printed)


if __name__ == "__main__":
  absltest.main()
