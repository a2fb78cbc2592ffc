"""Whisper's encoder at the batch's own length instead of always 30 s.

transformers refuses anything but 30 s, which wastes 70 % of the work on a 10 s clip. The forward
here runs the same modules on the first positions only, and equals transformers bit for bit at 30 s.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    AudioFlamingo3Encoder,
    GlmAsrEncoder,
    MossTranscribeDiarizeAudioModel,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2AudioEncoder,
    VoxtralEncoder,
    VoxtralRealtimeEncoder,
)
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from .encoder_base import ENCODERS, AudioEncoder, PadAudio
from .frontends import SAMPLE_RATE, FrontEnd, LogMel

# [ours] Silence behind a clip keeps its last frames close to what 30 s of padding would give; few
# distinct lengths mean few shapes to compile; very short windows are far from its training.
MARGIN_S = 2.56
BUCKET_S = 2.5
SHORTEST_S = 5.0


@ENCODERS.register("whisper")
class WhisperAudioEncoder(AudioEncoder):
    """The encoder half of any Whisper checkpoint; 50 frames per second."""

    sees_padding = True
    model_class: ClassVar[type[PreTrainedModel]] = WhisperEncoder
    key_mapping = MappingProxyType({r"^(model\.)?encoder\.": ""})
    front_end: LogMel
    model: WhisperEncoder

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """Log-mel with as many bins as the first convolution reads."""
        return LogMel(
            n_mels=config.num_mel_bins,
            n_fft=preprocessor.get("n_fft", LogMel.n_fft),
            hop_length=preprocessor.get("hop_length", LogMel.hop_length),
        )

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, then the two convolutions."""
        hop = self.front_end.hop_length
        return [(hop, hop, 0), (3, 1, 1), (3, 2, 1)]

    @property
    def first_centre(self) -> float:
        """The first sample: windows of the spectrogram are centred on multiples of its hop."""
        return 0.0

    @property
    def positions(self) -> int:
        """Frames that it has positions for."""
        return int(self.config.max_source_positions)

    @property
    def max_samples(self) -> int:
        """Longest padded clip: 30 s for every published checkpoint."""
        return self.positions * 2 * self.front_end.hop_length

    def pad_samples(self, samples: int, pad_audio: PadAudio) -> int:
        """`bucket`: 2.56 s more, up to a multiple of 2.5 s, at least 5 s; `full30`: all positions.

        Raises:
            ValueError: the clip is longer than the encoder has positions for.
        """
        if samples > self.max_samples:
            raise ValueError(
                f"a clip of {samples / SAMPLE_RATE:.2f} s is longer than the "
                f"{self.max_samples / SAMPLE_RATE:.2f} s of this Whisper encoder "
                f"({self.positions} positions); "
                "lower data.max_duration_s"
            )
        if pad_audio == "full30":
            return self.max_samples
        bucket = round(BUCKET_S * SAMPLE_RATE)
        wanted = samples + round(MARGIN_S * SAMPLE_RATE)
        padded = max(-(-wanted // bucket) * bucket, round(SHORTEST_S * SAMPLE_RATE))
        return min(padded, self.max_samples)

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Whisper was trained without a mask, on silence: `lengths` plays no part."""
        states = self.run_layers(self.embed(features), None, all_layers)
        last: Tensor = self.model.layer_norm(states[-1])
        return (*states[:-1], last) if all_layers else last

    def embed(self, features: Tensor) -> Tensor:
        """Return the input of the first layer (C, T, D)."""
        model = self.model
        hidden = F.gelu(model.conv1(features))
        hidden = F.gelu(model.conv2(hidden)).transpose(1, 2)
        # Looked up through the module, not sliced from its weight, so that ZeRO-3 gathers it.
        hidden = hidden + model.embed_positions(torch.arange(hidden.shape[1], device=hidden.device))
        return F.dropout(hidden, p=model.dropout, training=model.training)

    def run_layers(self, hidden: Tensor, mask: Tensor | None, all_layers: bool) -> list[Tensor]:
        """Return the L + 1 states before the final normalisation, or the last of them alone."""
        states = [hidden]
        for layer in self.model.layers:
            hidden = layer(hidden, mask)
            states = [*states, hidden] if all_layers else [hidden]
        return states


@ENCODERS.register("qwen2_audio_encoder")
class Qwen2AudioTower(WhisperAudioEncoder):
    """The audio tower of Qwen2-Audio: Whisper's encoder, trained with a mask; means of two frames, 25 per second.

    Hidden states are means of two as well, so that all have one rate. [ours]
    """

    sees_padding = False
    model_class: ClassVar[type[PreTrainedModel]] = Qwen2AudioEncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": ""})

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, of which a part counts as a frame, the two convolutions, and the means."""
        return [(1, self.front_end.hop_length, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0)]

    @property
    def min_samples(self) -> int:
        """Shortest clip: whole frames of the spectrogram."""
        hop = self.front_end.hop_length
        return -(-super().min_samples // hop) * hop

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to each clip's own frames."""
        hidden, mask = self.embed(features), None
        if lengths is not None:
            own = (-(-lengths // self.front_end.hop_length) - 1) // 2 + 1
            valid = torch.arange(hidden.shape[1], device=hidden.device) < own[:, None]
            made = create_bidirectional_mask(config=self.model.config, inputs_embeds=hidden, attention_mask=valid)
            mask = cast("Tensor | None", made)
        states = [
            F.avg_pool1d(state.transpose(1, 2), 2).transpose(1, 2)
            for state in self.run_layers(hidden, mask, all_layers)
        ]
        last: Tensor = self.model.layer_norm(states[-1])
        return (*states[:-1], last) if all_layers else last


@ENCODERS.register("audioflamingo3_encoder")
class AudioFlamingo3Tower(Qwen2AudioTower):
    """AF-Whisper, the audio tower of Audio Flamingo 3 and Music Flamingo: Qwen2-Audio's, trained further."""

    model_class = AudioFlamingo3Encoder


@ENCODERS.register("voxtral_encoder")
class VoxtralTower(WhisperAudioEncoder):
    """The audio tower of Voxtral: the encoder of Whisper-large-v3, trained further; 50 frames per second."""

    model_class: ClassVar[type[PreTrainedModel]] = VoxtralEncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": ""})


@ENCODERS.register("glmasr_encoder")
class GlmAsrTower(WhisperAudioEncoder):
    """The audio tower of GLM-ASR: Whisper's encoder with rotary positions; 50 frames per second."""

    model_class = GlmAsrEncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    @property
    def positions(self) -> int:
        """Frames that it was trained on; rotary positions would go on."""
        return int(self.config.max_position_embeddings)

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Run the transformers model, which has no mask and takes any length."""
        output = self.model(features, output_hidden_states=all_layers)
        last: Tensor = output.last_hidden_state
        return (*output.hidden_states[:-1], last) if all_layers else last


@ENCODERS.register("moss_transcribe_diarize_audio")
class MossTower(VoxtralTower):
    """The audio tower of MOSS-Transcribe-Diarize: Whisper's encoder, trained further; 50 frames per second."""

    model_class = MossTranscribeDiarizeAudioModel


@ENCODERS.register("voxtral_realtime_encoder")
class VoxtralRealtimeTower(WhisperAudioEncoder):
    """The causal audio tower of Voxtral Realtime: a frame depends on earlier ones alone; 50 frames per second."""

    sees_padding = False
    model_class = VoxtralRealtimeEncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": ""})
    lora_targets = ("q_proj", "k_proj", "v_proj", "o_proj")

    @classmethod
    def make_front_end(cls, config: PretrainedConfig, preprocessor: Mapping[str, Any]) -> FrontEnd:
        """Log-mel above a floor that does not depend on the clip, of which the end would have to be known."""
        return LogMel(n_mels=config.num_mel_bins, loudest=preprocessor.get("global_log_mel_max", 1.5))

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, then the two convolutions, padded in front alone."""
        hop = self.front_end.hop_length
        return [(hop, hop, 0), (3, 1, 1), (2, 2, 0)]

    def pad_samples(self, samples: int, pad_audio: PadAudio) -> int:
        """Silence for the last window of the spectrogram, which would be reflected into it otherwise."""
        return max(samples, self.min_samples) + self.front_end.n_fft // 2

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to the frames before, within the window: those of padding come behind a clip's own."""
        model: Any = self.model
        hidden = model.embedder(features, None)
        places = torch.arange(hidden.shape[1], device=hidden.device)[None]
        distance = places[0, :, None] - places
        mask = ((distance >= 0) & (distance < (self.config.sliding_window or len(distance) + 1)))[None, None]
        rotary, states = model.rotary_emb(hidden, position_ids=places), [hidden]
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=places)
            states = [*states, hidden] if all_layers else [hidden]
        last: Tensor = model.norm(hidden)
        return (*states[:-1], last) if all_layers else last
