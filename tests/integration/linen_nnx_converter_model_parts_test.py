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

"""MaxText goes on with multi-token prediction, muon of either kind, and encoders of images and audio: with equal losses.

Each run goes by way of a `TrainStateNNX` with a module for each layer to another trainer, another arrangement, or both.

Needs Pythons with the trainers of two releases in MAXTEXT_PYTHON (`maxtext-0.2.4.txt`) and MAXTEXT_0_2_5_PYTHON
(`maxtext-0.2.5.txt`).
"""

from concurrent import futures
import pathlib
import shutil
import tempfile

from absl.testing import absltest
from absl.testing import parameterized
import linen_nnx_converter_trainer as trainer
import numpy as np
import pytest

from maxtext.checkpoint_conversion import linen_nnx_converter as converter

PYTHONS = {"0.2.4": "MAXTEXT_PYTHON", "0.2.5": "MAXTEXT_0_2_5_PYTHON"}
FAST = {"learning_rate": 0.02, "learning_rate_schedule_steps": 10, "warmup_steps_fraction": 0.1}
UNSCANNED = {"scan_layers": False}
MTP, MUON = {"mtp_num_layers": 1}, {"opt_type": "muon"}
MAXTEXT_MUON = MUON | {"muon_type": "maxtext_muon"}
VISION = {
    "override_model_config": True,
    "use_multimodal": True,
    "freeze_vision_encoder_params": False,
    "hidden_size_for_vit": 8,
    "intermediate_size_for_vit": 16,
    "num_attention_heads_for_vit": 2,
}
# A block of six layers and one left over; patches so large that there are no more than the 256 that it gives.
GEMMA3 = VISION | {
    "model_name": "gemma3-4b",
    "base_num_decoder_layers": 7,
    "num_hidden_layers_for_vit": 1,
    "patch_size_for_vit": 56,
    "conv_stride_for_vit": 56,
}
# The trainer has no input for audio: the encoder's weights decay, without gradients.
QWEN3_OMNI = (
    VISION
    | UNSCANNED
    | {
        "model_name": "qwen3-omni-30b-a3b",
        "base_num_decoder_layers": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "base_moe_mlp_dim": 32,
        "sparse_matmul": False,
        "megablox": False,
        "mrope_section": [2, 1, 1],
        "num_hidden_layers_for_vit": 2,
        "image_size_for_vit": 64,
        "out_hidden_size_for_vit": 32,
        "num_position_embeddings_for_vit": 16,
        "deepstack_visual_indexes_for_vit": [0],
        "use_audio": True,
        "freeze_audio_encoder_params": False,
        "d_model_for_audio": 8,
        "encoder_layers_for_audio": 2,
        "encoder_attention_heads_for_audio": 2,
        "encoder_ffn_dim_for_audio": 16,
        "max_source_positions_for_audio": 64,
        "downsample_hidden_size_for_audio": 8,
        "output_dim_for_audio": 32,
        "num_mel_bins_for_audio": 16,
    }
)
# Three MoE layers, with a bias that moves to balance the load of their experts.
MOVING_BIAS = {
    "decoder_block": "deepseek",
    "attention_type": "mla",
    "first_num_dense_layers": 1,
    "shared_experts": 1,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "base_moe_mlp_dim": 32,
    "sparse_matmul": False,
    "megablox": False,
    "routed_score_func": "sigmoid",
    "routed_bias": True,
    "routed_bias_update_rate": 0.05,
    "steps": 3,
    "checkpoint_period": 1,
}
CASES = {
    # Who wrote it, with what settings, and who goes on, with what settings.
    "mtp": ("0.2.4", trainer.LINEN | MTP, "0.2.4", trainer.NNX | MTP | UNSCANNED),
    "mtp_and_maxtext_muon": ("0.2.5", MTP | MAXTEXT_MUON, "0.2.5", MTP | MAXTEXT_MUON | UNSCANNED),
    "muon_as_maxtext_muon": ("0.2.4", trainer.LINEN | MUON, "0.2.5", MAXTEXT_MUON | UNSCANNED),
    "vision": ("0.2.5", GEMMA3, "0.2.5", GEMMA3 | UNSCANNED),
    "vision_and_audio": ("0.2.4", trainer.LINEN | QWEN3_OMNI, "0.2.5", QWEN3_OMNI),
}


@pytest.mark.integration
class ModelPartsTest(parameterized.TestCase):

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tmp = pathlib.Path(tempfile.mkdtemp())
    cls.addClassCleanup(shutil.rmtree, cls.tmp)
    cls.uninterrupted = cls.train({name: case[:2] for name, case in CASES.items()}, "uninterrupted")
    for name, (_, _, release, settings) in CASES.items():
      source, nnx = cls.step(name), cls.tmp / name / "nnx"
      converter.convert_checkpoint(source, nnx, direction="linen_to_nnx", scan_layers=False)
      target = trainer.checkpoints(cls.tmp / name / "resumed")
      converter.convert_checkpoint(nnx, target, maxtext_release=release, scan_layers=settings.get("scan_layers", True))
    cls.resumed = cls.train({name: case[2:] for name, case in CASES.items()}, "resumed")

  @classmethod
  def train(cls, runs, folder):
    """The losses of each run, of the two releases' at the same time."""

    def of_release(release):
      mine = {cls.tmp / name / folder: settings | FAST for name, (by, settings) in runs.items() if by == release}
      return trainer.train_all(mine, PYTHONS[release])

    with futures.ThreadPoolExecutor(2) as pool:
      return {run.parent.name: losses for found in pool.map(of_release, PYTHONS) for run, losses in found.items()}

  @classmethod
  def step(cls, name):
    return trainer.checkpoints(cls.tmp / name / "uninterrupted") / str(trainer.SAVED)

  @parameterized.parameters(*CASES)
  def test_the_trainer_goes_on(self, name):
    losses = self.resumed[name]
    self.assertEqual(sorted(losses), list(range(trainer.SAVED + 1, trainer.STEPS)))
    for step, loss in losses.items():
      self.assertAlmostEqual(loss, self.uninterrupted[name][step], delta=1e-5)

  @parameterized.parameters("vision", "vision_and_audio")
  def test_the_encoder_of_images_is_trained(self, name):
    mu = converter.load_checkpoint(self.step(name))["opt_state"][0]["mu"]["params"]
    self.assertTrue(all(np.any(leaf) for leaf in trainer.jax.tree.leaves(mu["vision_encoder"])))
    self.assertEqual("audio_encoder" in mu, name == "vision_and_audio")


@pytest.mark.integration
class MovingBiasTest(absltest.TestCase):

  def test_maxtext_moves_one_of_the_unscanned_layers_biases_and_by_anothers_update(self):
    """What `docs/conformance.md` says: from equal weights, so with an equal loss, MaxText itself goes on differently."""
    tmp = pathlib.Path(tempfile.mkdtemp())
    self.addCleanup(shutil.rmtree, tmp)
    scanned, unscanned = tmp / "scanned", tmp / "unscanned"
    losses = trainer.train_all({scanned: trainer.NNX | MOVING_BIAS})
    source, target = trainer.checkpoints(scanned) / "1", trainer.checkpoints(unscanned)
    converter.convert_checkpoint(source, target, scan_layers=False, maxtext_release="0.2.4")
    losses |= trainer.train_all({unscanned: trainer.NNX | MOVING_BIAS | UNSCANNED})
    self.assertAlmostEqual(losses[unscanned][2], losses[scanned][2], delta=1e-5)
    first, second, last = self.moves(scanned)[0]
    self.assertTrue(all(np.any(abs(move) > 0.04) for move in (first, second, last - first)))
    np.testing.assert_allclose(self.moves(unscanned), [[last], [0 * last], [0 * last]], atol=1e-3)

  def moves(self, run):
    """By how much step 2 moved each bias: of each module of MoE layers, of each of its layers."""
    before, after = (converter.load_checkpoint(trainer.checkpoints(run) / step) for step in "12")
    before, after = (state["params"]["params"]["decoder"] for state in (before, after))
    bias = lambda layers: layers["DeepSeekMoeBlock_0"]["MoeBlock_0"]["gate"]["bias"].T
    return [np.atleast_2d(bias(after[name]) - bias(before[name])) for name in sorted(before) if name.startswith("moe")]


if __name__ == "__main__":
  absltest.main()
