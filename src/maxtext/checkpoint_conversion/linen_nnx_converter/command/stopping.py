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

"""Stops the command at any moment, and says what is then on the disk.

The command works in a child process while its parent waits. A signal ends the child at once, whatever it is doing: an
import, MaxText's config, a compilation, an asyncio loop, a TensorStore thread. No exception has to find its way out, and
nothing still writes while the parent clears up. The disk is as `kill -9` leaves it: the old or the new target is in its
place, whole, and what was being made lies beside it. The parent removes that, and says what is there.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.command import streams
from maxtext.checkpoint_conversion.linen_nnx_converter.storage import atomic_target

STOPPED = 130  # The exit code, unless the target is there.

_SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
_REASONS = {
    signal.SIGKILL: ", as the system does when memory runs out",
    signal.SIGABRT: ", as JAX does to the others when one of several processes ends",
}
_SECONDS_TO_END = 3  # Within which JAX aborts the others when the first process ends.
_PIPE_BYTES = 2**16  # The capacity of a pipe.
_Announce = Callable[[atomic_target.Place], None]


def supervise(work: Callable[[_Announce], int]) -> int:
  """Works in a child process, which SIGHUP, SIGINT and SIGTERM stop unless this process ignores them.

  Both processes return from here, each with its exit code; whatever ends this process also ends the child.

  Args:
    work: returns an exit code. Its argument must be called with the place of a target before anything is made there.
  """
  signals = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
  signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # Until each process knows what to do with them.
  news, guard = os.pipe(), os.pipe()
  child = os.fork()
  if not child:
    os.close(guard[1])
    _obey_the_parent(signals, guard[0])
    return work(lambda place: _write_place(news[1], place))
  stopped: list[int] = []

  def stop(number, _):
    stopped.append(number)
    with contextlib.suppress(ProcessLookupError):
      os.kill(child, signal.SIGKILL)

  for number in signals:
    signal.signal(number, stop)
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
  _, status = os.waitpid(child, 0)
  for number in signals:  # A second one must not stop the clearing up.
    signal.signal(number, signal.SIG_IGN)
  code = os.waitstatus_to_exitcode(status)
  if code >= 0:
    return code  # It has reported by itself.
  place = _read_place(news[0])
  return interrupted(place) if stopped or -code in signals else _died(place, signal.Signals(-code))


def interrupted(place: atomic_target.Place | None) -> int:
  """Clears up after a stop, says what is on the disk, and returns the exit code."""
  is_there, what = left(place)
  _tell(f"interrupted: {what}")
  return 0 if is_there else STOPPED


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
  """Ignores Ctrl-C meanwhile. It only arrives in the main thread; in others this does nothing."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, handler)


def left(place: atomic_target.Place | None) -> tuple[bool, str]:
  """Clears up; returns whether the target is now there, whole, and what is at its place, in words."""
  if place is None:
    return False, "nothing was made."
  if not place.is_primary:
    return False, "the first process clears up."
  time.sleep(_SECONDS_TO_END if place.others else 0)  # They make folders anew as long as they write.
  is_there = atomic_target.is_there(place)
  try:
    atomic_target.clear_up(place)
  except (OSError, errors.ConversionError) as e:
    kept = f" What lies in {place.making} could not be removed: {errors.named(e)}."
  else:
    kept = ""
  return is_there, _standing(place, is_there) + kept


def _died(place, number: signal.Signals) -> int:
  """Reports a child that nobody stopped: memory ran out, or a library crashed. What it made stays."""
  if place is None:
    what = "nothing was made."
  elif not place.is_primary:
    what = f"the first process says what stands at {place.final}."
  else:
    is_there = atomic_target.is_there(place)
    resumable = "" if is_there else f" What it was making lies in {place.making}; --resume goes on from there."
    what = _standing(place, is_there) + resumable
  _tell(f"ended by {number.name}{_REASONS.get(number, '')}: {what}")
  return 128 + number


def _standing(place, is_there) -> str:
  if is_there:
    return f"{place.final} is there, complete."
  return f"nothing was left at {place.final}." if place.before is None else f"{place.final} is what it was."


def _tell(text):
  on_a_line_of_its_own = "\n" if sys.stderr is not None and sys.stderr.isatty() else ""  # Below a progress bar.
  streams.tell(f"{on_a_line_of_its_own}linen_nnx_converter: {errors.escaped(text)}")


def _obey_the_parent(signals, guard):
  """Leaves Ctrl-C, which the terminal sends to both, to the parent; and ends whenever the parent does."""
  for number in signals:
    signal.signal(number, signal.SIG_IGN if number == signal.SIGINT else signal.SIG_DFL)
  threading.Thread(target=_end_with, args=(guard,), daemon=True).start()
  signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _end_with(guard):
  os.read(guard, 1)  # Nobody writes: this returns when the parent's end is closed.
  os.kill(os.getpid(), signal.SIGKILL)


def _write_place(descriptor, place):
  os.write(descriptor, json.dumps(dataclasses.asdict(place)).encode() + b"\n")


def _read_place(descriptor) -> atomic_target.Place | None:
  """The last place that the child announced before it ended."""
  os.set_blocking(descriptor, False)
  try:
    lines = os.read(descriptor, _PIPE_BYTES).splitlines()
  except BlockingIOError:  # Empty, because this process also holds the other end.
    return None
  return atomic_target.Place(**json.loads(lines[-1])) if lines else None
