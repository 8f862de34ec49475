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

from absl import flags

from maxtext.checkpoint_conversion.linen_nnx_converter import __version__
from maxtext.checkpoint_conversion.linen_nnx_converter import options

MODULE = "linen_nnx_converter"

USAGE = """Converts a MaxText checkpoint between Flax Linen and Flax NNX, exact to the bit.

usage: python -m maxtext.checkpoint_conversion.linen_nnx_converter --source_path=… --target_path=… [flags]
           [base.yml model_name=… scan_layers=… …]
       python -m maxtext.checkpoint_conversion.linen_nnx_converter --verify_only --target_path=…
"""


class _VerifyParser(flags.ArgumentParser):
  """Yes, no, or full."""

  def parse(self, argument):
    try:
      return argument if argument == "full" else flags.BooleanParser().parse(argument)
    except ValueError as e:
      raise ValueError("expected true, false or full") from e


def define_flags() -> flags.FlagValues:
  """The command's flags, in a registry of their own so that `main` can be called in-process."""
  values = flags.FlagValues()
  values.set_gnu_getopt(True)  # Flags may follow the config.
  common = {"flag_values": values, "module_name": MODULE}
  _define_form(common)
  _define_layout(common)
  _define_lora(common)
  _define_storage(common)
  _define_bytes(common)
  _define_running(common)
  define_questions(common)
  return values


def define_questions(common):
  """What every command of this package answers about itself, by `answer`."""
  flags.DEFINE_boolean("version", False, "Print the version.", **common)
  flags.DEFINE_boolean("help", False, "Print this help.", short_name="h", **common)


def answer(values: flags.FlagValues, module: str, usage: str) -> str | None:
  """The help, or the version, if that is asked for."""
  if values.help:
    return usage + values.module_help(module)
  return __version__ if values.version else None


def _define_form(common):
  """What to convert, and into what."""
  flags.DEFINE_string(
      "source_path",
      None,
      "The checkpoint to convert: a checkpoints folder (its latest step), a step, an items folder, or a pytree's folder.",
      **common,
  )
  flags.DEFINE_string(
      "target_path", None, "Where to; it gets the shape of the source, <target_path>/<step>/items.", **common
  )
  flags.DEFINE_enum(
      "direction",
      "auto",
      options.choices("direction"),
      "auto goes from what the source is to the other framework. The last two change the arrangement or the boxes only.",
      **common,
  )
  flags.DEFINE_boolean(
      "scan_layers",
      None,
      "Whether the target's layers are scanned. Unset: the config's, or yes for linen_to_nnx and otherwise as the source "
      "has them; a pipeline, out of which either value takes the layers, then stays.",
      **common,
  )
  flags.DEFINE_integer(
      "param_scan_axis", None, "The layer axis of scanned Params. Unset: the config's, or 1.", lower_bound=0, **common
  )
  flags.DEFINE_string(
      "maxtext_release",
      None,
      "The MaxText release that shall read the target, such as 0.2.5. With it, auto goes to the layout that this release "
      "reads. Unset: the installed one, if a config is given.",
      **common,
  )


def _define_layout(common):
  """The spelling of the target's leaves, and which of them there are."""
  flags.DEFINE_enum(
      "target_layout",
      "maxtext",
      options.choices("target_layout"),
      "Whose layout the target has. tunix is what Tunix's SFT trainer resumes of MaxText's models: the items "
      "model_params and optimizer_state; training_engine is what MaxText 0.2.5's training engine resumes.",
      **common,
  )
  flags.DEFINE_enum(
      "layer_naming",
      None,
      options.choices("layer_naming"),
      "How to write layers that are not scanned: flat is layers_<n>, nested is layers/<n>. Unset: flat in Linen, nested "
      "in NNX.",
      **common,
  )
  flags.DEFINE_enum(
      "nnx_values",
      None,
      options.choices("nnx_values"),
      "Which leaves of an NNX target are boxed ({value: …}): those of the model, none, or all. Unset: boxed, and as the "
      "source is for nnx_to_nnx.",
      **common,
  )
  flags.DEFINE_enum(
      "nnx_aux",
      "keep",
      options.choices("nnx_aux"),
      "Whether to keep NNX state that is no Param: RNG streams, batch statistics and other Variables.",
      **common,
  )
  flags.DEFINE_boolean("params_only", False, "Convert the params alone, without optimizer and step.", **common)
  for name, what in (
      ("weight_dtype", "the Params"),
      ("optimizer_dtype", "the moments of the Params, as Adam's mu and nu"),
  ):
    lossy = f"Cast {what} to this dtype, to nearest even. Unset: none is cast."
    flags.DEFINE_enum(name, None, options.choices(name), lossy, **common)
  flags.DEFINE_boolean(
      "check_model", True, "With a config, compare the target with the installed MaxText's own state first.", **common
  )
  flags.DEFINE_boolean(
      "init_rngs",
      False,
      "With a config, make the NNX RNG state that the source lacks, by MaxText's own model and the config's seed.",
      **common,
  )


def _define_lora(common):
  """Adapters, by the names that MaxText's config has for them."""
  path = "A checkpoint of LoRA adapters to merge into the weights, in float32, which changes them. No config asks for it."
  alpha = "The alpha that the adapters are scaled by, over their rank. Unset: the config's, or what their metadata say."
  flags.DEFINE_string("lora_restore_path", None, path, **common)
  flags.DEFINE_float("lora_alpha", None, alpha, lower_bound=2.0**-20, **common)


def _define_storage(common):
  """How the target's arrays are stored. What is unset is as the source has it, and costs no more than its metadata."""
  chunks = "Bytes of a chunk, at most: larger ones are split into equal pieces, small ones joined. Unset: they are kept."
  files = "Bytes of OCDBT's data files, after which the next one begins. Unset: files that can be linked are kept."
  for name, what in (("chunk_byte_size", chunks), ("target_data_file_size", files)):
    flags.DEFINE_integer(name, None, what, lower_bound=1024, **common)
  flags.DEFINE_boolean("use_ocdbt", None, "Whether the target is an OCDBT store. Unset: what the source is.", **common)
  flags.DEFINE_boolean("use_zarr3", None, "Whether its arrays are zarr 3. Unset: what the source's are.", **common)
  compression = "How chunks are compressed. Unset: zstd, and chunks that need not be decoded as they are."
  flags.DEFINE_enum("compression", None, options.choices("compression"), compression, **common)


def _define_bytes(common):
  """How the bytes go, and what is checked."""
  flags.DEFINE_float("memory_budget_gib", 2.0, "GiB of memory for the data under way.", lower_bound=0.0625, **common)
  flags.DEFINE_enum(
      "copy_mode",
      "auto",
      options.choices("copy_mode"),
      "How data files come to the target where their bytes need not change: as hard links, as copies, or, with OCDBT, as "
      "links where the file system can, and without it as copies.",
      **common,
  )
  verify = "Compare the target with the source, to the bit, before the commit; --verify=full decodes all of both."
  flags.DEFINE_flag(flags.Flag(_VerifyParser(), None, "verify", True, verify, boolean=True), **common)
  flags.DEFINE_boolean("overwrite", False, "Replace an existing target.", **common)
  flags.DEFINE_boolean(
      "resume",
      False,
      "Take the leaves that an interrupted conversion to this target had finished, after comparing each with the source.",
      **common,
  )
  flags.DEFINE_boolean(
      "verify_only",
      False,
      "Convert nothing: compare the leaves of --target_path with the digests that its conversion kept.",
      **common,
  )


def _define_running(common):
  """How the command runs."""
  flags.DEFINE_string(
      "coordinator_address",
      None,
      "With several processes, each run alike: <host>:<port> of the first one, as jax.distributed.initialize takes it.",
      **common,
  )
  flags.DEFINE_integer("num_processes", None, "How many processes there are.", lower_bound=1, **common)
  flags.DEFINE_integer("process_id", None, "Index of this process.", lower_bound=0, **common)
  flags.DEFINE_boolean("dry_run", False, "Print the plan and write nothing.", **common)
  flags.DEFINE_boolean("traceback", False, "Show the traceback of a failure.", **common)
