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

"""What a command prints, on streams that may be closed, full, or read by nobody any more.

What is on the disk decides the exit code. So a stream that cannot take a text is no failure: what standard output cannot
take goes to standard error, and what that cannot take is lost.
"""

from collections.abc import Callable, Sequence
import contextlib
import errno
import os
import signal
import sys
from typing import TextIO

from absl import logging


def run(main: Callable[[Sequence[str]], int]) -> None:
  """Runs a command that only reads, in a process of its own, and exits with its code."""
  open_closed()
  set_environment()
  logging.set_verbosity(logging.FATAL)  # What goes wrong is said once, by `main`.
  signal.signal(signal.SIGTERM, signal.default_int_handler)  # A clean stop, as for Ctrl-C.
  code = main(sys.argv)
  settle()
  sys.exit(code)


def set_environment() -> None:
  """Sets what the libraries of a command look for when they are imported."""
  # It computes next to nothing: it must not take hold of an accelerator that a training run may be using.
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "1"  # Importing maxtext sets it to 0, and XLA would talk of its start.
  os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # MaxText imports it, to no use here.


def open_closed() -> None:
  """Opens `os.devnull` for each of the three standard streams that is closed.

  The next files that are opened would get their numbers, and a checkpoint's file what a library writes to number 2. For
  Python, standard error is open then: libraries write there unasked.
  """
  for number in range(3):
    try:
      os.fstat(number)
    except OSError:
      os.open(os.devnull, os.O_RDWR)  # It gets the lowest number that is free.
  if sys.stderr is None:
    sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def show(text: str, *, must_be_read: bool = True) -> None:
  """Prints on standard output, or on standard error what that cannot take.

  Args:
    text: what to print, with any characters.
    must_be_read: whether it is for standard error even if whoever was reading standard output, such as `head`, has left.
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


def settle() -> None:
  """Lets go of what a standard stream could not take, which would fail again when the interpreter ends: exit code 120."""
  for stream in (sys.stdout, sys.stderr):
    if stream is None:
      continue
    try:
      stream.flush()
    except (OSError, ValueError):
      with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _write(stream: TextIO | None, text: str):
  if stream is None:  # It was closed when the interpreter began.
    raise OSError(errno.EBADF, os.strerror(errno.EBADF))
  encoding = getattr(stream, "encoding", None) or "utf-8"  # Names of files may be no Unicode.
  print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
