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

"""Forks in which the campaign runs a conversion, and what is done to them."""

from collections.abc import Callable
import os
import pathlib
import signal
import sys
import time

from maxtext.checkpoint_conversion.linen_nnx_converter import __main__ as command

_OPERATIONS = frozenset({"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "shutil.copyfile"})
SECONDS = 120  # After which a conversion hangs.
_FAILED = 99


def fork(function: Callable[[], int], log: pathlib.Path, prepare: Callable[[], None] = lambda: None) -> int:
  """Runs a function in a fork, whose exit code it returns, its output in a file. Returns the process's id.

  Args:
    function: what to run.
    log: the file.
    prepare: is run first, while no signal can come.
  """
  assert len(os.listdir("/proc/self/task")) == 1, "this process has threads"
  signals = {signal.SIGINT, signal.SIGTERM}
  signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # Until the fork can tell what it is stopped at.
  if pid := os.fork():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return pid
  code = _FAILED
  try:
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for number in signals:  # Even if the campaign runs in the background, where SIGINT is ignored.
      signal.signal(number, signal.default_int_handler)
    prepare()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    code = function()
    sys.stdout.flush()
  except KeyboardInterrupt:  # Before the command began.
    code = command.INTERRUPTED
  finally:
    os._exit(code)


def wait(pid: int) -> int:
  """The exit code of a fork; one that does not end is killed, which is a loss where it was not meant to be."""
  end = time.monotonic() + SECONDS
  while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0):
    time.sleep(0.002)
    if time.monotonic() > end:
      os.kill(pid, signal.SIGABRT)
  return os.waitstatus_to_exitcode(ended[1])


def kill(pid: int):
  """Kills a command by `kill -9`, and returns when the process in which it works has ended too."""
  os.kill(pid, signal.SIGSTOP)
  while (state := state_of(pid)) not in (None, "T", "Z"):
    time.sleep(0.001)
  children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split() if state == "T" else []
  os.kill(pid, signal.SIGKILL)
  end = time.monotonic() + SECONDS
  while any(state_of(child) not in (None, "Z") for child in children):
    time.sleep(0.002)
    assert time.monotonic() < end, "the command goes on without its parent"


def state_of(pid) -> str | None:
  """The state of a process, as `ps` has it; None if there is none."""
  try:
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
  except (FileNotFoundError, ProcessLookupError):
    return None


def ignore_ctrl_c():
  """As a shell does without job control before it starts a background job."""
  signal.signal(signal.SIGINT, signal.SIG_IGN)


def make_deaf(at: float):
  """Closes standard output or standard error or both, or fills them."""
  for number in ((1,), (2,), (1, 2))[int(at * 1000) % 3]:
    if int(at * 3000) % 2:
      os.close(number)
      # As the interpreter finds them when it starts.
      setattr(sys, {1: "stdout", 2: "stderr"}[number], None)
    else:
      os.dup2(os.open("/dev/full", os.O_WRONLY), number)


def count_operations(folder: str, stop_at: int | None) -> list[int]:
  """Counts this process's file operations below a folder, and kills it before the one with this number."""
  count = [0]

  def hook(event, args):
    if event in _OPERATIONS and any(
        isinstance(arg, (str, bytes)) and os.fsdecode(arg).startswith(folder) for arg in args
    ):
      if count[0] == stop_at:
        os.kill(os.getpid(), signal.SIGKILL)
      count[0] += 1

  sys.addaudithook(hook)
  return count
