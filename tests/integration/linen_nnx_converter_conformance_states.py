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

"""MaxText's own abstract states of a model at its real size, as both trainers have them, scanned and unscanned."""

from collections.abc import Callable
import dataclasses
import pathlib
import pickle
import tempfile

from flax import nnx

from maxtext.checkpoint_conversion.linen_nnx_converter import errors
from maxtext.checkpoint_conversion.linen_nnx_converter import options as options_lib
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.checkpoint_conversion.linen_nnx_converter.planning import planner
from maxtext.checkpoint_conversion.linen_nnx_converter.state import abstract_state
from maxtext.checkpoint_conversion.linen_nnx_converter.state import layouts
from maxtext.checkpoint_conversion.linen_nnx_converter.state import releases

SETTINGS = (
    "run_name=conformance",
    "base_output_directory=unused",
    "hardware=cpu",
    "skip_jax_distributed_system=True",
    "dataset_type=synthetic",
    "enable_checkpointing=False",
    "log_config=False",
    "attention=dot_product",
)
ARRANGEMENTS = (
    LINEN_SCANNED := ("linen", True),
    LINEN_UNSCANNED := ("linen", False),
    NNX_SCANNED := ("nnx", True),
    NNX_UNSCANNED := ("nnx", False),
)
Key = tuple[str, bool]


@dataclasses.dataclass(frozen=True)
class Traced:
  """The abstract states of a model, in one arrangement by one trainer.

  Attributes:
    options: what the model's config says of a target for it.
    run: the run of that config.
    saved: what the trainer saves, in the Linen layout.
    train_state: the pure dict of `TrainStateNNX`; None for the Linen trainer.
    params: the paths in `train_state` that are Params or the optimizer's; the others are RNG streams and the like.
  """

  options: options_lib.Options
  run: planner.Run
  saved: abstract_state.AbstractState
  train_state: abstract_state.AbstractState | None = None
  params: frozenset[abstract_state.Path] = frozenset()

  def saved_params(self) -> abstract_state.AbstractState:
    return without_aux(self.saved)

  def train_state_params(self) -> abstract_state.AbstractState:
    return _select(self.train_state, lambda path: path in self.params)


def trace(model: str, trainer: str, scan_layers: bool) -> Traced:
  """Traces a model of the installed MaxText.

  Raises:
    ConfigError: MaxText refuses the config, or cannot trace the model.
  """
  is_nnx = trainer == "nnx"
  arguments = ["base.yml", f"model_name={model}", f"scan_layers={scan_layers}", *SETTINGS]
  if run_config.version() <= releases.LINEN_UNTIL:
    arguments += [f"{name}={is_nnx}" for name in ("enable_nnx", "pure_nnx", "pure_nnx_decoder")]
  if model == "deepseek-custom":
    arguments += [f"tokenizer_path={tiny_tokenizer()}"]
  config = run_config.load(arguments)
  said = run_config.with_config(options_lib.Options(), config), run_config.run(config, None)
  if not is_nnx:
    return Traced(*said, run_config.saved_state(config, trainer))
  try:
    state = run_config.nnx_state(config)
  except Exception as e:  # As saved_state does.  pylint: disable=broad-except
    raise errors.ConfigError(model, "a model that MaxText can trace", str(e), "") from e
  kinds = {tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(state)}
  params = frozenset(path for path, v in kinds.items() if path[0] == "optimizer" or isinstance(v, nnx.Param))
  return Traced(*said, _flatten(run_config.saved_by_nnx(state)), _flatten(state.to_pure_dict()), params)


def write(folder: str, model: str, traced: dict[Key, Traced]):
  """Keeps states for `read`."""
  (pathlib.Path(folder) / f"{model}.pickle").write_bytes(pickle.dumps(traced))


def read(folder: str, model: str) -> dict[Key, Traced]:
  """The states that the environment of another release has written; none of a model that it does not have."""
  file = pathlib.Path(folder) / f"{model}.pickle"
  return pickle.loads(file.read_bytes()) if file.exists() else {}


def without_aux(state: abstract_state.AbstractState) -> abstract_state.AbstractState:
  """A saved state without what is neither a Param nor the optimizer's."""
  return _select(state, lambda path: path[0] != layouts.NNX_AUX)


def _flatten(tree) -> abstract_state.AbstractState:
  return abstract_state.abstract(abstract_state.flatten(tree))


def _select(state, keep: Callable[[abstract_state.Path], bool]) -> abstract_state.AbstractState:
  return dataclasses.replace(state, leaves={path: leaf for path, leaf in state.leaves.items() if keep(path)})


def tiny_tokenizer() -> str:
  """Folder of a made-up Hugging Face tokenizer; engram reads its vocabulary when the model is built."""
  import tokenizers
  import transformers

  words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "A", "B"])}
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  folder = tempfile.mkdtemp()
  special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
  transformers.PreTrainedTokenizerFast(tokenizer_object=model, **special).save_pretrained(folder)
  return folder
