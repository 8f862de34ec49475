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

"""The options of a conversion: frozen, and checked when they are made, before anything is read or written."""

from collections.abc import Mapping
import dataclasses
import types
import typing
from typing import Any, Literal, Self

from maxtext.checkpoint_conversion.linen_nnx_converter import errors

_TUNIX_ONLY = {"direction": "auto", "nnx_values": None, "nnx_aux": "keep", "params_only": False}
_LEAST = {
    "param_scan_axis": 0,
    "memory_budget_gib": 1 / 16,
    "lora_alpha": 2.0**-20,
    "chunk_byte_size": 2**10,
    "target_data_file_size": 2**10,
}
_MOST = 2**50  # Of any number: with more, TensorStore's integers overflow.


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions:
  """What the target shall be.

  Attributes:
    direction: from which framework to which; `auto` goes to what the release reads, if there is one or a config; else to
      Linen with `params_only`, unless `nnx_values` asks for NNX, from Tunix to what MaxText's NNX trainers read, and from
      all others to the other framework.
    scan_layers: whether the target's layers are scanned; None is the config's, else True for `linen_to_nnx`, else what
      each stack of layers is; a pipeline then stays.
    param_scan_axis: the layer axis of scanned Params, in the source and in the target; None is the config's, else 1.
    maxtext_release: the MaxText release that shall read the target, such as `0.2.5`; None is the installed one if there
      is a config.
    layer_naming: how to write layers that are not scanned, `flat` (`layers_<n>`) or `nested` (`layers/<n>`); None is flat
      for Linen and nested for NNX.
    nnx_values: which NNX leaves are boxed: `boxed` (those of the model), `plain` (none) or `all_boxed`; None boxes the
      model for `linen_to_nnx` and keeps what is for `nnx_to_nnx`.
    nnx_aux: whether NNX state that is no Param (RNG streams, batch statistics, …) goes along.
    params_only: whether to leave out all but the params collection.
    weight_dtype: what to cast the Params to, rounding to nearest even; None keeps their dtypes.
    optimizer_dtype: the same, of what the optimizer keeps of each Param, such as Adam's mu and nu.
    target_layout: whose layout the target has: `maxtext`, one of those that `direction` and the rest choose among, or
      `tunix`, that of Tunix's SFT trainer of MaxText's models, or `training_engine`, that of MaxText's own.
  """

  direction: Literal["auto", "linen_to_nnx", "nnx_to_linen", "linen_to_linen", "nnx_to_nnx"] = "auto"
  scan_layers: bool | None = None
  param_scan_axis: int | None = None
  maxtext_release: str | None = None
  layer_naming: Literal["flat", "nested"] | None = None
  nnx_values: Literal["boxed", "plain", "all_boxed"] | None = None
  nnx_aux: Literal["keep", "drop"] = "keep"
  params_only: bool = False
  weight_dtype: Literal["bfloat16", "float16", "float32"] | None = None
  optimizer_dtype: Literal["bfloat16", "float16", "float32"] | None = None
  target_layout: Literal["maxtext", "tunix", "training_engine"] = "maxtext"

  def __post_init__(self):
    """Checks every value.

    Raises:
      OptionError: one is of another type, or none of those that there are, or contradicts `target_layout`.
    """
    for name, hint in typing.get_type_hints(type(self)).items():
      check(name, getattr(self, name), hint)
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

  @classmethod
  def of(cls, **values: Any) -> Self:
    """The options with these values.

    Raises:
      OptionError: there is no such option, or no such value of it.
    """
    return made(cls, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(PlanOptions):
  """What the target shall be, and how to get there.

  Attributes:
    check_model: whether to compare the target with the installed MaxText's own state, where a config is given and the
      target is for the installed release.
    lora_restore_path: a checkpoint of LoRA adapters to merge into the weights, which no config asks for.
    lora_alpha: the alpha that they are scaled by, over their rank; None is the config's, or what their metadata say.
    init_rngs: whether to make NNX RNG state that the source does not have, with the model of the config and its seed.
    memory_budget_gib: GiB of memory for data under way. A chunk that is larger is still held whole.
    chunk_byte_size: how many bytes a chunk should have, and never more: larger ones are split into equal pieces, smaller
      ones joined as far as the memory budget allows. None keeps them, but joins small ones where layers are sliced.
    target_data_file_size: bytes of OCDBT's data files, after which the next one begins; what could be linked is copied
      into such files. None keeps the files that are linked; of what is written it is Orbax's choice.
    use_ocdbt: whether the target is an OCDBT store; None is what the source is.
    use_zarr3: whether its arrays are zarr 3; None is what the source's are.
    compression: whether its chunks are compressed; None keeps what is not decoded as it is, and compresses the rest.
    copy_mode: whether to `link` the source's data files where their bytes need not change, to `copy` them, or, as `auto`
      does, to link those of OCDBT, which no writer changes, where the file system can.
    verify: whether to compare the target with the source, to the bit, before the commit. Where the target has the
      source's own chunks, encoded alike, that is the proof; `full` decodes all of both.
    overwrite: whether to replace an existing target, which stays whole until the new one is.
    resume: whether to take the leaves that an interrupted conversion to this target had finished, each of which is
      compared with the source first. Without it, what that left is removed.
    dry_run: whether to plan only.
  """

  check_model: bool = True
  lora_restore_path: str | None = None
  lora_alpha: float | None = None
  init_rngs: bool = False
  memory_budget_gib: float = 2.0
  chunk_byte_size: int | None = None
  target_data_file_size: int | None = None
  use_ocdbt: bool | None = None
  use_zarr3: bool | None = None
  compression: Literal["zstd", "none"] | None = None
  copy_mode: Literal["auto", "link", "copy"] = "auto"
  verify: bool | Literal["full"] = True
  overwrite: bool = False
  resume: bool = False
  dry_run: bool = False

  @property
  def memory_budget(self) -> int:
    """The memory budget in bytes."""
    return int(self.memory_budget_gib * 2**30)


def made(kind: Any, values: Mapping[str, Any]) -> Any:
  """Options of a kind: a class of frozen dataclasses that check their values.

  Raises:
    OptionError: there is no such option, or no such value of it.
  """
  names = [field.name for field in dataclasses.fields(kind)]
  for name in values.keys() - set(names):
    raise errors.OptionError(f"--{name}", f"one of {', '.join(names)}", "no such option", "Check its spelling.")
  return kind(**values)


def choices(name: str) -> list[Any]:
  """The values of an option that has a few."""
  return _literals(typing.get_type_hints(Options)[name])


def check(name: str, value: Any, hint: Any):
  """Checks the value of one option, of which `hint` is the type.

  Raises:
    OptionError: it is none that the type has, or too small or large.
  """
  kinds = [kind for kind in _members(hint) if typing.get_origin(kind) is not Literal]
  is_one = type(value) in kinds or (type(value) is int and float in kinds)
  if not is_one and not (isinstance(value, str) and value in _literals(hint)):
    raise _error(name, value, " or ".join([*_literals(hint), *map(_named, kinds)]))
  if isinstance(value, int | float) and not _LEAST.get(name, value) <= value <= _MOST:
    raise _error(name, value, f"at most {_MOST}" if value > _MOST else f"at least {_LEAST[name]}")


def _error(name, value, expected) -> errors.OptionError:
  return errors.OptionError(f"--{name}", expected, repr(value))


def _members(hint) -> tuple[Any, ...]:
  return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _literals(hint) -> list[Any]:
  return [value for kind in _members(hint) if typing.get_origin(kind) is Literal for value in typing.get_args(kind)]


def _named(kind) -> str:
  return {bool: "True or False", type(None): "None", int: "an integer", float: "a number", str: "a string"}[kind]
