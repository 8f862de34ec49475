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

"""Prints what MaxText's own forward pass makes of converted checkpoints: the same logits, whatever the arrangement.

  python linen_nnx_converter_logits.py [--models=gemma3-4b,…]

Needs a Python with MaxText 0.2.4, which has both trainers, its dependencies and this package. For each model, shrunk, a
Linen train state with scanned layers is filled with random numbers and saved as MaxText saves it. It is converted for
the other trainer and the other arrangement by the model's config, each target is loaded into MaxText's model, and the
logits of the same tokens are compared with those of the source. As many axes as possible have the same length, so that
no shape tells a transposed matrix or a mixed-up axis from the right one; what those would do to the logits is printed
beside, as is what two exchanged layers would do.
"""

from collections.abc import Callable, Iterator
import functools
import os
import pathlib
import tempfile
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("HF_TOKEN", "unused")  # Engram's config asks for one even when the tokenizer is a local folder.

# pylint: disable=g-import-not-at-top,wrong-import-position
from absl import app
from absl import flags
from absl import logging
from flax import linen as nn
from flax import nnx
from flax.core import meta
import jax
import linen_nnx_converter_conformance_states as states
import numpy as np
import orbax.checkpoint as ocp

from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.common import checkpointing
from maxtext.common import train_state_nnx
from maxtext.utils import maxtext_utils
from maxtext.utils import model_creation_utils
from maxtext.utils import train_utils

_MODELS = flags.DEFINE_list("models", [], "Models to go through; all when empty.")

COLUMNS = (
    "Model",
    "Layers",
    "Linen unscanned",
    "NNX scanned",
    "NNX unscanned",
    "A matrix transposed",
    "Layers exchanged",
)
SMALL = {
    "run_name": "logits",
    "base_output_directory": "unused",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "async_checkpointing": False,
    "log_config": False,
    "override_model_config": True,
    "attention": "dot_product",
    "megablox": False,
    "sparse_matmul": False,
    "dtype": "float32",
    "matmul_precision": "highest",
    "per_device_batch_size": 1,
    "max_target_length": 16,
    "vocab_size": 64,
    "base_emb_dim": 32,
    "base_mlp_dim": 32,
    "base_moe_mlp_dim": 32,
    "base_num_query_heads": 4,
    "base_num_kv_heads": 4,
    "head_dim": 8,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2}
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}
GATED_DELTA = {
    "gdn_key_head_dim": 8,
    "gdn_value_head_dim": 8,
    "gdn_num_key_heads": 4,
    "gdn_num_value_heads": 4,
    "gdn_chunk_size": 8,
}
# One of each arrangement; where layers are left over after the blocks, there are some.
MODELS = {
    "llama2-7b": {"base_num_decoder_layers": 4},
    "gemma2-2b": {"base_num_decoder_layers": 4},
    "deepseek3-671b": {"base_num_decoder_layers": 8, "first_num_dense_layers": 4, **MLA, **MOE},
    "deepseek-custom": {
        "base_num_decoder_layers": 10,
        "first_num_dense_layers": 4,
        **MLA,
        **MOE,
        "engram_layers": [1, 7],
        "engram_num_heads": 2,
        "engram_head_dim": 16,
        "engram_vocab_bases": [211, 223],
        "indexer_n_heads": 4,
        "indexer_head_dim": 32,
        "indexer_topk": 8,
    },
    "gemma3-4b": {"base_num_decoder_layers": 26},
    "gemma4-31b": {"base_num_decoder_layers": 32, "global_head_dim": 8, "global_num_kv_heads": 4},
    "llama4-17b-128e": {"base_num_decoder_layers": 16, **MOE, "num_experts_per_tok": 1},
    "gpt-oss-20b": {"base_num_decoder_layers": 8, **MOE},
    "olmo3-7b": {"base_num_decoder_layers": 16},
    "qwen3-next-80b-a3b": {"base_num_decoder_layers": 16, **GATED_DELTA, **MOE},
    "qwen3.5-35b-a3b": {"base_num_decoder_layers": 16, **GATED_DELTA, **MOE, "mrope_section": [1, 0, 0]},
}
WITHOUT_NNX_UNSCANNED = frozenset(("deepseek-custom",))  # MaxText's unscanned NNX model has no engram.
Tree = Any
Logits = Callable[[Tree], np.ndarray]


def load_config(model: str, trainer: str, scan_layers: bool) -> Any:
  settings = {**SMALL, "model_name": model, "scan_layers": scan_layers, **MODELS[model]}
  if "engram_layers" in MODELS[model]:
    settings["tokenizer_path"] = states.tiny_tokenizer()
  settings |= dict.fromkeys(("enable_nnx", "pure_nnx", "pure_nnx_decoder"), trainer == "nnx")
  return run_config.load(["base.yml", *(f"{name}={value}" for name, value in settings.items())])


def tokens() -> dict[str, np.ndarray]:
  shape = (1, SMALL["max_target_length"])
  return {
      "decoder_input_tokens": np.random.default_rng(1).integers(0, SMALL["vocab_size"], shape).astype(np.int32),
      "decoder_positions": np.arange(shape[1], dtype=np.int32)[None],
      "decoder_segment_ids": np.ones(shape, np.int32),
  }


def random_leaf(random: np.random.Generator, path, leaf) -> np.ndarray:
  """Random numbers in every leaf, so that none could take another's place.

  Those that scale a whole layer's output are near 1: near 0, a later norm would make much of its rounding.
  """
  if not np.issubdtype(leaf.dtype, np.floating):
    return np.asarray(7, leaf.dtype)
  numbers = random.normal(size=leaf.shape) * 0.2
  is_scale = jax.tree_util.keystr(path[-1:], simple=True) in ("scale", "layer_scalar")
  return np.asarray(numbers + is_scale, leaf.dtype)


def save_source(config, folder: pathlib.Path) -> None:
  """Saves a random train state of the Linen trainer, optimizer included, as that trainer does."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  model = model_creation_utils.from_config(config, mesh=mesh)
  tx = train_utils.create_training_optimizer(config, model)[1]
  init = functools.partial(maxtext_utils.init_initial_state, model, tx, config, True, jax.random.PRNGKey(0))
  with mesh, nn.logical_axis_rules(config.logical_axis_rules):
    abstract = meta.unbox(jax.eval_shape(init))
  random = np.random.default_rng(0)
  state = jax.tree_util.tree_map_with_path(functools.partial(random_leaf, random), abstract)
  manager = checkpointing.create_orbax_checkpoint_manager(os.fspath(folder), True, False, 1, config.dataset_type)
  checkpointing.save_checkpoint(manager, 7, state, config, force=True)
  manager.close()


def restore(folder: pathlib.Path) -> Tree:
  """The train state, read by Orbax alone."""
  return ocp.PyTreeCheckpointer().restore(folder / "7" / "items")


def logits_of(config) -> Logits:
  """MaxText's forward pass in float32, as a function of a restored train state of the config's trainer."""
  mesh = maxtext_utils.get_mesh_from_config(config)
  apply = (_nnx_forward if config.pure_nnx else _linen_forward)(config, mesh)

  def forward(tree):
    with mesh, nn.logical_axis_rules(config.logical_axis_rules):
      return np.asarray(apply(tree))

  return forward


def _linen_forward(config, mesh):
  model = model_creation_utils.from_config(config, mesh=mesh)
  apply = jax.jit(lambda variables: model.apply(variables, **tokens(), enable_dropout=False))
  return lambda tree: apply(tree["params"])


def _nnx_forward(config, mesh):
  """The params go in as MaxText's NNX trainer restores them; RNG state, which nothing draws from, is zero."""
  create = model_creation_utils.get_nnx_create_model_fn(config, mesh)
  # MaxText's engram keeps arrays that must not be abstract.
  model = create() if config.engram_layers else nnx.eval_shape(create)
  graph, params, others = nnx.split(model, nnx.Param, ...)
  others = jax.tree.map(_zeros, others)
  apply = jax.jit(lambda params, others: nnx.merge(graph, params, others)(**tokens(), enable_dropout=False))

  def forward(tree):
    nnx.replace_by_pure_dict(params, train_state_nnx.from_linen_checkpoint_dict(tree)["model"])
    return apply(params, others)

  return forward


def _zeros(leaf):
  if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(jax.numpy.zeros_like(jax.eval_shape(jax.random.key_data, leaf)))
  return jax.numpy.zeros(leaf.shape, leaf.dtype)


def difference(found: np.ndarray, wanted: np.ndarray) -> float:
  """The largest difference between logits, relative to the largest logit."""
  return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def transposed(tree: Tree) -> Iterator[Tree]:
  """The train state with one square matrix of the decoder transposed, for each.

  But for `res_beta` of hyper-connections, which is made doubly stochastic: transposed, it makes hardly a difference.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
  for i, (path, leaf) in enumerate(leaves):
    is_weight = "['params']['params']['decoder']" in jax.tree_util.keystr(path[:3]) and "res_beta" not in str(path)
    if is_weight and np.ndim(leaf) > 1 and leaf.shape[-1] == leaf.shape[-2]:
      values = [leaf.swapaxes(-1, -2) if j == i else other for j, (_, other) in enumerate(leaves)]
      yield jax.tree.unflatten(structure, values)


def exchanged(tree: Tree) -> Iterator[Tree]:
  """The train state with a layer and the next one of the same shapes exchanged, for each."""
  decoder = tree["params"]["params"]["decoder"]
  numbered = (name.rsplit("_", 1) for name in decoder)
  names = ["_".join(name) for name in sorted((n for n in numbered if n[-1].isdigit()), key=lambda n: (n[0], int(n[1])))]
  shapes = {name: jax.tree.map(np.shape, decoder[name]) for name in names}
  for i, name in enumerate(names):
    if other := next((other for other in names[i + 1 :] if shapes[other] == shapes[name]), None):
      weights = tree["params"]["params"] | {"decoder": decoder | {name: decoder[other], other: decoder[name]}}
      yield tree | {"params": {"params": weights}}


def equal(a: Tree, b: Tree) -> bool:
  """Whether two trees have the same leaves, bit for bit."""
  same = lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes()
  return jax.tree.structure(a) == jax.tree.structure(b) and all(jax.tree.leaves(jax.tree.map(same, a, b)))


def row(model: str, folder: pathlib.Path) -> list[str]:
  """The cells of a model: what became of its logits, on each of the ways."""
  source = load_config(model, "linen", True)
  save_source(source, folder / "source")
  wanted = logits_of(source)(restore(folder / "source"))
  assert np.isfinite(wanted).all() and wanted.std() > 0.01, wanted
  found = []
  for trainer, scan_layers in (("linen", False), ("nnx", True), ("nnx", False)):
    if (trainer, scan_layers) == ("nnx", False) and model in WITHOUT_NNX_UNSCANNED:
      continue
    config, target = load_config(model, trainer, scan_layers), folder / f"{trainer}-{scan_layers}"
    converter.convert_checkpoint(folder / "source", target, config=config)
    forward = logits_of(config)
    found.append(difference(forward(restore(target)), wanted))
    converter.convert_checkpoint(target, folder / f"{target.name}-back", config=source)
    assert equal(restore(folder / f"{target.name}-back"), restore(folder / "source")), f"{model}: the way back"
    if (trainer, scan_layers) == ("linen", False):
      tree = restore(target)
      damage = [min(difference(forward(bad), wanted) for bad in each(tree)) for each in (transposed, exchanged)]
  numbers = [f"{number:.1e}" for number in (*found, *damage)]
  return [model, str(source.num_decoder_layers), *numbers[:2], *["–"] * (3 - len(found)), *numbers[2:]]


def main(argv):
  if len(argv) > 1:
    raise app.UsageError("Too many arguments.")
  logging.set_verbosity("fatal")
  print(f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}")
  for model in _MODELS.value or MODELS:
    with tempfile.TemporaryDirectory() as folder:
      print(f"| {' | '.join(row(model, pathlib.Path(folder)))} |", flush=True)


if __name__ == "__main__":
  app.run(main)
