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

"""The settings of a run of MaxText that writes golden trees, and those of a model that decide a layout."""

# Settings of the run, not of the model.
RUN = {
    "run_name": "golden",
    "base_output_directory": "",
    "hardware": "cpu",
    "skip_jax_distributed_system": True,
    "dataset_type": "synthetic",
    "steps": 3,
    "enable_checkpointing": False,
    "async_checkpointing": False,
    "enable_goodput_recording": False,
    "monitor_goodput": False,
    "enable_checkpoint_cloud_logger": False,
    "log_config": False,
}

# The settings that decide a layout, recorded beside each case.
LAYOUT_KEYS = (
    "model_name",
    "decoder_block",
    "num_decoder_layers",
    "base_num_decoder_layers",
    "first_num_dense_layers",
    "first_num_hash_layers",
    "inhomogeneous_layer_cycle_interval",
    "interleave_moe_layer_step",
    "nope_layer_interval",
    "param_scan_axis",
    "engram_layers",
    "mtp_num_layers",
    "using_pipeline_parallelism",
    "num_pipeline_repeats",
    "num_layers_per_pipeline_stage",
    "pipeline_parallel_layers",
    "scan_layers_per_stage",
    "scan_pipeline_iterations",
    "scan_pipeline_repeats",
    "ici_pipeline_parallelism",
    "num_kv_shared_layers",
    "num_hidden_layers_for_vit",
    "encoder_layers_for_audio",
    "num_experts",
    "routed_bias",
    "quantization",
    "opt_type",
    "mu_dtype",
    "weight_dtype",
    "enable_dropout",
    "dropout_rate",
)
