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

"""The command: flags, printing and exit codes, nothing else."""

from collections.abc import Iterator, Sequence
import contextlib
import gc
import itertools
import logging as python_logging
import os
import signal
import sys
import warnings

from absl import flags
from absl import logging

from maxtext.checkpoint_conversion.linen_nnx_converter.command import flags as flags_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.command import streams

DONE, REFUSED, VERIFICATION_FAILED, INTERRUPTED = 0, 1, 2, 130  # Exit codes; 0 whenever the target is there.

_OTHER_FLAGS = ("help", "traceback", "h", "verify_only", "version")  # Not for a conversion.
_CLUSTER_FLAGS = ("coordinator_address", "num_processes", "process_id")
_WORDS = frozenset({"full", "true", "false", "yes", "no", "t", "f", "y", "n", "1", "0"})  # Never names of configs.
_VERIFY_ONLY_FLAGS = ("verify_only", "target_path", "memory_budget_gib", "traceback")

_HEARTBEAT_SECONDS = 20  # How long a process may be silent before the others give up on it.


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command in this process, and leaves its signal handlers alone.

  Args:
    argv: the program's name and its arguments, or the arguments alone if the first one is a flag.

  Returns:
    The exit code: 0 done, 1 refused, 2 verification failed, 130 interrupted.
  """
  places = []
  try:
    return _main(sys.argv if argv is None else argv, places.append)
  except KeyboardInterrupt:
    # pylint: disable-next=import-outside-toplevel
    from maxtext.checkpoint_conversion.linen_nnx_converter.command import stopping

    with stopping.uninterrupted():
      return stopping.interrupted(places[-1] if places else None)


def console_main() -> None:
  """The entry point of the console script."""
  signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))  # `supervise` lets them in.
  streams.tune_malloc(flags_lib.MODULE)
  # pylint: disable-next=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_converter.command import stopping

  streams.open_closed()

  def work(announce):
    set_up()
    code = _main(sys.argv, announce)
    streams.settle()
    if code:
      os._exit(code)  # Other machines learn of it at once; a clean exit would wait for them.
    return code

  sys.exit(stopping.supervise(work))


def set_up():
  """Sets up the process for the command."""
  streams.set_environment()
  # Metadata have no cycles, and looking for them takes a fifth of planning 20,000 leaves.
  gc.set_threshold(50_000, 20, 20)


def _main(argv, announce) -> int:
  values, argv = flags_lib.define_flags(), list(argv)
  argv = argv if argv and not argv[0].startswith("-") else ["", *argv]
  try:
    rest = values(_spelled_as_absl(values, argv))[1:]
    _check_words(values, argv)
  except flags.Error as e:
    return _refuse(e)
  if answer := flags_lib.answer(values, flags_lib.MODULE, flags_lib.USAGE):
    streams.show(answer, must_be_read=False)
    return DONE
  other = [f"--{name}" for name in values if values[name].present and name not in _VERIFY_ONLY_FLAGS] + rest
  if values.verify_only and other:
    return _refuse(f"--verify_only: expected --target_path and no flag of a conversion, found {' '.join(other)}.")
  for name in ("target_path",) if values.verify_only else ("source_path", "target_path"):
    if not values[name].value and not rest:
      return _refuse(f"--{name}: expected a path, found none. Run with --help to see all flags.")
  if len({values[name].value is None for name in _CLUSTER_FLAGS}) != 1:
    return _refuse(
        "--coordinator_address, --num_processes and --process_id: expected all of them or none. Give all three."
    )
  if values.coordinator_address and not values.coordinator_address.rpartition(":")[2].isdecimal():
    return _refuse(f"--coordinator_address: expected <host>:<port>, found {values.coordinator_address}. Give its port.")
  return _convert(values, rest, announce)


def _spelled_as_absl(values, argv) -> list[str]:
  """The arguments, with `--no-flag` spelled as absl does, `--noflag`."""
  spellings = {f"--no-{name}": f"--no{name}" for name in values if values[name].boolean}
  return [spellings.get(argument, argument) for argument in argv]


def _check_words(values, argv):
  """Refuses a separate value behind a flag that takes it only with `=`; absl would take it for an argument.

  Raises:
    flags.Error: naming the flag.
  """
  booleans = {name for name in values if values[name].boolean}
  for flag, word in itertools.pairwise(argv):
    name = flag.lstrip("-")
    if not flag.startswith("-") or word.lower() not in _WORDS:
      continue
    if name in booleans:
      raise flags.Error(f"--{name}: expected its value after =, found {flag} {word}. Write --{name}={word}.")
    if name.removeprefix("no").removeprefix("-") in booleans:
      raise flags.Error(f"{flag}: expected no value, found {word}. Leave it out.")


@contextlib.contextmanager
def _quiet(show_all: bool) -> Iterator[None]:
  """Silences what libraries log as information, and sends what they print to standard error.

  `_convert` reports failures once. Orbax's warnings are about options that were chosen on purpose, and MaxText logs each
  of its 700 settings.
  """
  if show_all:
    yield
    return
  verbosity, disabled = logging.get_verbosity(), python_logging.root.manager.disable
  logging.set_verbosity(logging.FATAL)
  python_logging.disable(python_logging.INFO)  # MaxText up to 0.2.3 uses Python's own loggers.
  python_logging.getLogger("gcsfs").setLevel(python_logging.CRITICAL)  # It has a traceback for whatever it raises.
  try:
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
      warnings.filterwarnings("ignore", message="coroutine .* was never awaited")  # Orbax's, when one of them fails.
      yield
  finally:
    logging.set_verbosity(verbosity)
    python_logging.disable(disabled)


def _convert(values, config_arguments, announce) -> int:
  """Converts or verifies as the flags say, prints the result, and returns the exit code."""
  # pylint: disable=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_converter import errors
  from maxtext.checkpoint_conversion.linen_nnx_converter import progress

  told = progress.Shown(announce=announce)
  try:
    with _quiet(values.traceback):
      lines = _verified(values, told) if values.verify_only else _converted(values, config_arguments, told)
  except errors.ConversionError as e:
    if values.traceback:
      raise
    _refuse(e)
    return VERIFICATION_FAILED if isinstance(e, errors.VerificationError) else REFUSED
  except Exception as e:  # A full disk or a vanished file gets one line too.  pylint: disable=broad-except
    if values.traceback:
      raise
    return _failed(e, values, told.place)
  import jax  # Not before: if it cannot be imported, one line says so too.

  if jax.process_index() == 0:
    streams.show("\n".join(lines), must_be_read=not values.dry_run)
  return DONE


def _verified(values, told) -> list[str]:
  """Verifies a checkpoint alone; returns what to print."""
  # pylint: disable-next=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_converter.verification import verify

  memory = values.memory_budget_gib
  return [verify.verify_checkpoint(values.target_path, memory_budget_gib=memory, progress=told).summary()]


def _converted(values, config_arguments, told) -> list[str]:
  """Converts a checkpoint; returns what to print."""
  # pylint: disable=import-outside-toplevel
  import jax

  from maxtext.checkpoint_conversion.linen_nnx_converter import conversion
  from maxtext.checkpoint_conversion.linen_nnx_converter import folding
  from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config

  if values.coordinator_address:
    cluster = {name: values[name].value for name in _CLUSTER_FLAGS}
    jax.distributed.initialize(**cluster, heartbeat_timeout_seconds=_HEARTBEAT_SECONDS)
  options = {name: values[name].value for name in values if name not in (*_OTHER_FLAGS, *_CLUSTER_FLAGS)}
  config = run_config.load(config_arguments) if config_arguments else None
  done = conversion.convert_checkpoint(**options, config=config, progress=told)
  return [*folding.fold(done.lines()), done.summary(), done.cost] if done.dry_run else [done.summary()]


def _failed(e: Exception, values, place) -> int:
  """Reports in one line an unforeseen failure, and what is on the disk; returns the exit code."""
  # pylint: disable=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_converter import errors
  from maxtext.checkpoint_conversion.linen_nnx_converter.command import stopping

  is_there, what = (False, "Nothing was verified.") if values.verify_only else stopping.left(place)
  path = getattr(e, "filename", None) or (place.final if place else values.target_path)
  hint = "" if isinstance(e, OSError) else " --traceback shows where."
  _refuse(f"{path}: {errors.named(e, 500)}. {what[0].upper()}{what[1:]}{hint}")
  return DONE if is_there else REFUSED


def _refuse(message) -> int:
  streams.tell(f"linen_nnx_converter: {message}")
  return REFUSED


if __name__ == "__main__":
  console_main()
