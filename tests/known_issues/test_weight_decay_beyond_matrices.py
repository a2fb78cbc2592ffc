"""Weight decay reached gains of weight normalisation, class tokens and tables of positions, which have several axes.

timm's `param_groups_weight_decay` spares such parameters by a list that models bring, which can miss some
(huggingface/pytorch-image-models#2713); here one rule names them.
"""

import re

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mowe_ray.model.adapter import ADAPTERS, build_adapter
from mowe_ray.model.encoders import encoder_class, read_config
from mowe_ray.training.optimizer import decays
from tests.tiny_models import ENCODER_CONFIGS, LANGUAGE_MODEL_FAMILIES, tiny_language_model_config

CONVOLUTIONAL_POSITIONS = {"model.encoder.pos_conv_embed.conv.parametrizations.weight.original0"}
UNDECAYED = {
    "whisper": {"model.embed_positions.weight"},
    "hubert": CONVOLUTIONAL_POSITIONS,
    "wav2vec2": CONVOLUTIONAL_POSITIONS,
    "wavlm": CONVOLUTIONAL_POSITIONS
    | {"model.encoder.layers.N.attention.gru_rel_pos_const", "model.encoder.layers.N.attention.rel_attn_embed.weight"},
    "data2vec-audio": set(),
    "audio-spectrogram-transformer": {
        "model.embeddings.cls_token",
        "model.embeddings.distillation_token",
        "model.embeddings.position_embeddings",
    },
    "seqcnn": set(),
    "stack_mlp": set(),
    "qformer": {"positions"},
    **{family: set() for family in LANGUAGE_MODEL_FAMILIES},
    "mixtral": set(),
    "gpt2": {"transformer.wpe.weight"},
    "opt": {"model.decoder.embed_positions.weight"},
    "gpt_oss": {
        "model.layers.N.mlp.experts.gate_up_proj_bias",
        "model.layers.N.mlp.experts.down_proj_bias",
    },
    "mamba": {"backbone.layers.N.mixer.A_log"},
}
"""Parameters of two axes or more that do not decay, written down by reading the models."""


def network(name: str) -> torch.nn.Module:
    if name in ENCODER_CONFIGS:
        config = read_config(ENCODER_CONFIGS[name]())
        family = encoder_class(config)
        return family(config, family.make_front_end(config, {}))
    if name in ADAPTERS:
        return build_adapter(name, 96, 32, 64, 8)
    sizes = {"word_embed_proj_dim": 32, "ffn_dim": 64} if name == "opt" else {}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**tiny_language_model_config(name, **sizes)))


@pytest.mark.parametrize("name", UNDECAYED)
def test_exactly_matrices_and_kernels_decay(name: str) -> None:
    with torch.device("meta"):
        shapes = {key: p.ndim for key, p in network(name).named_parameters()}
    spared = {key for key, axes in shapes.items() if not decays(key, axes)}
    assert {re.sub(r"\.\d+\.", ".N.", key) for key in spared if shapes[key] >= 2} == UNDECAYED[name]
    assert {key for key, axes in shapes.items() if axes < 2} <= spared
    matrices = [key for key in shapes if key not in spared]
    assert len(matrices) >= 2


@pytest.mark.parametrize("name", ["base_layer.weight", "lora_A.default.weight", "token_projection.weight", "k.weight"])
def test_a_matrix_with_such_a_word_in_its_name_decays(name: str) -> None:
    assert decays(name, 2)
    assert not decays(name, 1)
