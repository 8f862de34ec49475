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

"""Trees as Tunix keeps them, with MaxText's optimizers in its wrappers."""

from flax import nnx
import jax
import jax.numpy as jnp
import linen_nnx_converter_util as util
import optax
from optax import contrib

SCHEDULE = optax.linear_schedule(1e-3, 0.0, 10)
CLIP = optax.clip_by_global_norm(1.0)


def skip_step(inner):
  """A state with the fields of MaxText's skip_step_on_spikes."""

  def init(params):
    fields = {"losses": jnp.zeros(5), "grad_norms": jnp.zeros(5), "count": jnp.int32(0), "is_skipped": jnp.array(False)}
    return fields | {"inner_state": inner.init(params)}

  return optax.GradientTransformation(init, inner.update)


def trainable_mask(inner):
  """As MaxText's trainable_parameters_mask."""
  label = lambda path, _: "trainable" if "layers" in jax.tree_util.keystr(path) else "frozen"
  labels = lambda params: jax.tree_util.tree_map_with_path(label, params)
  return optax.multi_transform({"trainable": inner, "frozen": optax.set_to_zero()}, labels)


# MaxText's, as its `optimizers.get_optimizer` makes them. That of adam_pax has no chain around it.
MAXTEXTS = {
    "adamw": optax.adamw(SCHEDULE),
    "adam_pax": optax.scale_by_adam(),
    "sgd": optax.sgd(SCHEDULE),
    "muon": contrib.muon(SCHEDULE),
    "skip_step": skip_step(optax.adamw(SCHEDULE)),
    "trainable_mask": trainable_mask(optax.adamw(SCHEDULE)),
    "trainable_mask_of_skip_step": trainable_mask(skip_step(optax.adamw(SCHEDULE))),
}
WRAPPERS = {
    "bare": lambda optimizer: optimizer,
    "clip": lambda optimizer: optax.chain(CLIP, optimizer),
    "multi_steps": lambda optimizer: optax.MultiSteps(optimizer, 1),
    "multi_steps_of_clip": lambda optimizer: optax.MultiSteps(optax.chain(CLIP, optimizer), 4),
    "clip_of_multi_steps": lambda optimizer: optax.chain(CLIP, optax.MultiSteps(optimizer, 4)),
}


class Module(nnx.Module):
  """A module with the given attributes."""

  def __init__(self, **attributes):
    for name, value in attributes.items():
      setattr(self, name, value)


def model_of():
  kernel = lambda *shape: Module(kernel=nnx.Param(util.array(*shape)))
  return Module(decoder=Module(layers=kernel(4, 3, 8), norm=Module(scale=nnx.Param(util.array(4)))))


def tunix_tree(optimizer, base=False, model=None):
  """What Tunix's checkpoint manager saves: the states of the model and of the optimizer."""
  model = model or model_of()
  model = Module(base=model) if base else model
  state = nnx.state(nnx.Optimizer(model, optimizer, wrt=nnx.Param), nnx.optimizer.OptState)
  return {"model_params": nnx.state(model), "optimizer_state": state}
