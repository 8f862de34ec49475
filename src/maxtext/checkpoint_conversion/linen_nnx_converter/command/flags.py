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

"""The command's flags."""

from typing import Any

from absl import flags

from maxtext.checkpoint_conversion.linen_nnx_converter import __version__
from maxtext.checkpoint_conversion.linen_nnx_converter import options

MODULE = "linen_nnx_converter"

USAGE = """Converts a MaxText checkpoint between Flax Linen and Flax NNX, exact to the bit.

usage: python -m maxtext.checkpoint_conversion.linen_nnx_converter --source_path=… --target_path=… [flags]
           [base.yml model_name=… scan_layers=… …]
       python -m maxtext.checkpoint_conversion.linen_nnx_converter --verify_only --target_path=…
"""
_SOURCE = "The checkpoint: a checkpoints folder (its latest step), a step, an items folder, or a pytree's folder."
_TARGET = "Where to. It gets the source's shape, <target_path>/<step>/items."
_VERIFY_ONLY = "Convert nothing: compare the leaves of --target_path with the digests that its conversion kept."
_COORDINATOR = (
    "With several processes, each started alike: <host>:<port> of the first, as jax.distributed.initialize takes it."
)


class _WordParser(flags.ArgumentParser):
  """Yes, no, or one of some words."""

  def __init__(self, words: list[str]):
    super().__init__()
    self._words = words

  def parse(self, argument):
    try:
      return argument if argument in self._words else flags.BooleanParser().parse(argument)
    except ValueError as e:
      raise ValueError(f"expected {' or '.join(['true', 'false', *self._words])}") from e


def define_flags() -> flags.FlagValues:
  """The command's flags, in a registry of their own so that `main` can be called in-process."""
  values, common = registry(MODULE)
  flags.DEFINE_string("source_path", None, _SOURCE, **common)
  flags.DEFINE_string("target_path", None, _TARGET, **common)
  define_options(options.Options, common)
  flags.DEFINE_boolean("verify_only", False, _VERIFY_ONLY, **common)
  flags.DEFINE_string("coordinator_address", None, _COORDINATOR, **common)
  flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1, **common)
  flags.DEFINE_integer("process_id", None, "Index of this process.", lower_bound=0, **common)
  flags.DEFINE_boolean("traceback", False, "Show the traceback of a failure, and MaxText's log.", **common)
  define_questions(common)
  return values


def registry(module: str) -> tuple[flags.FlagValues, dict[str, Any]]:
  """A registry of flags, which may follow other arguments; and what each definition of a flag for it takes."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  return values, {"flag_values": values, "module_name": module}


def define_options(kind: Any, common: dict[str, Any]):
  """A flag for each option of a kind, of its type."""
  for name, (field, words, kinds) in options.hints(kind).items():
    default: Any = field.default
    text, (least, _) = field.metadata["text"], field.metadata["bounds"]
    if bool in kinds:
      flags.DEFINE_flag(flags.Flag(_WordParser(words), None, name, default, text, boolean=True), **common)
    elif words:
      flags.DEFINE_enum(name, default, words, text, **common)
    elif int in kinds or float in kinds:
      (flags.DEFINE_integer if int in kinds else flags.DEFINE_float)(
          name, default, text, lower_bound=None if least < 0 else least, **common
      )
    else:
      flags.DEFINE_string(name, default, text, **common)


def define_questions(common: dict[str, Any]):
  """What every command of this package can be asked about itself; `answer` answers."""
  flags.DEFINE_boolean("version", False, "Print the version.", **common)
  flags.DEFINE_boolean("help", False, "Print this help.", short_name="h", **common)


def answer(values: flags.FlagValues, module: str, usage: str) -> str | None:
  """The help or the version, if asked for."""
  if values.help:
    return usage + values.module_help(module)
  return __version__ if values.version else None
