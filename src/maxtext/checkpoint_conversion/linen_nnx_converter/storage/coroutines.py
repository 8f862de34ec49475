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

"""Runs coroutines to completion, even where an event loop is already running, as in Jupyter and Colab."""

import asyncio
from collections.abc import Awaitable, Coroutine, Iterable
from concurrent import futures
import contextlib
import contextvars
from typing import Any


def run[T](coroutine: Coroutine[Any, Any, T]) -> T:
  """Like `asyncio.run`, but in a thread of its own if a loop is running in this one, which waits."""
  result = []

  async def keep():
    result.append(await coroutine)  # Not in the task, whose `repr`, which asyncio makes, includes its result.

  _run(keep())
  return result[0]


def _run(coroutine):
  try:
    asyncio.get_running_loop()
  except RuntimeError:
    asyncio.run(coroutine)
    return
  loop = asyncio.new_event_loop()
  with futures.ThreadPoolExecutor(1) as executor:
    future = executor.submit(contextvars.copy_context().run, _run_on, loop, coroutine)
    try:
      future.result()
    except BaseException:  # Ctrl-C, raised only in the main thread; otherwise all is done.
      with contextlib.suppress(RuntimeError):  # The loop has been closed.
        loop.call_soon_threadsafe(_cancel_all, loop)
      raise


async def settle(awaitables: Iterable[Awaitable[Any]]) -> list[Any]:
  """Waits for all, and then raises the first failure, if any.

  TensorStore operations that are still running when their event loop closes complain on standard error.
  """
  results = await asyncio.gather(*awaitables, return_exceptions=True)
  for result in results:
    if isinstance(result, BaseException):
      raise result
  return results


def _run_on(loop, coroutine):
  with asyncio.Runner(loop_factory=lambda: loop) as runner:
    runner.run(coroutine)


def _cancel_all(loop):
  for task in asyncio.all_tasks(loop):
    task.cancel()
