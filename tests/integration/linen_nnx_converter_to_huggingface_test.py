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

"""MaxText's `to_huggingface` makes the same files of an NNX train state as of the Linen train state that it was made of.

Needs a Python with MaxText 0.2.4's trainer (`maxtext-0.2.4.txt`) in MAXTEXT_PYTHON. The tokenizer, which `to_huggingface`
would fetch, is made here.
"""

import os
import pathlib
import subprocess
import tempfile
import unittest

from absl.testing import absltest
import linen_nnx_converter_trainer as trainer
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

SOURCE = pathlib.Path(__file__).parents[1] / "assets" / "linen_nnx_converter" / "maxtext-0.2.4" / "linen_scan"
# Each pair of a checkpoint and a folder, in one process, which takes half of its time to import.
SCRIPT = """
from absl import app
from maxtext.checkpoint_conversion import to_huggingface
import tokenizers
import transformers

def main(argv):
  program, tokenizer, pairs, *settings = argv
  model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
  transformers.PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>").save_pretrained(tokenizer)
  for pair in pairs.split(","):
    source, target = pair.split("=")
    to_huggingface.main([program, f"load_parameters_path={source}", f"base_output_directory={target}", *settings])

app.run(main)
"""
SIZES = ("base_emb_dim", "base_mlp_dim", "base_num_query_heads", "base_num_kv_heads", "base_num_decoder_layers")
SETTINGS = {
    **{name: trainer.TINY[name] for name in (*SIZES, "head_dim", "vocab_size")},
    "model_name": "llama3.1-8b",
    "override_model_config": True,
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "use_multimodal": False,
}


@pytest.mark.integration
class ToHuggingFaceTest(unittest.TestCase):

  def test_the_weights_of_an_nnx_train_state(self):
    tmp = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    converter.convert_checkpoint(SOURCE, tmp / "nnx", scan_layers=False)
    converter.convert_checkpoint(tmp / "nnx", tmp / "params", params_only=True, scan_layers=True)
    sources = {"of_linen": SOURCE, "of_nnx": tmp / "params"}
    pairs = ",".join(f"{source / '2' / 'items'}={tmp / name}" for name, source in sources.items())
    flags = ["--override_model_architecture", f"--hf_model_path={tmp / 'tokenizer'}"]
    command = [os.environ["MAXTEXT_PYTHON"], "-c", SCRIPT, *flags, tmp / "tokenizer", pairs]
    done = subprocess.run(
        command + [f"{name}={value}" for name, value in SETTINGS.items()],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
    )
    self.assertEqual(done.returncode, 0, done.stderr[-5000:])
    for name in ("config.json", "model.safetensors"):
      of_linen, of_nnx = ((tmp / folder / name).read_bytes() for folder in sources)
      self.assertTrue(of_linen == of_nnx, name)
    self.assertIn(b'"model.layers.3.mlp.gate_proj.weight"', of_nnx)


if __name__ == "__main__":
  absltest.main()
