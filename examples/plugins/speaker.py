"""A speaker encoder (GE2E, arXiv 1710.10467), 100 frames per second; `pip install resemblyzer` brings its weights."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers.audio_utils import mel_filter_bank

from mowe_ray.model.encoders import ENCODERS, ModuleEncoder
from mowe_ray.model.frontends import FRONT_ENDS, FrontEnd


@FRONT_ENDS.register("resemblyzer")
@dataclass(frozen=True)
class SpeakerMel(FrontEnd):
    kind = "resemblyzer"

    def features(self, wave, lengths):
        level = wave.square().sum(1, keepdim=True).div(lengths[:, None]).sqrt().clamp(min=1e-10)
        wave = wave * (10**-1.5 / level).clamp(min=1)  # quiet clips become as loud as -30 dB
        window = torch.hann_window(400, device=wave.device)
        spectrum = torch.stft(wave, 400, 160, window=window, pad_mode="constant", return_complex=True)
        mel = mel_filter_bank(201, 40, 0.0, 8000.0, 16000, norm="slaney", mel_scale="slaney")
        return spectrum.abs().square().transpose(1, 2) @ torch.from_numpy(mel).to(wave)


@ENCODERS.register("resemblyzer")
class SpeakerEncoder(ModuleEncoder):
    model_type, width = "resemblyzer", 256
    frame_layers = ((400, 160, 200),)
    make_front_end = classmethod(lambda cls, config, preprocessor: SpeakerMel())
    build = staticmethod(lambda config: torch.nn.LSTM(40, 256, num_layers=3, batch_first=True))

    def load_weights(self):
        weights = torch.load(Path(find_spec("resemblyzer").origin).with_name("pretrained.pt"), "cpu")["model_state"]
        self.model.load_state_dict({k[5:]: v for k, v in weights.items() if k.startswith("lstm.")})

    def encode(self, mel, lengths, all_layers):
        return self.model(mel)[0]
