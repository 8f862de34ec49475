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

"""State layouts: where a train state keeps its leaves.

A new layout is one more `StateLayout`, and a way to recognise it in `detect`.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import itertools

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import variable_kinds

Path = abstract_state.Path

VALUE = "value"  # The key that boxes a leaf: `kernel/value`.
PARAMS = "params"  # The Linen collection of the weights.
NNX_AUX = "nnx_aux"  # Where MaxText >= 0.2.4 keeps what Linen has no place for, under its NNX path.
LINEN_AUX = "linen_aux"  # Our counterpart in NNX: what NNX has no place for, under its Linen path.
FOLDER_STEP = ("from the folder's name", "step")  # A leaf that no tree has: Tunix names the folder of the tree by it.
TUNIX_ITEMS = ("model_params", "optimizer_state")  # The items over which Tunix splits a train state.
BASE = "base"  # Tunix's adapter of MaxText's models holds the model here: in RL and DPO.


@dataclasses.dataclass(frozen=True)
class StateLayout:
  """Where a layout keeps the parts of a train state; None where it has no place for one.

  Attributes:
    name: what messages call it.
    framework: `linen` or `nnx`.
    variables: the path above the model's variables: `<variables>/<collection>/W` in Linen, `<variables>/W` in NNX.
    opt_state: the optimizer's state.
    step: the step's path.
    step_dtype: the step's dtype.
    boxed_variables: whether each variable of the model is `{value: leaf}`.
    boxed_optimizer: whether each optimizer leaf, the step included, is `{value: leaf}`.
    nnx_optimizer: in Linen, whether the optimizer's state has the form that MaxText's NNX trainers give it.
    aux_among_params: in Linen, whether NNX state that is not a Param is kept among the params.
    apart: top-level keys of what belongs to no single train state, and which only `--params_only` can leave behind.
  """

  name: str
  framework: str
  variables: Path
  opt_state: Path | None
  step: Path | None
  step_dtype: str
  boxed_variables: bool = False
  boxed_optimizer: bool = False
  nnx_optimizer: bool = False
  aux_among_params: bool = False
  apart: frozenset[str] = frozenset()

  def __str__(self) -> str:
    boxes = {(False, False): "plain", (True, False): "boxed", (True, True): "boxed everywhere"}
    suffix = boxes.get((self.boxed_variables, self.boxed_optimizer), "boxed optimizer")
    return self.name if self.framework == "linen" else f"{self.name}, {suffix}"


LINEN = StateLayout("Linen TrainState", "linen", ("params",), ("opt_state",), ("step",), "int32")
# What the NNX trainers of MaxText 0.2.3 to 0.2.5 read and write, in place of an NNX layout.
LINEN_OF_NNX = dataclasses.replace(LINEN, name="Linen layout of the NNX trainer", nnx_optimizer=True)
# MaxText 0.2.3 strips `rngs` and `dropout`, and treats all other variables as Params: fp8 state, its ops' RNG streams.
LINEN_OF_NNX_0_2_3 = dataclasses.replace(
    LINEN_OF_NNX, name="Linen layout of MaxText 0.2.3's NNX trainer", aux_among_params=True
)
# The outer params, from which MaxText itself resumes any run, beside a train state for each replica.
DILOCO = dataclasses.replace(
    LINEN, name="DiLoCo state", opt_state=None, apart=frozenset({"inner_state", "outer_opt_state"})
)
NNX_PLAIN = StateLayout(
    "NNX TrainStateNNX", "nnx", ("model",), ("optimizer", "opt_state"), ("optimizer", "step"), "uint32"
)
NNX_PARAMS_ONLY = StateLayout("NNX params only", "nnx", (), None, None, "uint32")
NNX_BASE = dataclasses.replace(NNX_PARAMS_ONLY, name="NNX params only below base", variables=("base",))
OLD_NNX = StateLayout("old NNX", "nnx", ("params",), ("opt_state",), ("step",), "uint32")
# What Tunix's trainers write of MaxText's models, its items as the topmost keys. Beside the optimizer's state stands a
# step that counts micro-batches. What is written for them: `tunix_target.layout`.
TUNIX = StateLayout("Tunix", "nnx", ("model_params",), ("optimizer_state",), FOLDER_STEP, "uint32")
TRAINING_ENGINE = "MaxText's training engine"  # The name of the layout that is written for it, in the same items.


_MODEL_PARTS = frozenset({"decoder", "encoder", "token_embedder"})  # Every MaxText model has one of these.


def with_boxes(layout: StateLayout, variables: bool, optimizer: bool) -> StateLayout:
  """The NNX layout with these parts boxed."""
  return dataclasses.replace(
      layout, boxed_variables=variables, boxed_optimizer=optimizer and layout.opt_state is not None
  )


def is_tunix(layout: StateLayout) -> bool:
  """Whether this is Tunix's layout, of SFT, of RL or of MaxText's training engine."""
  return layout.variables[:1] == TUNIX.variables


def detect(state: abstract_state.AbstractState) -> StateLayout:
  """Tells the layout from the top-level keys and the boxes.

  Raises:
    LayoutError: the tree fits no layout, fits two, has an unknown top-level key, or is only partly boxed.
  """
  leaves = state.leaves
  top = {path[0] for path in leaves if path}
  _refuse_partial(leaves)
  if "model" in top:
    if "params" in top:
      raise _layout_error(top, "either model (NNX) or params (Linen)", "Remove the one that does not belong.")
    _refuse_unknown(top, {"model", "optimizer", LINEN_AUX})
    return with_boxes(NNX_PLAIN, _is_boxed(leaves, ("model",)), _all_boxed(leaves, ("optimizer",)))
  if "params" in top:
    return _detect_params(leaves, top)
  if TUNIX.variables[0] in top:
    return _detect_tunix(leaves, top)
  if top == {"base"} and _is_boxed(leaves, ()):
    return with_boxes(NNX_BASE, True, False)
  if top & _MODEL_PARTS and not top & {"opt_state", "optimizer", "step", NNX_AUX}:
    return with_boxes(NNX_PARAMS_ONLY, _is_boxed(leaves, ()), False)
  remedy = "Give the folder that holds the train state."
  if top == {"step"}:
    remedy += f" (MaxText's LoRA runs save the adapters and the step alone: {_ADAPTERS_REMEDY})"
  raise _layout_error(top, "model (NNX) or params (Linen) at the top", remedy)


_ADAPTERS_REMEDY = "convert the base checkpoint, into which --lora_restore_path merges adapters."


def _refuse_partial(leaves):
  """Refuses checkpoints without whole weights: LoRA adapters, and weights that AQT quantized for serving."""
  for path in leaves:
    if ("qrhs", "frozen") in itertools.pairwise(path):
      raise errors.LayoutError(
          path,
          "weights as they are trained",
          "a weight that AQT has quantized for serving",
          "Convert the checkpoint that it was made of, then quantize anew (maxtext.utils.layerwise_quantization).",
      )
  weights = [path for path in leaves if path and path[0] not in ("opt_state", "optimizer", "step")]
  if weights and all(any("_lora_" in key for key in path[-2:]) for path in weights):
    raise errors.LayoutError(
        weights[0], "the weights of a model", "LoRA adapters alone", _ADAPTERS_REMEDY[0].upper() + _ADAPTERS_REMEDY[1:]
    )


def _detect_params(leaves, top):
  """Linen and old NNX both have `params` at the top."""
  if DILOCO.apart <= top:
    _refuse_unknown(top, {"params", "step", *DILOCO.apart})
    return DILOCO
  _refuse_unknown(top, {"params", "opt_state", "step", NNX_AUX})
  collections = {path[1] for path in leaves if path[0] == "params" and len(path) > 1}
  if PARAMS in collections:
    modules = {path[2] for path in leaves if path[:2] == ("params", PARAMS) and len(path) > 2}
    if both := collections & modules:
      raise errors.LayoutError(
          ("params", min(both)),
          f"{min(both)} either as a collection or as a module",
          "both params/ and params/params/ holding it",
          "Remove the one that does not belong.",
      )
    is_0_2_3 = any(variable_kinds.is_misplaced(path) for path in leaves if path[:2] == (PARAMS, PARAMS))
    return LINEN_OF_NNX_0_2_3 if is_0_2_3 else LINEN
  if NNX_AUX not in top and _is_boxed(leaves, ("params",)):
    return with_boxes(OLD_NNX, True, _all_boxed(leaves, ("opt_state",)))
  raise errors.LayoutError(
      ("params",),
      "params/params (Linen) or boxed leaves …/value (NNX)",
      f"{_listed(collections)}, not boxed",
      "Save the weights under params/params.",
  )


def _detect_tunix(leaves, top):
  """Tunix's SFT keeps the model itself, RL and DPO the adapter around it; before 0.1.6 there is no optimizer."""
  _refuse_unknown(top, {*TUNIX_ITEMS, FOLDER_STEP[0]})
  model, optimizer = TUNIX_ITEMS
  parts = lambda prefix: {path[len(prefix)] for path in leaves if below(path, prefix)}
  variables = (model, BASE) if parts((model,)) == {BASE} else (model,)
  if not parts(variables) & _MODEL_PARTS:
    raise errors.LayoutError(
        variables,
        "a model of MaxText's: decoder, token_embedder",
        _listed(parts(variables)),
        "Tunix's own models have other weights than MaxText's.",
    )
  layout = dataclasses.replace(TUNIX, variables=variables)
  if optimizer not in top:
    layout = dataclasses.replace(layout, opt_state=None, step=None)
  return with_boxes(layout, _is_boxed(leaves, (model,)), _all_boxed(leaves, (optimizer,)))


def boxes(leaves: Mapping[Path, abstract_state.Leaf]) -> set[Path]:
  """The leaves that may be boxed: a box `{value: leaf}` holds nothing else. Empty nodes do not count."""
  nodes = {path[:-1] for path, leaf in leaves.items() if path[-1:] == (VALUE,) and not abstract_state.is_empty(leaf)}
  depths = {len(node) for node in nodes}
  shared = {path[:i] for path in leaves for i in depths if i < len(path) and path[i] != VALUE and path[:i] in nodes}
  return {(*node, VALUE) for node in nodes - shared}


def boxed_and_plain(leaves: Mapping[Path, abstract_state.Leaf], prefix: Path) -> tuple[list[Path], list[Path]]:
  """The leaves below `prefix` that are boxed, and those that are plain. Empty nodes are neither."""
  part = {path: leaf for path, leaf in leaves.items() if below(path, prefix)}
  found = boxes(part)
  return sorted(found), [path for path, leaf in part.items() if path not in found and not abstract_state.is_empty(leaf)]


def refuse_mixture(boxed: Sequence[Path], plain: Sequence[Path]):
  """Refuses a part of an NNX state that is only partly boxed.

  Raises:
    LayoutError: naming a leaf that is plain, and one that is boxed.
  """
  if boxed and plain:
    raise errors.LayoutError(
        plain[0],
        "all leaves boxed ({value: …}) or none",
        f"this one plain, {'/'.join(boxed[0])} boxed",
        "Save all of them alike.",
    )


def _is_boxed(leaves, prefix) -> bool:
  """Whether the leaves below `prefix` are boxed; refuses a mixture."""
  boxed, plain = boxed_and_plain(leaves, prefix)
  refuse_mixture(boxed, plain)
  return bool(boxed)


def _all_boxed(leaves, prefix) -> bool:
  """The same for an optimizer, whose mixtures `moments.check` refuses; with `--params_only` they do not matter."""
  boxed, plain = boxed_and_plain(leaves, prefix)
  return bool(boxed) and not plain


def below(path: Path, prefix: Path) -> bool:
  """Whether `path` is strictly below `prefix`."""
  return len(path) > len(prefix) and path[: len(prefix)] == prefix


def _refuse_unknown(top, known):
  if unknown := top - known:
    raise errors.LayoutError(
        (min(unknown),),
        f"only {_listed(known)} at the top",
        f"{_listed(unknown)}",
        "Remove it from the checkpoint, or report the layout.",
    )


def _layout_error(top, expected, remedy) -> errors.LayoutError:
  return errors.LayoutError("top level", expected, _listed(top), remedy)


def _listed(keys: Iterable[str]) -> str:
  return ", ".join(sorted(keys)) or "nothing"
