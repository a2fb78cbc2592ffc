"""The audio towers of Qwen3-ASR, Qwen3-Omni and Qwen2.5-Omni: convolutions over chunks, attention within windows."""

from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniAudioEncoder
from transformers.models.qwen3_asr.modeling_qwen3_asr import Qwen3ASREncoder
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeAudioEncoder

from .encoder_base import ENCODERS, PadAudio
from .encoder_whisper import WhisperAudioEncoder
from .frontends import FrontEnd

_SHORTEST = 8_000  # samples that its feature extractor makes of anything shorter


class WindowAttention(nn.Module):
    """The attention of a layer over a batch of windows, with a mask in place of transformers' packed windows."""

    def __init__(self, attention: Any):
        super().__init__()
        self.num_heads = attention.num_heads
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.out_proj = attention.out_proj

    def forward(self, hidden_states: Tensor, cu_seqlens: Tensor | None, **_: Any) -> Tensor:
        """Attend within windows (R, N, D).

        Args:
            hidden_states: The windows.
            cu_seqlens: (R, 1, 1, N) what may be attended to; the name is that of transformers' layer.
            **_: What else the layer passes.
        """
        query, key, value = (
            projection(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=cu_seqlens)
        projected: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return projected


@ENCODERS.register("qwen3_asr_encoder")
class Qwen3AsrTower(WhisperAudioEncoder):
    """The audio tower of Qwen3-ASR; 13 frames for every second, the last of which is short by half.

    A clip is followed by silence up to a whole second, as in transformers when a longer clip is beside it.
    """

    sees_padding = False
    model_class: ClassVar[type[PreTrainedModel]] = Qwen3ASREncoder
    key_mapping = MappingProxyType({r"^(model\.)?audio_tower\.": "", r"^thinker\.audio_tower\.": ""})
    model: Any

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: Any = None) -> None:
        super().__init__(config, front_end, model)
        for layer in self.model.layers:
            layer.self_attn = WindowAttention(layer.self_attn)

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, of which a part counts as a frame, and the three convolutions."""
        return [(1, self.front_end.hop_length, 0), *[(3, 2, 1)] * 3]

    @property
    def chunk_samples(self) -> int:
        """Samples that the convolutions see at a time."""
        return int(2 * self.config.n_window * self.front_end.hop_length)

    @property
    def min_samples(self) -> int:
        """Shortest clip."""
        return _SHORTEST

    def pad_samples(self, samples: int, pad_audio: PadAudio) -> int:
        """Whole chunks; there is no longest clip."""
        return -(-samples // self.chunk_samples) * self.chunk_samples

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to each clip's own frames of a window."""
        model = self.model
        hidden = self.embed(features)[:, : self.num_frames(features.shape[2] * self.front_end.hop_length)]
        frames, per_chunk = hidden.shape[1], self.num_frames(self.chunk_samples)
        window = min(frames, per_chunk * (self.config.n_window_infer // (2 * self.config.n_window)))
        missing = -frames % window
        mask = None
        if lengths is not None or missing:
            own = frames if lengths is None else self.num_frames(lengths.clamp(min=self.min_samples))[:, None]
            valid = (torch.arange(frames + missing, device=hidden.device) < own).expand(len(hidden), -1)
            windows = valid.reshape(-1, window)
            mask = (windows | ~windows.any(1, keepdim=True))[:, None, None]
        states = [F.pad(hidden, (0, 0, 0, missing)).reshape(-1, window, hidden.shape[-1])]
        for layer in model.layers:
            state = layer(states[-1], mask)[0]
            states = [*states, state] if all_layers else [state]
        states[-1] = model.ln_post(states[-1])
        clips = [state.reshape(len(hidden), frames + missing, -1)[:, :frames] for state in states]
        return tuple(clips) if all_layers else clips[-1]

    def embed(self, features: Tensor) -> Tensor:
        """Return the input of the first layer (C, chunks * frames of one, D)."""
        model = self.model
        size = 2 * self.config.n_window
        chunks = F.pad(features, (0, -features.shape[2] % size)).unflatten(2, (-1, size)).transpose(1, 2)
        hidden = chunks.flatten(0, 1)[:, None]
        for convolution in (model.conv2d1, model.conv2d2, model.conv2d3):
            hidden = F.gelu(convolution(hidden))
        hidden = model.conv_out(hidden.permute(0, 3, 1, 2).flatten(2))
        hidden = hidden + model.positional_embedding(hidden.shape[1]).to(hidden.dtype)
        embedded: Tensor = hidden.unflatten(0, chunks.shape[:2]).flatten(1, 2)
        return embedded


@ENCODERS.register("qwen3_omni_moe_audio_encoder")
class Qwen3OmniTower(Qwen3AsrTower):
    """The audio tower of Qwen3-Omni: that of Qwen3-ASR; frames are those before it projects them to its language model.

    Behind a clip, features are 0 up to a whole second, as in transformers when a longer clip is beside it.
    """

    model_class: ClassVar[type[PreTrainedModel]] = Qwen3OmniMoeAudioEncoder
    to_language_model: ClassVar[tuple[str, ...]] = ("proj1", "act", "proj2")

    def __init__(self, config: PretrainedConfig, front_end: FrontEnd, model: Any = None) -> None:
        super().__init__(config, front_end, model)
        for name in self.to_language_model:
            delattr(self.model, name)

    @property
    def min_samples(self) -> int:
        """Shortest clip: 25 ms in whole frames of the spectrogram."""
        hop = self.front_end.hop_length
        return -(-400 // hop) * hop

    def own_mel_frames(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """Mark (C, F), of whole chunks, what belongs to a clip."""
        frames, size = features.shape[2], 2 * self.config.n_window
        own: Any = frames
        if lengths is not None:
            own = -(-lengths.clamp(min=self.min_samples) // self.front_end.hop_length)[:, None]
        time = torch.arange(frames + -frames % size, device=features.device)
        own_frames: Tensor = time < own
        return own_frames.expand(len(features), -1)

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to each clip's own frames of a window."""
        own = self.own_mel_frames(features, lengths)[:, None, : features.shape[2]]
        return super().encode(features.masked_fill(~own, 0), lengths, all_layers)


@ENCODERS.register("qwen2_5_omni_audio_encoder")
class Qwen25OmniTower(Qwen3OmniTower):
    """The audio tower of Qwen2.5-Omni: Whisper's encoder over chunks of two seconds; means of two frames, 25 a second.

    Hidden states are means of two as well, so that all have one rate. [ours]
    """

    model_class = Qwen2_5OmniAudioEncoder
    to_language_model = ("proj", "audio_bos_eos_token")

    @property
    def frame_layers(self) -> list[tuple[int, int, int]]:
        """Spectrogram hop, of which a part counts as a frame, the two convolutions, and the means."""
        return [(1, self.front_end.hop_length, 0), (3, 1, 1), (3, 2, 1), (2, 2, 0)]

    def encode(self, features: Tensor, lengths: Tensor | None, all_layers: bool) -> Tensor | tuple[Tensor, ...]:
        """Attend to each clip's own frames of a chunk."""
        model, size, clips = self.model, 2 * self.config.n_window, len(features)
        own = self.own_mel_frames(features, lengths)
        chunks = F.pad(features, (0, own.shape[1] - features.shape[2])).masked_fill(~own[:, None], 0)
        chunks, own = chunks.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1), own.reshape(-1, size)
        hidden = F.gelu(model.conv1(chunks)).masked_fill(~own[:, None], 0)
        hidden = F.gelu(model.conv2(hidden)).transpose(1, 2)
        hidden = hidden + model.positional_embedding(hidden.shape[1]).to(hidden.dtype)
        valid = own[:, ::2]
        mask = (valid | ~valid.any(1, keepdim=True))[:, None, None]
        states = [hidden]
        for layer in model.layers:
            state = layer(states[-1], mask)[0]
            states = [*states, state] if all_layers else [state]
        frames = self.num_frames(features.shape[2] * self.front_end.hop_length)
        pairs = [F.avg_pool1d(state.transpose(1, 2), 2).transpose(1, 2) for state in states]
        pairs[-1] = model.ln_post(pairs[-1])
        whole = [pair.reshape(clips, -1, pair.shape[-1])[:, :frames] for pair in pairs]
        return tuple(whole) if all_layers else whole[-1]
