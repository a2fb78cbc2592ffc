"""Public sizes of the checkpoints that the presets name, so that `--dry-run` needs no network.

Each entry repeats what the model's published config.json says about shapes; values that equal the
defaults of its transformers configuration class are left out. A checkpoint that is neither listed
nor within reach is reported as unknown: sizes are never guessed.

Sources: the config.json of each hub repository, as of its first release; widths and depths also in
arXiv 2212.04356 table 1 (Whisper), 2106.07447 table 1 (HuBERT) and 2404.14219 section 2 (Phi-3).
"""

from typing import Any

_HUBERT_BASE = {"model_type": "hubert"}  # HubertConfig's defaults are this model

KNOWN_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "openai/whisper-large-v3": {
        "model_type": "whisper",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
    },
    "openai/whisper-tiny": {
        "model_type": "whisper",
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "num_mel_bins": 80,
    },
    "facebook/hubert-base-ls960": _HUBERT_BASE,
    "superb/hubert-base-superb-er": _HUBERT_BASE,
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""Inline configuration by hub id."""
