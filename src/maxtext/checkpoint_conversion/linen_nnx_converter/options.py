# Copyright 2026 Google LLC
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     https://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.

"""The options of a conversion: frozen, and checked when they are made, before anything is read or written.

Each is said once, here: the command makes its flags of them, and their page in `docs/` is made of those.
"""

import dataclasses
import numbers
import types
import typing
from typing import Any, Literal, Self

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import memory

_TUNIX_ONLY = {"direction": "auto", "nnx_values": None, "nnx_aux": "keep", "params_only": False}
_MOST = 2**50  # Of any number: with more, TensorStore's integers overflow.

Float = Literal["bfloat16", "float16", "float32"]


def option[T](default: T, text: str, least: float = -_MOST, most: float = _MOST) -> T:
  """A field of a dataclass that is an option.

  Args:
    default: its value where none is given.
    text: what it means, for `--help` and the docs.
    least: the least number that it may be.
    most: the largest.
  """
  return dataclasses.field(default=default, metadata={"text": text, "bounds": (least, most)})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checked:
  """Options that are checked when they are made."""

  def __post_init__(self):
    """Checks every option.

    Raises:
      OptionError: one is of another type, or none of those that there are, or too small or large.
    """
    for name, (field, words, kinds) in hints(type(self)).items():
      _check(name, getattr(self, name), words, kinds, *field.metadata["bounds"])

  @classmethod
  def of(cls, **values: Any) -> Self:
    """The options with these values.

    Raises:
      OptionError: there is no such option, or no such value of it.
    """
    names = [field.name for field in dataclasses.fields(cls)]
    for name in values.keys() - set(names):
      raise errors.OptionError(f"--{name}", f"one of {', '.join(names)}", "no such option", "Check its spelling.")
    return cls(**values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(Checked):
  """What the target is to be."""

  direction: Literal["auto", "linen_to_nnx", "nnx_to_linen", "linen_to_linen", "nnx_to_nnx"] = option(
      "auto",
      "From which framework to which. auto goes to what the config or the release reads, else to the other framework "
      "(from Tunix to the Linen layout; with --params_only to Linen). The last two only change layers or boxes.",
  )
  target_layout: Literal["maxtext", "tunix", "training_engine"] = option(
      "maxtext",
      "Whose layout the target has: tunix is what MaxText's SFT resumes in Tunix, training_engine what MaxText 0.2.5's "
      "training engine resumes. Excludes --direction, --nnx_values, --nnx_aux=drop and --params_only.",
  )
  maxtext_release: str | None = option(
      None, "The MaxText release that will read the target, such as 0.2.5. Unset: the installed one if there is a config."
  )
  scan_layers: bool | None = option(
      None,
      "Whether the target's layers are scanned. Unset: as the config says, else yes for linen_to_nnx, else unchanged. If "
      "neither flag nor config says, a pipeline stays.",
  )
  param_scan_axis: int | None = option(
      None, "The layer axis of scanned Params, in source and target. Unset: the config's, or 1.", least=0
  )
  layer_naming: Literal["flat", "nested"] | None = option(
      None,
      "How unscanned layers are named: layers_<n> (flat) or layers/<n> (nested). Unset: as the release has it, else flat "
      "in Linen, nested in NNX.",
  )
  nnx_values: Literal["boxed", "plain", "all_boxed"] | None = option(
      None,
      "Which NNX leaves are boxed ({value: leaf}): the model's, none, or all, as in an nnx.State handed to Orbax. Unset: "
      "the model's, but unchanged for nnx_to_nnx.",
  )
  nnx_aux: Literal["keep", "drop"] = option(
      "keep", "Whether to keep NNX state that is not a Param: RNG streams, batch statistics and other Variables."
  )
  params_only: bool = option(False, "Leave out optimizer, step and all state that is not a Param.")
  weight_dtype: Float | None = option(
      None, "Cast the Params, to nearest even. Refused if a finite number would become infinite. Unset: nothing is cast."
  )
  optimizer_dtype: Float | None = option(
      None, "The same for what the optimizer keeps of each Param, such as Adam's mu and nu."
  )

  def __post_init__(self):
    """Checks every option.

    Raises:
      OptionError: one is none that there is, or contradicts another.
    """
    super().__post_init__()
    if self.params_only and self.optimizer_dtype is not None:
      raise errors.OptionError(
          f"--optimizer_dtype={self.optimizer_dtype}", "an optimizer", "--params_only", "Leave out one of the two."
      )
    if self.target_layout != "maxtext":
      self._check_tunix()

  def _check_tunix(self):
    """Refuses what would make another layout, or leave out what the trainer restores."""
    for name, only in _TUNIX_ONLY.items():
      if (value := getattr(self, name)) != only:
        raise errors.OptionError(
            f"--{name}={value}",
            "a target of MaxText's",
            f"--target_layout={self.target_layout}, whose trainer restores a whole state in one layout",
            "Leave out one of the two.",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PlanOptions):
  """What the target is to be, and how to get there."""

  check_model: bool = option(
      True, "With a config, first compare the target with the installed MaxText's own train state."
  )
  init_rngs: bool = option(
      False, "With a config, make NNX RNG state that the source lacks, with MaxText's own model and the config's seed."
  )
  lora_restore_path: str | None = option(
      None, "A checkpoint of LoRA adapters to merge into the weights, in float32. A config's asks for no merge."
  )
  lora_alpha: float | None = option(
      None, "Scales the adapters, over their rank. Unset: the config's, or what their metadata say.", least=2.0**-20
  )
  memory_budget_gib: float = option(
      2.0, "GiB of memory for data in flight. A chunk larger than this is still held whole.", least=1 / 16
  )
  chunk_byte_size: int | None = option(
      None,
      "Most bytes per chunk: larger ones are split evenly, small ones joined. Unset: chunks are kept.",
      least=2**10,
  )
  target_data_file_size: int | None = option(
      None,
      "Bytes per OCDBT data file; what could be linked is copied into such files. Unset: files that are linked are kept.",
      least=2**10,
  )
  use_ocdbt: bool | None = option(
      None, "Whether the target is an OCDBT store. Unset: as the source, unless the config turns it off."
  )
  use_zarr3: bool | None = option(
      None, "Whether its arrays are zarr 3. Unset: as the source's, unless the config turns it off."
  )
  compression: Literal["zstd", "none"] | None = option(
      None, "How chunks are compressed. Unset: zstd for what is decoded; the rest stays as it is."
  )
  copy_mode: Literal["auto", "link", "copy"] = option(
      "auto",
      "How data files reach the target where their bytes need not change. auto hard-links OCDBT files, which no writer "
      "changes, where the file system can, and copies others.",
  )
  verify: bool | Literal["full"] = option(
      True, "Compare target and source, to the bit, before the commit; full decodes all of both."
  )
  overwrite: bool = option(False, "Replace one checkpoint at the target, which stays whole until the new one is.")
  resume: bool = option(
      False,
      "Take over the leaves that an interrupted conversion to this target had finished, comparing each with the source. "
      "Without it, what that left is removed.",
  )
  dry_run: bool = option(
      False,
      "Print the plan, like layers in one line, and its cost: memory, and time, measured briefly, or requests to gs://. "
      "Write nothing.",
  )

  def __post_init__(self):
    """Checks every option.

    Raises:
      OptionError: one is none that there is, or there is an alpha without adapters.
    """
    super().__post_init__()
    if self.lora_alpha is not None and self.lora_restore_path is None:
      remedy = "Give --lora_restore_path, or leave it out."
      raise errors.OptionError("--lora_alpha", "adapters that it scales", "none", remedy)

  @property
  def memory_budget(self) -> memory.Budget:
    """The memory budget."""
    return memory.Budget(int(self.memory_budget_gib * 2**30))


def hints(kind: Any) -> dict[str, tuple[dataclasses.Field[Any], list[Any], list[Any]]]:
  """Of each option of a kind: its field, the words that are values of it, and the types of its other values."""
  types_of = typing.get_type_hints(kind)
  fields = (field for field in dataclasses.fields(kind) if "text" in field.metadata)
  return {field.name: (field, *_apart(types_of[field.name])) for field in fields}


def _check(name, value, words, kinds, least, most):
  is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
  is_one = (type(value) in kinds and value != "") or (is_number and float in kinds)
  if not is_one and not (isinstance(value, str) and value in words):
    raise errors.OptionError(f"--{name}", " or ".join([*words, *map(_named, kinds)]), errors.shown(value))
  if is_number and not least <= value <= most:
    expected = f"at most {most}" if value > most else f"at least {least}"
    raise errors.OptionError(f"--{name}", expected, errors.shown(value))


def _apart(hint) -> tuple[list[Any], list[Any]]:
  """The words, and the types, of which a type is the union."""
  members = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
  words = [word for kind in members if typing.get_origin(kind) is Literal for word in typing.get_args(kind)]
  return words, [kind for kind in members if typing.get_origin(kind) is not Literal]


def _named(kind) -> str:
  return {bool: "True or False", type(None): "None", int: "an integer", float: "a number", str: "a string"}[kind]
