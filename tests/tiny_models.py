"""Tiny models in the formats of real checkpoints: configurations, and folders of `save_pretrained`.

Plain functions that several test folders share. Nothing is downloaded; a model has a few thousand
weights, and a folder is written sharded, as large checkpoints are.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from mowe_ray.model.encoders import ENCODERS

Config = dict[str, Any]

# ---- audio encoders ---------------------------------------------------------------------------


def tiny_whisper_config(**changes: Any) -> Config:
    """A Whisper with the real number of positions (30 s)."""
    sizes = {"d_model": 32, "num_mel_bins": 20, "max_source_positions": 1500, "vocab_size": 64}
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 64}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    return {"model_type": "whisper", **sizes, **encoder, **decoder, **tokens, **changes}


def tiny_wav2vec2_config(**changes: Any) -> Config:
    """A Wav2Vec2 with the real strides (400 samples per frame, one every 320)."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "conv_dim": [16] * 7,
        "num_conv_pos_embeddings": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    return {"model_type": "wav2vec2", **sizes, **changes}


def tiny_hubert_config(**changes: Any) -> Config:
    """A HuBERT, otherwise as `tiny_wav2vec2_config`."""
    return tiny_wav2vec2_config(**{"model_type": "hubert", **changes})


def tiny_wavlm_config(**changes: Any) -> Config:
    """A WavLM, otherwise as `tiny_wav2vec2_config`."""
    return tiny_wav2vec2_config(**{"model_type": "wavlm", **changes})


def tiny_data2vec_audio_config(**changes: Any) -> Config:
    """A Data2VecAudio; its positions come from a stack of small convolutions."""
    positions = {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}
    return tiny_wav2vec2_config(**{"model_type": "data2vec-audio", **positions, **changes})


def tiny_ast_config(**changes: Any) -> Config:
    """An AST with a window of 64 filter-bank frames (0.64 s)."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_length": 64,
        "num_mel_bins": 32,
    }
    return {"model_type": "audio-spectrogram-transformer", **sizes, **changes}


def tiny_unispeech_config(**changes: Any) -> Config:
    """A UniSpeech, otherwise as `tiny_wav2vec2_config`."""
    return tiny_wav2vec2_config(**{"model_type": "unispeech", **changes})


def tiny_unispeech_sat_config(**changes: Any) -> Config:
    """A UniSpeech-SAT, otherwise as `tiny_wav2vec2_config`."""
    return tiny_wav2vec2_config(**{"model_type": "unispeech-sat", **changes})


def tiny_qwen2_audio_config(**changes: Any) -> Config:
    """The audio tower of a Qwen2-Audio with the real number of positions (30 s)."""
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    return {"model_type": "qwen2_audio_encoder", **sizes, "num_mel_bins": 20, **changes}


def tiny_audioflamingo3_config(**changes: Any) -> Config:
    """The audio tower of an Audio Flamingo 3, otherwise as `tiny_qwen2_audio_config`."""
    return tiny_qwen2_audio_config(**{"model_type": "audioflamingo3_encoder", **changes})


def tiny_wav2vec2_bert_config(**changes: Any) -> Config:
    """A Wav2Vec2-BERT over 80 bands, as the real feature extractor makes them."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "wav2vec2-bert", **sizes, "vocab_size": 32, **changes}


def tiny_parakeet_config(**changes: Any) -> Config:
    """The FastConformer of a Parakeet over 80 bands."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "parakeet_encoder", **sizes, "subsampling_conv_channels": 8, **changes}


def tiny_moonshine_config(**changes: Any) -> Config:
    """A Moonshine, whose decoder has one layer."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64}
    layers = {"encoder_num_hidden_layers": 2, "decoder_num_hidden_layers": 1}
    heads = {"encoder_num_attention_heads": 2, "decoder_num_attention_heads": 2}
    return {"model_type": "moonshine", **sizes, **layers, **heads, **changes}


def tiny_wav2vec2_conformer_config(**changes: Any) -> Config:
    """A Wav2Vec2-Conformer, otherwise as `tiny_wav2vec2_config`."""
    return tiny_wav2vec2_config(
        **{"model_type": "wav2vec2-conformer", "conv_depthwise_kernel_size": 5, "vocab_size": 32, **changes}
    )


def tiny_sew_config(**changes: Any) -> Config:
    """A SEW, otherwise as `tiny_wav2vec2_config`, whose convolutions it takes."""
    strides = {"conv_stride": [5, 2, 2, 2, 2, 2, 2], "conv_kernel": [10, 3, 3, 3, 3, 2, 2]}
    return tiny_wav2vec2_config(**{"model_type": "sew", **strides, **changes})


def tiny_sew_d_config(**changes: Any) -> Config:
    """A SEW-D, otherwise as `tiny_sew_config`."""
    return tiny_sew_config(**{"model_type": "sew-d", "position_buckets": 8, **changes})


def tiny_voxtral_config(**changes: Any) -> Config:
    """The audio tower of a Voxtral with the real number of positions (30 s)."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "voxtral_encoder", **sizes, "num_mel_bins": 20, **changes}


def tiny_glmasr_config(**changes: Any) -> Config:
    """The audio tower of a GLM-ASR, otherwise as `tiny_voxtral_config`."""
    return tiny_voxtral_config(**{"model_type": "glmasr_encoder", **changes})


def tiny_qwen3_asr_config(**changes: Any) -> Config:
    """The audio tower of a Qwen3-ASR that attends within two seconds."""
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    small = {"num_mel_bins": 20, "downsample_hidden_size": 4, "n_window_infer": 200}
    return {"model_type": "qwen3_asr_encoder", **sizes, **small, **changes}


def tiny_clap_config(**changes: Any) -> Config:
    """The audio tower of a CLAP with two stages, which makes 12.8 frames a second."""
    sizes = {"num_mel_bins": 16, "spec_size": 128, "patch_embeds_hidden_size": 16, "hidden_size": 32, "window_size": 4}
    return {"model_type": "clap_audio_model", **sizes, "depths": [2, 2], "num_attention_heads": [2, 4], **changes}


def tiny_moss_config(**changes: Any) -> Config:
    """The audio tower of a MOSS-Transcribe-Diarize, otherwise as `tiny_voxtral_config`."""
    return tiny_voxtral_config(**{"model_type": "moss_transcribe_diarize_audio", **changes})


def tiny_voxtral_realtime_config(**changes: Any) -> Config:
    """The audio tower of a Voxtral Realtime that looks back half a second."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    more = {"intermediate_size": 64, "head_dim": 16, "num_mel_bins": 20, "sliding_window": 25}
    return {"model_type": "voxtral_realtime_encoder", **sizes, **more, **changes}


def tiny_speecht5_config(**changes: Any) -> Config:
    """A SpeechT5, whose decoder has one layer."""
    decoder = {
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 32,
        "speech_decoder_prenet_units": 8,
    }
    encoder = {"encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "vocab_size": 32}
    return tiny_wav2vec2_config(**{"model_type": "speecht5", **encoder, **decoder, **changes})


def tiny_seamless_config(**changes: Any) -> Config:
    """A SeamlessM4T over 80 bands, with small decoders."""
    sizes = {"hidden_size": 32, "speech_encoder_layers": 2, "speech_encoder_attention_heads": 2, "vocab_size": 32}
    more = {"speech_encoder_intermediate_size": 64, "conv_depthwise_kernel_size": 5, "t2u_vocab_size": 32}
    parts = ("encoder", "decoder", "t2u_encoder", "t2u_decoder")
    text = {f"{part}_layers": 1 for part in parts} | {f"{part}_ffn_dim": 32 for part in parts}
    heads = {f"{part}_attention_heads": 2 for part in parts}
    return {"model_type": "seamless_m4t", **sizes, **more, **text, **heads, **changes}


def tiny_seamless_v2_config(**changes: Any) -> Config:
    """A SeamlessM4T v2 that attends to chunks of 0.2 s, otherwise as `tiny_seamless_config`."""
    chunks = {"speech_encoder_chunk_size": 10, "speech_encoder_left_chunk_num": 1}
    return tiny_seamless_config(**{"model_type": "seamless_m4t_v2", **chunks, **changes})


def tiny_lasr_config(**changes: Any) -> Config:
    """The conformer of a LASR."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return {"model_type": "lasr_encoder", **sizes, "subsampling_conv_channels": 8, "conv_kernel_size": 8, **changes}


def tiny_qwen3_omni_config(**changes: Any) -> Config:
    """The audio tower of a Qwen3-Omni, otherwise as `tiny_qwen3_asr_config`."""
    return tiny_qwen3_asr_config(**{"model_type": "qwen3_omni_moe_audio_encoder", "output_dim": 16, **changes})


def tiny_qwen2_5_omni_config(**changes: Any) -> Config:
    """The audio tower of a Qwen2.5-Omni that attends within 0.4 s."""
    small = {"n_window": 20, "output_dim": 16}
    return tiny_qwen2_audio_config(**{"model_type": "qwen2_5_omni_audio_encoder", **small, **changes})


def tiny_speech_to_text_config(**changes: Any) -> Config:
    """A Speech2Text over 80 bands, whose decoder has one layer."""
    sizes = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "vocab_size": 32}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 32, "conv_channels": 16}
    return {"model_type": "speech_to_text", **sizes, **decoder, **changes}


def tiny_fun_asr_nano_config(**changes: Any) -> Config:
    """The audio tower of a Fun-ASR-Nano over 80 bands; its first layer makes the width of the others."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64}
    small = {"fsmn_kernel_size": 5, "num_timestamp_prediction_layers": 1}
    return {"model_type": "fun_asr_nano_encoder", **sizes, **small, **changes}


def tiny_granite_speech_config(**changes: Any) -> Config:
    """The conformer of a Granite Speech over 80 bands that attends within 0.4 s."""
    sizes = {"hidden_dim": 32, "num_layers": 2, "num_heads": 2, "output_dim": 8, "context_size": 20, "max_pos_emb": 32}
    return {"model_type": "granite_speech_encoder", **sizes, "conv_kernel_size": 5, **changes}


def tiny_granite_speech_plus_config(**changes: Any) -> Config:
    """The conformer of a Granite Speech Plus, otherwise as `tiny_granite_speech_config`."""
    return tiny_granite_speech_config(**{"model_type": "granite_speech_plus_encoder", **changes})


ENCODER_CONFIGS = {
    "whisper": tiny_whisper_config,
    "hubert": tiny_hubert_config,
    "wav2vec2": tiny_wav2vec2_config,
    "wavlm": tiny_wavlm_config,
    "data2vec-audio": tiny_data2vec_audio_config,
    "audio-spectrogram-transformer": tiny_ast_config,
    "unispeech": tiny_unispeech_config,
    "unispeech-sat": tiny_unispeech_sat_config,
    "qwen2_audio_encoder": tiny_qwen2_audio_config,
    "audioflamingo3_encoder": tiny_audioflamingo3_config,
    "wav2vec2-bert": tiny_wav2vec2_bert_config,
    "parakeet_encoder": tiny_parakeet_config,
    "moonshine": tiny_moonshine_config,
    "wav2vec2-conformer": tiny_wav2vec2_conformer_config,
    "sew": tiny_sew_config,
    "sew-d": tiny_sew_d_config,
    "voxtral_encoder": tiny_voxtral_config,
    "glmasr_encoder": tiny_glmasr_config,
    "qwen3_asr_encoder": tiny_qwen3_asr_config,
    "clap_audio_model": tiny_clap_config,
    "moss_transcribe_diarize_audio": tiny_moss_config,
    "voxtral_realtime_encoder": tiny_voxtral_realtime_config,
    "speecht5": tiny_speecht5_config,
    "seamless_m4t": tiny_seamless_config,
    "seamless_m4t_v2": tiny_seamless_v2_config,
    "lasr_encoder": tiny_lasr_config,
    "qwen3_omni_moe_audio_encoder": tiny_qwen3_omni_config,
    "qwen2_5_omni_audio_encoder": tiny_qwen2_5_omni_config,
    "speech_to_text": tiny_speech_to_text_config,
    "fun_asr_nano_encoder": tiny_fun_asr_nano_config,
    "granite_speech_encoder": tiny_granite_speech_config,
    "granite_speech_plus_encoder": tiny_granite_speech_plus_config,
}
"""Maker of a tiny configuration by model_type."""

FULL_MODELS = {
    "whisper": "WhisperForConditionalGeneration",
    "hubert": "HubertForSequenceClassification",
    "wav2vec2": "Wav2Vec2ForCTC",
    "wavlm": "WavLMForCTC",
    "data2vec-audio": "Data2VecAudioForCTC",
    "audio-spectrogram-transformer": "ASTForAudioClassification",
    "unispeech": "UniSpeechForCTC",
    "unispeech-sat": "UniSpeechSatForCTC",
    "qwen2_audio_encoder": "Qwen2AudioEncoder",
    "audioflamingo3_encoder": "AudioFlamingo3Encoder",
    "wav2vec2-bert": "Wav2Vec2BertForCTC",
    "parakeet_encoder": "ParakeetEncoder",
    "moonshine": "MoonshineForConditionalGeneration",
    "wav2vec2-conformer": "Wav2Vec2ConformerForCTC",
    "sew": "SEWForCTC",
    "sew-d": "SEWDForCTC",
    "voxtral_encoder": "VoxtralEncoder",
    "glmasr_encoder": "GlmAsrEncoder",
    "qwen3_asr_encoder": "Qwen3ASREncoder",
    "clap_audio_model": "ClapAudioModelWithProjection",
    "moss_transcribe_diarize_audio": "MossTranscribeDiarizeAudioModel",
    "voxtral_realtime_encoder": "VoxtralRealtimeEncoder",
    "speecht5": "SpeechT5ForSpeechToText",
    "seamless_m4t": "SeamlessM4TForSpeechToText",
    "seamless_m4t_v2": "SeamlessM4Tv2ForSpeechToText",
    "lasr_encoder": "LasrEncoder",
    "qwen3_omni_moe_audio_encoder": "Qwen3OmniMoeAudioEncoder",
    "qwen2_5_omni_audio_encoder": "Qwen2_5OmniAudioEncoder",
    "speech_to_text": "Speech2TextForConditionalGeneration",
    "fun_asr_nano_encoder": "FunAsrNanoEncoder",
    "granite_speech_encoder": "GraniteSpeechCTCEncoder",
    "granite_speech_plus_encoder": "GraniteSpeechPlusCTCEncoder",
}
"""A model that contains the encoder under a prefix, as the public checkpoints do."""


def save_encoder_checkpoint(
    folder: Path,
    config: Mapping[str, Any],
    *,
    model_class: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    shard_size: str = "20KB",
    preprocessor: bool = True,
) -> PreTrainedModel:
    """Save a random model that contains an encoder, and return it.

    Args:
        folder: where to write.
        config: an inline configuration with model_type.
        model_class: name of a transformers class; the entry of `FULL_MODELS` by default.
        seed: seed of the weights.
        dtype: type the weights are stored in.
        shard_size: largest weights file, in the notation of `save_pretrained`.
        preprocessor: also write the family's preprocessor_config.json.
    """
    family = config["model_type"]
    torch.manual_seed(seed)
    name = model_class or FULL_MODELS[family]
    model_type = getattr(transformers, name, None) or ENCODERS[family].model_class
    model: PreTrainedModel = model_type(AutoConfig.for_model(**config)).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    if preprocessor:
        feature_extractor(config).save_pretrained(folder)
    return model


def feature_extractor(config: Mapping[str, Any]) -> Any:
    """The transformers feature extractor that belongs to an encoder configuration."""
    if config["model_type"] == "clap_audio_model":
        truncation = "fusion" if config.get("enable_fusion") else "rand_trunc"
        return transformers.ClapFeatureExtractor(feature_size=config["num_mel_bins"], truncation=truncation)
    if (name := _FEATURE_EXTRACTORS.get(config["model_type"])) is not None:
        return getattr(transformers, name)()
    if config["model_type"] == "voxtral_realtime_encoder":
        return transformers.VoxtralRealtimeFeatureExtractor(feature_size=config["num_mel_bins"])
    if config["model_type"] == "qwen3_asr_encoder":
        return transformers.Qwen3ASRFeatureExtractor(feature_size=config["num_mel_bins"])
    if "num_mel_bins" in config and config["model_type"] != "audio-spectrogram-transformer":
        return transformers.WhisperFeatureExtractor(feature_size=config["num_mel_bins"])
    if config["model_type"] == "audio-spectrogram-transformer":
        return transformers.ASTFeatureExtractor(num_mel_bins=config["num_mel_bins"], max_length=config["max_length"])
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=config["model_type"] not in ("moonshine", "speecht5"))


_FEATURE_EXTRACTORS = {
    "wav2vec2-bert": "SeamlessM4TFeatureExtractor",
    "seamless_m4t": "SeamlessM4TFeatureExtractor",
    "seamless_m4t_v2": "SeamlessM4TFeatureExtractor",
    "parakeet_encoder": "ParakeetFeatureExtractor",
    "lasr_encoder": "LasrFeatureExtractor",
    "speech_to_text": "Speech2TextFeatureExtractor",
    "fun_asr_nano_encoder": "FunAsrNanoFeatureExtractor",
    "granite_speech_encoder": "GraniteSpeechFeatureExtractor",
    "granite_speech_plus_encoder": "GraniteSpeechFeatureExtractor",
}
"""Classes that need no argument."""


# ---- language models --------------------------------------------------------------------------

LANGUAGE_MODEL_FAMILIES = ("phi3", "llama", "qwen2", "gemma3_text")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_TEXT = (
    "Transcribe the speech. Describe the sound. What emotion does the speaker have? "
    "Answer the question about the audio: yes, no, high, low, one, two, three."
)


def tiny_language_model_config(family: str, **changes: Any) -> Config:
    """A two-layer decoder of one of `LANGUAGE_MODEL_FAMILIES`, with grouped key-value heads."""
    sizes = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    gemma = {"head_dim": 8, "sliding_window": 16} if family == "gemma3_text" else {}
    return {"model_type": family, **sizes, **tokens, **gemma, **changes}


def tiny_tokenizer(chat_template: bool) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that can write any text, with or without a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<pad>", "<|system|>", "<|user|>", "<|assistant|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    if chat_template:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def save_language_model(
    folder: Path, family: str, *, chat_template: bool = True, seed: int = 0, **changes: Any
) -> PreTrainedModel:
    """Save a random language model, sharded, with its tokenizer, and return it."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**tiny_language_model_config(family, **changes))
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="40KB")
    tiny_tokenizer(chat_template).save_pretrained(folder)
    return model
