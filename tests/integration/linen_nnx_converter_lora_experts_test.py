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

"""Adapters of all kinds of weights, experts among them, merged: MaxText's model says what it said with them beside it.

Needs a Python with MaxText 0.2.5 in MAXTEXT_0_2_5_PYTHON (`maxtext-0.2.5.txt`).
"""

import pathlib
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import pytest

# Gives a model random adapters, merges these into its weights, and compares the logits of the two.
RUNS = r"""
import json, pathlib, sys
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from flax.linen import partitioning
import orbax.checkpoint as ocp
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.configs import pyconfig
from maxtext.utils import lora_utils, maxtext_utils, model_creation_utils
import maxtext

folder, *settings = sys.argv[1:]
folder, base = pathlib.Path(folder), f"{list(maxtext.__path__)[0]}/configs/base.yml"
config = pyconfig.initialize(["", base, *settings])
mesh = jax.sharding.Mesh(maxtext_utils.create_device_mesh(config), config.mesh_axes)
tokens = np.random.default_rng(0).integers(1, config.vocab_size, (1, config.max_target_length), np.int32)
rules = partitioning.axis_rules(config.logical_axis_rules)

def logits(model):
  at = np.arange(tokens.size, dtype=np.int32)[None]
  return np.asarray(model(tokens, at, np.ones_like(tokens), enable_dropout=False), np.float64)

def boxed(tree):
  return {name: boxed(node) if isinstance(node, dict) else {"value": np.asarray(node)} for name, node in tree.items()}

with mesh, nnx.logical_axis_rules(config.logical_axis_rules), rules:
  create = model_creation_utils.get_nnx_create_model_fn(config, mesh)
  model, plain = create(), create()
  weights = nnx.state(plain, nnx.Param)
  before = logits(model)
  model = lora_utils.apply_lora_to_model(model, mesh, config)
  state, random = nnx.state(model, nnx.LoRAParam), np.random.default_rng(1)
  adapters = jax.tree.map(lambda of: jnp.asarray(random.normal(0, 0.3, of.shape), of.dtype), state.to_pure_dict())
  nnx.replace_by_pure_dict(state, adapters)
  nnx.update(model, state)
  adapted = logits(model)
  for name, tree in (("base", weights.to_pure_dict()), ("adapters", adapters)):
    ocp.PyTreeCheckpointer().save(folder / name, boxed(tree))
  converter.convert_checkpoint(
      folder / "base", folder / "merged", lora_restore_path=str(folder / "adapters"), lora_alpha=8.0,
      params_only=True, direction="nnx_to_nnx", nnx_values="plain", layer_naming="flat"
  )
  nnx.replace_by_pure_dict(weights, converter.load_checkpoint(folder / "merged"))
  nnx.update(plain, weights)
  after = logits(plain)
far = lambda a: float(np.abs(a - adapted).max())
print(json.dumps({"base": far(before), "merged": far(after), "adapters": len(jax.tree.leaves(adapters)) // 2}))
"""
ADAPTED = {"lora.enable_lora": True, "lora.lora_rank": 2, "lora.lora_alpha": 8.0, "override_model_config": True}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "base_moe_mlp_dim": 64, "megablox": False, "sparse_matmul": False}


@pytest.mark.integration
class LoraExpertsTest(parameterized.TestCase):

  @parameterized.named_parameters(
      ("experts", {"model_name": "mixtral-8x7b", "lora.lora_module_path": "decoder/layers/.*"} | MOE, 10),
      (
          "unscanned_experts",
          {"model_name": "mixtral-8x7b", "lora.lora_module_path": "decoder/layers_.*MoeBlock_0", "scan_layers": False}
          | MOE,
          12,
      ),
  )
  def test_the_logits(self, settings, adapters):
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    found = trainer.said(RUNS, tmp, python="MAXTEXT_0_2_5_PYTHON", **trainer.TINY | ADAPTED | settings)
    self.assertEqual(found["adapters"], adapters)
    self.assertGreater(found["base"], 0.5)
    self.assertLess(found["merged"], 1e-4)


if __name__ == "__main__":
  absltest.main()
