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

from collections.abc import Sequence
import contextlib
import dataclasses
import functools
import json
import sys

from absl import flags

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.command import flags as flags_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.command import streams

_MODULE = "linen_nnx_inspector"

DONE, DIFFERENT, REFUSED, INTERRUPTED = 0, 1, 2, 130  # Exit codes.

USAGE = """Says what MaxText checkpoints are: layout, step, weights, optimizer, layers, storage, which MaxText reads them.

usage: python -m maxtext.checkpoint_conversion.linen_nnx_inspector PATH [PATH …] [flags] [base.yml model_name=… …]

A PATH is a checkpoints folder (its latest step), a step, an items folder, or a pytree's folder. Only metadata is read.
With a config, whose name ends in .yml, it says where the checkpoint differs from the installed MaxText's own state.
Exit codes: 0 everything was answered; 1 it differs from the config's model; 2 something could not be answered, and one
line says why.
"""


def define_flags() -> flags.FlagValues:
  """The command's flags, in a registry of their own so that `main` can be called in-process."""
  values, common = flags_lib.registry(_MODULE)
  flags.DEFINE_boolean("tree", False, "Print every leaf, like layers in one line.", **common)
  steps = "List the steps of a checkpoints folder, unfinished ones too, with sizes and whether each is whole."
  flags.DEFINE_boolean("steps", False, steps, **common)
  flags.DEFINE_boolean("json", False, "Print one JSON document.", **common)
  flags.DEFINE_string("html", None, "Write one self-contained page without scripts: --html=FILE, a new file.", **common)
  flags_lib.define_questions(common)
  return values


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the program's name and its arguments.

  Returns:
    The exit code: 0 everything was answered, 1 it differs from the config's model, 2 something could not be answered, 130
    interrupted.
  """
  values = define_flags()
  try:
    paths = values(list(sys.argv if argv is None else argv))[1:]
  except flags.Error as e:
    return _refuse(e)
  if answer := flags_lib.answer(values, _MODULE, USAGE):
    streams.show(answer, must_be_read=False)
    return DONE
  if not paths:
    return _refuse("expected a checkpoint, found none. Run with --help.")
  if values.html is not None and values.steps:
    return _refuse("--html and --steps: expected one of them, found both. Give one.")
  try:
    return _answer(values, paths)
  except KeyboardInterrupt:
    _refuse("interrupted.")
    return INTERRUPTED
  except Exception as e:  # A library that cannot be imported.  pylint: disable=broad-except
    return _refuse(errors.named(e))


def console_main() -> None:
  """The entry point of the console script."""
  streams.run(main)


def _answer(values, paths) -> int:
  """Inspects each path, prints what was found, and returns the exit code."""
  # pylint: disable=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
  from maxtext.checkpoint_conversion.linen_nnx_inspector import inspection
  from maxtext.checkpoint_conversion.linen_nnx_inspector import steps
  from maxtext.checkpoint_conversion.linen_nnx_inspector import text

  paths, config = _apart(paths)
  try:
    with contextlib.redirect_stdout(sys.stderr):  # MaxText and its libraries may print.
      config = run_config.load(config) if config else None
  except errors.ConversionError as e:
    return _refuse(e)
  look = steps.listed if values.steps else functools.partial(inspection.inspect_checkpoint, config=config)
  found, code = [], DONE
  for path in paths:
    try:
      with contextlib.redirect_stdout(sys.stderr):
        found.append(look(path))
    except errors.ConversionError as e:
      code = _refuse(str(e).replace("--source_path", "PATH"))
    except Exception as e:  # Whatever is wrong with one, the others are still answered.  pylint: disable=broad-except
      code = _refuse(f"{path}: {errors.one_line(e) if isinstance(e, OSError) else errors.named(e)}")
  if any(each.problems for each in found) or (values.html is not None and not _write_page(values.html, found)):
    code = REFUSED
  elif code == DONE and not values.steps and any(each.model and each.model.differing for each in found):
    code = DIFFERENT
  if values.json:
    documents = [dataclasses.asdict(each) if values.steps else text.as_json(each) for each in found]
    said = json.loads(json.dumps(documents, default=str), parse_constant=str)  # A record may hold Infinity: no JSON.
    streams.show(json.dumps({"schema": text.SCHEMA, "found": said}, indent=2), must_be_read=False)
    return code
  for number, each in enumerate(found):
    of_each = each.lines() if values.steps else text.lines(each, tree=values.tree)
    streams.show("\n".join([*([""] if number else ()), *of_each]), must_be_read=False)
  return code


def _write_page(path, found) -> bool:
  from maxtext.checkpoint_conversion.linen_nnx_inspector import page  # pylint: disable=import-outside-toplevel

  return streams.write(path, page.page(found), flag="html", module=_MODULE, is_new=True)


def _apart(arguments) -> tuple[list[str], list[str]]:
  """The paths, and the config with its settings."""
  begin = next((i for i, argument in enumerate(arguments) if i and argument.endswith((".yml", ".yaml"))), len(arguments))
  return arguments[:begin], arguments[begin:]


def _refuse(message: object) -> int:
  streams.tell(f"{_MODULE}: {message}")
  return REFUSED


if __name__ == "__main__":
  console_main()
