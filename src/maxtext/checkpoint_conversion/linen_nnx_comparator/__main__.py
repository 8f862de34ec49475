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
import dataclasses
import json
import os
import sys

from absl import flags

from maxtext.checkpoint_conversion.linen_nnx_comparator import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.command import flags as flags_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.command import streams

_MODULE = "linen_nnx_comparator"

EQUAL, DIFFERENT, REFUSED, INTERRUPTED = 0, 1, 2, 130  # Exit codes; the first three are those of diff and cmp.

USAGE = """Compares two MaxText checkpoints, Linen or NNX, scanned or not, leaf by leaf and to the bit.

usage: python -m maxtext.checkpoint_conversion.linen_nnx_comparator A B [flags] [base.yml model_name=… …]

A and B are checkpoints folders (their latest steps), steps, items folders, or pytrees' folders.
With --atol or --rtol, values with |a - b| <= atol + rtol * |b| are accepted; with neither, every bit counts.
Exit codes: 0 equal, to the bit or within the tolerance; 1 different; 2 refused, and one line says why.
"""


def define_flags() -> flags.FlagValues:
  """The command's flags, in a registry of their own so that `main` can be called in-process."""
  values, common = flags_lib.registry(_MODULE)
  axes = "The layer axis of scanned Params; two numbers, as in 1,0, if it is another in B. Unset: the config's, or 1."
  flags.DEFINE_list("param_scan_axis", None, axes, **common)
  flags_lib.define_options(options_lib.Options, common)
  flags.DEFINE_string("json", None, "Write the report as JSON: --json to standard output, or --json=FILE.", **common)
  flags.DEFINE_string("html", None, "Write the report as one self-contained page without scripts: --html=FILE.", **common)
  flags.DEFINE_enum(
      "color",
      "auto",
      ("auto", "always", "never"),
      "Colour the report; auto does on a terminal, unless dumb or NO_COLOR.",
      **common,
  )
  flags.DEFINE_integer("leaves", 20, "How many leaves of each list to print, the worst first.", lower_bound=0, **common)
  flags.DEFINE_boolean("traceback", False, "Show the traceback of a failure.", **common)
  flags_lib.define_questions(common)
  return values


def main(argv: Sequence[str] | None = None) -> int:
  """Runs the command.

  Args:
    argv: the program's name and its arguments.

  Returns:
    The exit code: 0 equal, 1 different, 2 refused, 130 interrupted.
  """
  values = define_flags()
  arguments = ["--json=-" if argument == "--json" else argument for argument in (sys.argv if argv is None else argv)]
  try:
    paths = values(arguments)[1:]
  except flags.Error as e:
    return _refuse(e)
  if answer := flags_lib.answer(values, _MODULE, USAGE):
    streams.show(answer, must_be_read=False)
    return EQUAL
  if len(paths) < 2 or any("=" in path and not os.path.exists(path) for path in paths[:2]):
    return _refuse(f"expected two checkpoints, A and B, found {' '.join(paths) or 'none'}. Run with --help.")
  axes = values.param_scan_axis or []
  if len(axes) > 2 or not all(axis.isdecimal() for axis in axes):
    return _refuse(f"--param_scan_axis: expected one axis, or two, found {','.join(axes)}. Give 1 or 1,0.")
  try:
    return _compare(values, paths, (int(axes[0]), int(axes[-1])) if axes else None)
  except KeyboardInterrupt:
    _refuse("interrupted.")
    return INTERRUPTED
  except Exception as e:  # One line, and never the exit code of a difference.  pylint: disable=broad-except
    if values.traceback:
      raise
    return _refuse(_said(e))


def console_main() -> None:
  """The entry point of the console script."""
  streams.tune_malloc(_MODULE)
  streams.run(main)


def _compare(values, paths, axes) -> int:
  """Compares as the flags say, and writes the report in the requested forms."""
  # pylint: disable=import-outside-toplevel
  from maxtext.checkpoint_conversion.linen_nnx_comparator import compare
  from maxtext.checkpoint_conversion.linen_nnx_comparator import page
  from maxtext.checkpoint_conversion.linen_nnx_comparator import report
  from maxtext.checkpoint_conversion.linen_nnx_converter import progress
  from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config

  names = (field.name for field in dataclasses.fields(options_lib.Options))
  options = {name: values[name].value for name in names if name in values}
  a, b, *config = paths
  config = run_config.load(config) if config else None
  told = progress.Shown()
  comparison = compare.compare_checkpoints(a, b, config=config, progress=told, param_scan_axes=axes, **options)
  code = EQUAL if comparison.is_accepted else DIFFERENT
  if values.html is not None and not streams.write(values.html, page.page(comparison), flag="html", module=_MODULE):
    code = REFUSED
  if values.json is not None:
    document = json.dumps(report.as_json(comparison), indent=2, allow_nan=False)
    if values.json == "-":
      streams.show(document, must_be_read=False)
      return code
    if not streams.write(values.json, document + "\n", flag="json", module=_MODULE):
      code = REFUSED
  is_terminal = sys.stdout is not None and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
  color = values.color == "always" or (values.color == "auto" and is_terminal and "NO_COLOR" not in os.environ)
  streams.show("\n".join(report.lines(comparison, color=color, most_leaves=values.leaves)), must_be_read=False)
  return code


def _said(e: Exception) -> str:
  """An exception in one line."""
  if isinstance(e, errors.ConversionError):
    return str(e)
  is_ours = not isinstance(e, (MemoryError, OSError, ValueError))
  hint = ". This is a defect of the comparator: --traceback shows where." if is_ours else ""
  return f"{errors.named(e, 500)}{hint}"


def _refuse(message: object) -> int:
  streams.tell(f"linen_nnx_comparator: {message}")
  return REFUSED


if __name__ == "__main__":
  console_main()
