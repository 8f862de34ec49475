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

"""RNG state made by MaxText's own model: a Linen checkpoint becomes a `TrainStateNNX` with nothing left abstract.

Needs Pythons with the trainers of both releases in MAXTEXT_PYTHON (0.2.4) and MAXTEXT_0_2_5_PYTHON, which also run the
command and judge its result.
"""

import json
import os
import pathlib
import shutil
import subprocess
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import pytest

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"
SEED = {"init_weights_seed": 7, "dropout_rate": 0.1}
# Restores the checkpoint as MaxText does, and compares it with a model that MaxText has just made.
JUDGE = r"""
import json, sys
import jax, numpy as np
from flax import nnx
from maxtext.checkpoint_conversion import linen_nnx_converter as converter
from maxtext.checkpoint_conversion.linen_nnx_converter.maxtext_model import run_config
from maxtext.common import train_state_nnx
from maxtext.utils import model_creation_utils

jax.config.update("jax_default_prng_impl", "unsafe_rbg")
path, *arguments = sys.argv[1:]
config = run_config.load(arguments)
mesh = run_config.device_mesh(config)
create_model, model = model_creation_utils.create_nnx_abstract_model(config, mesh)
tx = run_config._optimizer(config, model, mesh)

def create_state():
  model = create_model()
  return train_state_nnx.TrainStateNNX(model, nnx.Optimizer(model, tx, wrt=nnx.Param))

with mesh, nnx.logical_axis_rules(config.logical_axis_rules):
  abstract = nnx.state(nnx.eval_shape(create_state))
  fresh = nnx.state(create_model(), nnx.RngState)
tree = converter.load_checkpoint(path)
if "params" in tree:
  linen, aux, _ = train_state_nnx.split_for_checkpoint(abstract)
  aux_tree, nnx_tree = tree["nnx_aux"], train_state_nnx.from_linen_checkpoint_dict(tree)
  nnx.replace_by_pure_dict(linen, nnx_tree)
  nnx.replace_by_pure_dict(aux, aux_tree)
  state = nnx.merge_state(linen, aux)
else:
  state = abstract
  nnx.replace_by_pure_dict(state, nnx.restore_int_paths(tree))
flat = lambda tree: jax.tree_util.tree_flatten_with_path(tree)[0]
data = lambda key: jax.random.key_data(key) if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) else key

def rngs(state):
  only = nnx.split_state(state, nnx.RngState, ...)[0]
  return {jax.tree_util.keystr(path): np.asarray(data(leaf)).tolist() for path, leaf in flat(only)}

left = [jax.tree_util.keystr(path) for path, leaf in flat(state) if isinstance(leaf, jax.ShapeDtypeStruct)]
print(json.dumps({"abstract": left, "restored": rngs(state["model"]), "fresh": rngs(fresh)}))
"""


@pytest.mark.integration
class RngsTest(parameterized.TestCase):

  def setUp(self):
    super().setUp()
    self.tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, self.tmp)

  def run_python(self, python, *arguments, **settings):
    settings = trainer.TINY | {"base_output_directory": self.tmp} | SEED | settings
    command = [os.environ[python], *map(str, arguments), "base.yml"]
    command += [f"{name}={value}" for name, value in settings.items()]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)

  @parameterized.parameters(  # Each two of the three with all their values.
      ("MAXTEXT_PYTHON", True, True),
      ("MAXTEXT_PYTHON", False, False),
      ("MAXTEXT_0_2_5_PYTHON", True, False),
      ("MAXTEXT_0_2_5_PYTHON", False, True),
  )
  def test_nothing_is_left_abstract(self, python, scan_layers, as_nnx):
    settings = {"scan_layers": scan_layers} | (trainer.NNX if python == "MAXTEXT_PYTHON" else {})
    flags = [f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--init_rngs"]
    flags += ["--direction=linen_to_nnx", "--nnx_values=plain"] if as_nnx else []
    done = self.run_python(python, "-m", "maxtext.checkpoint_conversion.linen_nnx_converter", *flags, **settings)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r"verified: .* \d+ made by MaxText's model\)")
    done = self.run_python(python, "-c", JUDGE, f"{self.tmp}/out", **settings)
    self.assertEqual(done.returncode, 0, done.stderr[-3000:])
    found = json.loads(done.stdout.splitlines()[-1])
    self.assertEqual(found["abstract"], [])
    self.assertNotEmpty(found["fresh"])
    self.assertEqual(found["restored"], found["fresh"])

  def test_a_linen_target_has_no_place_for_it(self):
    flags = [f"--source_path={SOURCE}", f"--target_path={self.tmp}/out", "--init_rngs"]
    module = "maxtext.checkpoint_conversion.linen_nnx_converter"
    done = self.run_python("MAXTEXT_PYTHON", "-m", module, *flags, **trainer.LINEN)
    self.assertEqual(done.returncode, 1)
    self.assertIn("--init_rngs: expected a target with NNX's RNG state, found the layout Linen TrainState", done.stderr)
    done = self.run_python("MAXTEXT_0_2_5_PYTHON", "-m", module, *flags, "--maxtext_release=0.2.6")
    self.assertEqual(done.returncode, 1)
    self.assertIn("expected a target for the NNX trainer of the installed MaxText, found the nnx trainer of", done.stderr)


if __name__ == "__main__":
  absltest.main()
