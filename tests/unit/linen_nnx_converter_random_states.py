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

"""Random train states, for Hypothesis."""

import dataclasses
import os
from random import Random
from typing import Any

from hypothesis import event
from hypothesis import HealthCheck
from hypothesis import Phase
from hypothesis import settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

DTYPES = ("float32", "bfloat16", "float16", "float64", "float8_e4m3fn", "float8_e5m2", "int4", "int8", "uint32", "bool")
EXAMPLES = int(os.environ.get("LINEN_NNX_FUZZ_EXAMPLES", "50"))
STACKS = ("layers", "dense_layers", "moe_layers")
settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=EXAMPLES == 50,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
fuzz = settings(settings.get_profile("fuzz"))
names = st.sampled_from(
    ("kernel", "bias", "scale", "wi_0", "wi_1", "wo", "query", "out", "a.b", "x y", "ß", "2", "value_")
)


def cast(content, dtype):
  """An array of this dtype of any bits, NaNs and signed zeros among them, out of eight bytes for each element."""
  if dtype in (bool, jnp.dtype("int4")):
    return np.asarray(content[..., 0] % (2 if dtype.kind == "b" else 16)).astype(dtype)
  return np.ascontiguousarray(content[..., : dtype.itemsize]).view(dtype).reshape(content.shape[:-1])


shapes = st.lists(st.integers(1, 3), max_size=3).map(tuple)
modules = st.dictionaries(
    names,
    st.recursive(shapes, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=2), max_leaves=3),
    min_size=1,
    max_size=3,
)


def filled(shapes_of, variants, random):
  """`variants` trees of arrays, all of these shapes; each leaf of one dtype in all of them."""
  if isinstance(shapes_of, dict):
    children = {key: filled(child, variants, random) for key, child in shapes_of.items()}
    return [{key: child[i] for key, child in children.items()} for i in range(variants)]
  dtype = jnp.dtype(random.choice(DTYPES))
  bits = lambda: np.frombuffer(random.randbytes(8 * int(np.prod(shapes_of))), np.uint8).reshape(*shapes_of, 8)
  return [cast(bits(), dtype) for _ in range(variants)]


# A layer has no child whose name is a number: that would be a layer's name.
layer_modules = modules.map(lambda module: {f"m{key}" if key.isdigit() else key: child for key, child in module.items()})


@st.composite
def params_collections(draw):
  """A params collection whose layers are flat, as MaxText's Linen models write them, with other things beside them."""
  random, decoder = Random(draw(st.integers(0, 2**20))), {}
  for stack in draw(st.lists(st.sampled_from(STACKS), max_size=2, unique=True)):
    count = draw(st.integers(1, 12))
    for i, layer in enumerate(filled(draw(layer_modules), count, random)):
      decoder[f"{stack}_{i}"] = layer
  decoder["decoder_norm"] = filled(draw(modules), 1, random)[0]
  params = {"decoder": decoder}
  if draw(st.booleans()):
    params["token_embedder"] = filled(draw(modules), 1, random)[0]
  return params


def like(tree, sign):
  return {k: like(v, sign) for k, v in tree.items()} if isinstance(tree, dict) else np.roll(tree, sign)


@st.composite
def optimizers(draw, params):
  """The state of an optimizer, in Linen's form."""
  count = lambda: np.array(draw(st.integers(0, 2**31 - 1)), np.int32)
  moments = lambda sign: {"params": like(params, sign)}
  adam = lambda: {"count": count(), "mu": moments(1), "nu": moments(2)}
  kind = draw(st.sampled_from(("adamw", "schedule", "sgd", "momentum", "multi_steps", "inject", "none")))
  event(f"optimizer: {kind}")
  return {
      "adamw": lambda: [adam(), None, None],
      "schedule": lambda: [adam(), None, {"count": count()}],
      "sgd": lambda: [None, {"count": count()}],
      "momentum": lambda: [{"trace": moments(1)}, None],
      "multi_steps": lambda: {
          "mini_step": count(),
          "gradient_step": count(),
          "inner_opt_state": [adam(), None, None],
          "acc_grads": moments(3),
          "skip_state": (),
      },
      "inject": lambda: {
          "count": count(),
          "hyperparams": {"learning_rate": np.float32(draw(st.floats(0, 1, width=32)))},
          "hyperparams_states": {},
          "inner_state": [adam(), None, None],
      },
      "none": lambda: None,
  }[kind]()


@dataclasses.dataclass(frozen=True)
class Example:
  """A Linen train state, unscanned and flat, and how it shall be converted."""

  state: dict[str, Any]
  scan_layers: bool
  axis: int
  nnx_values: str


@st.composite
def examples(draw):
  params = draw(params_collections())
  collections_ = {"params": params}
  if draw(st.booleans()):
    collections_["batch_stats"] = {"decoder": {"norm": {"mean": np.float32([1, 2, 3])}}}
  state = {"params": collections_}
  optimizer = draw(optimizers(params))
  if optimizer is not None:
    state |= {"opt_state": optimizer, "step": np.array(draw(st.integers(0, 2**31 - 1)), np.int32)}
  return Example(
      state, draw(st.booleans()), draw(st.integers(0, 2)), draw(st.sampled_from(("boxed", "plain", "all_boxed")))
  )


def there(example):
  options = {"scan_layers": example.scan_layers, "param_scan_axis": example.axis, "nnx_values": example.nnx_values}
  return converter.convert_linen_to_nnx(example.state, **options)
