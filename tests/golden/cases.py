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

"""The shrunk models whose abstract states are golden trees.

A new model is one more row of CASES.
"""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Case:
  """A shrunk model: what it changes in the configuration and in which arrangements it exists."""

  overrides: dict[str, Any]
  scan: tuple[bool, ...] = (True, False)
  devices: int = 1


# Lengths differ from one another wherever the model allows it, so that a mixed-up axis shows.
SMALL = {
    "base_emb_dim": 24,
    "base_mlp_dim": 56,
    "base_moe_mlp_dim": 40,
    "base_num_query_heads": 6,
    "base_num_kv_heads": 3,
    "head_dim": 8,
    "base_num_decoder_layers": 5,
    "vocab_size": 96,
    "max_target_length": 16,
    "per_device_batch_size": 1,
    "opt_type": "adamw",
    "override_model_config": True,
    "megablox": False,
    "sparse_matmul": False,
    "attention": "dot_product",
}

MOE = {"num_experts": 10, "num_experts_per_tok": 2}
# MaxText wants one width where every layer is a mixture of experts.
ALL_MOE = {**MOE, "base_mlp_dim": 40}
TOP_1 = {**MOE, "num_experts_per_tok": 1}
MLA = {
    "base_num_query_heads": 6,
    "base_num_kv_heads": 6,
    "q_lora_rank": 18,
    "kv_lora_rank": 14,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 20,
    "base_num_decoder_layers": 8,
}
DEEPSEEK3 = {"model_name": "deepseek3-671b", "first_num_dense_layers": 3, **MLA, **MOE}
DEEPSEEK32 = {
    **DEEPSEEK3,
    "model_name": "deepseek3.2-671b",
    "indexer_n_heads": 2,
    "indexer_head_dim": 16,
    "indexer_topk": 4,
}
DEEPSEEK4 = {
    "model_name": "deepseek4-284b",
    "base_num_kv_heads": 1,
    "base_num_decoder_layers": 13,
    "compress_ratios": [0, 0] + [4, 128] * 5 + [4],
    "qk_rope_head_dim": 4,
    "q_lora_rank": 18,
    "o_groups": 2,
    "o_lora_rank": 14,
    "indexer_n_heads": 4,
    "indexer_head_dim": 16,
    "indexer_topk": 4,
    **ALL_MOE,
    "num_experts": 11,
}
GEMMA4 = {"global_head_dim": 16, "global_num_kv_heads": 1}
GDN = {
    "gdn_conv_kernel_dim": 4,
    "gdn_key_head_dim": 14,
    "gdn_value_head_dim": 18,
    "gdn_num_key_heads": 2,
    "gdn_num_value_heads": 6,
    "gdn_chunk_size": 8,
    "base_num_decoder_layers": 20,
}
ENGRAM = {
    "model_name": "deepseek-custom",
    **MLA,
    **MOE,
    "indexer_n_heads": 2,
    "indexer_head_dim": 16,
    "indexer_topk": 4,
    "first_num_dense_layers": 3,
    "base_num_decoder_layers": 9,
    "engram_layers": [1, 5],
    "engram_num_heads": 2,
    "engram_head_dim": 12,
    "engram_vocab_bases": [211, 223],
}
VIT = {
    "hidden_size_for_vit": 32,
    "intermediate_size_for_vit": 44,
    "num_attention_heads_for_vit": 4,
    "num_hidden_layers_for_vit": 7,
}
LLAMA4_VIT = {
    **VIT,
    "intermediate_size_for_vit": 128,  # The pixel shuffle makes it four times the hidden size.
    "projector_input_dim_for_vit": 52,
    "projector_output_dim_for_vit": 52,
    "vision_output_dim_for_vit": 52,
}
QWEN_VIT = {
    **VIT,
    "out_hidden_size_for_vit": 24,
    "num_position_embeddings_for_vit": 9,
    "image_size_for_vit": 768,
    "mrope_section": [2, 1, 1],
}
AUDIO = {
    "d_model_for_audio": 28,
    "encoder_layers_for_audio": 9,
    "encoder_attention_heads_for_audio": 2,
    "encoder_ffn_dim_for_audio": 52,
    "downsample_hidden_size_for_audio": 13,
    "output_dim_for_audio": 24,
}
PIPELINE = {"ici_pipeline_parallelism": 2, "num_pipeline_microbatches": 4, "per_device_batch_size": 2}

STAGES = {**PIPELINE, "base_num_decoder_layers": 40, "num_layers_per_pipeline_stage": 4}

# A new model is a new row.
CASES = {
    "llama2": Case({"model_name": "llama2-7b"}),
    "llama2-scan_axis_0": Case({"model_name": "llama2-7b", "param_scan_axis": 0}, scan=(True,)),
    "llama2-dropout": Case({"model_name": "llama2-7b", "dropout_rate": 0.1, "enable_dropout": True}),
    "llama3": Case({"model_name": "llama3-8b"}),
    "mistral": Case({"model_name": "mistral-7b"}),
    "mixtral": Case({"model_name": "mixtral-8x7b", **ALL_MOE}),
    "gemma": Case({"model_name": "gemma-2b", "base_num_kv_heads": 1}),
    "gemma2": Case({"model_name": "gemma2-2b"}),
    "gemma3-remainder": Case({"model_name": "gemma3-4b", "base_num_decoder_layers": 26}),
    "gemma3-even": Case({"model_name": "gemma3-4b", "base_num_decoder_layers": 12}),
    "gemma3-short": Case({"model_name": "gemma3-4b", "base_num_decoder_layers": 4}),
    "gemma4-remainder": Case({"model_name": "gemma4-31b", "base_num_decoder_layers": 16, **GEMMA4}),
    "gemma4-even": Case({"model_name": "gemma4-31b", "base_num_decoder_layers": 12, **GEMMA4}),
    "gemma4-short": Case({"model_name": "gemma4-31b", "base_num_decoder_layers": 4, **GEMMA4}),
    "gemma4-scan_axis_0": Case(
        {"model_name": "gemma4-31b", "base_num_decoder_layers": 16, "param_scan_axis": 0, **GEMMA4}, scan=(True,)
    ),
    "gemma4-moe": Case({"model_name": "gemma4-26b", "base_num_decoder_layers": 44, **GEMMA4, **MOE}),
    "gemma4-small": Case(
        {
            "model_name": "gemma4-e2b",
            "base_num_kv_heads": 1,
            "base_num_decoder_layers": 10,
            "num_kv_shared_layers": 5,
            "global_head_dim": 16,
            "hidden_size_per_layer_input": 14,
            "vocab_size_per_layer_input": 92,
            "scan_layers": False,
        },
        scan=(False,),
    ),
    "deepseek2": Case({"model_name": "deepseek2-16b", **MLA, **MOE, "q_lora_rank": 0, "first_num_dense_layers": 1}),
    "deepseek3": Case(DEEPSEEK3),
    "deepseek3-scan_axis_0": Case({**DEEPSEEK3, "param_scan_axis": 0}, scan=(True,)),
    "deepseek3.2": Case(DEEPSEEK32),
    "deepseek4": Case(DEEPSEEK4),
    "deepseek4-no_bias": Case({**DEEPSEEK4, "routed_bias": False}),
    "kimi": Case({**DEEPSEEK3, "model_name": "kimi-k2-1t", "first_num_dense_layers": 1}),
    "deepseek3-mtp1": Case({**DEEPSEEK3, "mtp_num_layers": 1}),
    "deepseek3-mtp2": Case({**DEEPSEEK3, "mtp_num_layers": 2}),
    "engram": Case(ENGRAM),
    "llama4-interleave1": Case({"model_name": "llama4-17b-16e", "base_num_decoder_layers": 20, **TOP_1}),
    "llama4-interleave2": Case({"model_name": "llama4-17b-128e", "base_num_decoder_layers": 20, **TOP_1}),
    "gpt-oss": Case({"model_name": "gpt-oss-20b", "base_num_decoder_layers": 10, **MOE}),
    "olmo3": Case({"model_name": "olmo3-7b", "base_num_decoder_layers": 20}),
    "envy": Case({"model_name": "envy-test", "base_num_decoder_layers": 10, **MOE}),
    "qwen2": Case({"model_name": "qwen2.5-1.5b"}),
    "qwen3": Case({"model_name": "qwen3-0.6b"}),
    "qwen3-moe": Case({"model_name": "qwen3-30b-a3b", **MOE}),
    "qwen3-custom": Case(
        {
            "model_name": "qwen3-custom-30b-a3b",
            **ALL_MOE,
            "attention_output_dim": 28,
            "moe_expert_input_dim": 28,
        }
    ),
    "qwen3-next": Case({"model_name": "qwen3-next-80b-a3b", **GDN, **MOE}),
    "qwen3-next-remainder": Case({"model_name": "qwen3-next-80b-a3b", **GDN, **MOE, "base_num_decoder_layers": 22}),
    "qwen3.5": Case({"model_name": "qwen3.5-35b-a3b", **GDN, **MOE, "mrope_section": [1, 0, 0]}),
    "qwen3-omni": Case(
        {
            "model_name": "qwen3-omni-30b-a3b",
            **MOE,
            **QWEN_VIT,
            **AUDIO,
            "deepstack_visual_indexes_for_vit": [1, 3],
            "scan_layers": False,
        },
        scan=(False,),
    ),
    "weaver": Case({"model_name": "weaver-mini", **QWEN_VIT, "deepstack_visual_indexes_for_vit": [1, 3]}),
    "gpt3": Case({"model_name": "gpt3-52k", "base_num_kv_heads": 6, "trainable_position_size": 17}),
    "gpt3-adam_pax": Case(
        {
            "model_name": "gpt3-52k",
            "base_num_kv_heads": 6,
            "trainable_position_size": 17,
            "opt_type": "adam_pax",
        }
    ),
    "default": Case({"decoder_block": "default"}),
    "simple": Case({"decoder_block": "simple"}),
    "simple_mlp": Case({"decoder_block": "simple_mlp"}),
    "pipeline": Case({"model_name": "llama2-7b", "base_num_decoder_layers": 10, **PIPELINE}, devices=2),
    "pipeline-one_repeat": Case(
        {"model_name": "llama2-7b", "base_num_decoder_layers": 10, "num_layers_per_pipeline_stage": 5, **PIPELINE},
        devices=2,
    ),
    "pipeline-outside": Case(
        {"model_name": "llama2-7b", "base_num_decoder_layers": 17, "pipeline_parallel_layers": 10, **PIPELINE}, devices=2
    ),
    "pipeline-stages_of_4": Case({"model_name": "llama2-7b", **STAGES, "scan_layers_per_stage": False}, devices=2),
    "pipeline-scanned_stages": Case({"model_name": "llama2-7b", **STAGES, "scan_layers_per_stage": True}, devices=2),
    "pipeline-scan_axis_0": Case(
        {"model_name": "llama2-7b", **STAGES, "scan_layers_per_stage": True, "param_scan_axis": 0}, (True,), devices=2
    ),
    "pipeline-deepseek3": Case(
        {**DEEPSEEK3, "base_num_decoder_layers": 17, "pipeline_parallel_layers": 10, **PIPELINE}, devices=2
    ),
    "pipeline-gpt-oss": Case({"model_name": "gpt-oss-20b", **MOE, "base_num_decoder_layers": 20, **PIPELINE}, devices=2),
    "fp8": Case({"model_name": "llama2-7b", "quantization": "fp8"}),
    "fp8-deepseek3": Case({**DEEPSEEK3, "quantization": "fp8"}),
    "aqt-int8": Case({"model_name": "llama2-7b", "quantization": "int8"}),
    "vision-gemma3": Case(
        {
            "model_name": "gemma3-4b",
            "use_multimodal": True,
            "base_num_decoder_layers": 14,
            "max_target_length": 320,
            **VIT,
        }
    ),
    "vision-llama4": Case(
        {
            "model_name": "llama4-17b-16e",
            "use_multimodal": True,
            "base_num_decoder_layers": 8,
            "max_target_length": 320,
            **TOP_1,
            **LLAMA4_VIT,
        }
    ),
}
