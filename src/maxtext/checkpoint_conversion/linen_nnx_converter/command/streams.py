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

"""Prints on streams that may be closed, full, or no longer read by anyone.

The exit code depends on what is on the disk, so a stream that cannot take a text is no failure: what standard output
cannot take goes to standard error, and what that cannot take is lost.
"""

from collections.abc import Callable, Sequence
import contextlib
import errno
import os
import pathlib
import signal
import sys
from typing import TextIO

from absl import logging

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

_TUNABLES = "GLIBC_TUNABLES"  # glibc's variable; other C libraries ignore it.


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Runs a read-only command in this process, which is its own, and exits with its code."""
  open_closed()
  set_environment()
  logging.set_verbosity(logging.FATAL)  # `main` reports failures once.
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # A clean stop, as for Ctrl-C.
  code = main(sys.argv)
  settle()
  sys.exit(code)


def tune_malloc(module: str) -> None:
  """Starts the command anew with glibc's allocator tuned, which is possible only at the start of a process.

  Large pages take a fifth off the time of streaming (2 GiB, verified: 7.6 to 6.2 s) and of comparing: the kernel clears
  them faster. With two arenas, threads share freed memory; by default each keeps its own, 0.1 to 0.2 of 0.6 GiB.

  Args:
    module: the command, if it is what this process was started for. Whoever has tuned the allocator is left alone.
  """
  # What stands before the arguments, a file or a module. `sys.argv` would also name it where a notebook runs the command.
  program = pathlib.PurePath(sys.orig_argv[max(0, len(sys.orig_argv) - len(sys.argv))])
  is_own = module in (program.parent.name, program.name.replace("-", "_").rpartition(".")[2])
  if is_own and sys.platform == "linux" and _TUNABLES not in os.environ:
    os.environ[_TUNABLES] = "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"
    with contextlib.suppress(OSError):
      os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_environment() -> None:
  """Sets the variables that a command's libraries read when they are imported."""
  # It computes next to nothing, and must not grab an accelerator that a training run may be using.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # Importing maxtext sets it to 0, and XLA would report its start.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # MaxText imports it, needlessly here.


def open_closed() -> None:
  """Opens `os.devnull` for each of the three standard streams that is closed.

  Otherwise the next opened files would get their numbers, and a checkpoint's file whatever a library writes to number 2.
  Python's standard error is opened too, because libraries write there unasked.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # It gets the lowest number that is free.
  if sys.stderr is None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def show(text: str, *, must_be_read: bool = True) -> None:
  """Prints on standard output, or else on standard error.

  Args:
    text: what to print, with any characters.
    must_be_read: whether to use standard error even if the reader of standard output, such as `head`, has left.
  """
  try:
    _write(sys.stdout, text)
  except (OSError, ValueError) as e:
    if must_be_read or not isinstance(e, BrokenPipeError):
      tell(text)


def tell(text: str) -> None:
  """Prints on standard error, if that can take it."""
  with contextlib.suppress(OSError, ValueError):
    _write(sys.stderr, text)


def write(path: str, text: str, *, flag: str, module: str, is_new: bool = False) -> bool:
  """Writes a text to the file that a flag names, and returns whether it could; if not, standard error says why.

  Args:
    path: the file.
    text: what to write.
    flag: the flag.
    module: the command.
    is_new: whether there must not be such a file yet.
  """
  try:
    with open(path, "x" if is_new else "w", encoding="utf-8") as file:
      file.write(text)
  except (OSError, ValueError) as e:
    expected, found = f"a {'new ' * is_new}file that can be written", errors.one_line(e)
    tell(f"{module}: --{flag}={path}: expected {expected}, found {found}. Give another name.")
    return False
  return True


def settle() -> None:
  """Drops what a standard stream could not take; it would fail again when the interpreter exits, with code 120."""
  for stream in (sys.stdout, sys.stderr):
    if stream is None:
      continue
    try:
      stream.flush()
    except (OSError, ValueError):
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(stream: TextIO | None, text: str):
  if stream is None:  # Closed when the interpreter started.
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
  encoding = getattr(stream, "encoding", None) or "utf-8"  # File names may not be Unicode.
  print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
