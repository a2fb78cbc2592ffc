"""Silero's voice activity detector, 31 frames per second; `pip install silero-vad` brings its weights."""

from importlib.util import find_spec
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from mowe_ray.model.encoders import ENCODERS, ModuleEncoder


@ENCODERS.register("silero-vad")
class VoiceActivityEncoder(ModuleEncoder):
    model_type, width = "silero-vad", 128
    frame_layers = ((512, 512, 0),)

    @staticmethod
    def build(config):
        shapes = {"conv1": (129, 128, 3, 1, 1), "conv2": (128, 64, 3, 2, 1), "conv3": (64, 64, 3, 2, 1)}
        convs = {name: nn.Conv1d(*shape) for name, shape in (shapes | {"conv4": (64, 128, 3, 1, 1)}).items()}
        stft = nn.Conv1d(1, 258, 256, 128, bias=False)
        return nn.ModuleDict({"stft_conv": stft, **convs, "lstm_cell": nn.LSTM(128, 128, batch_first=True)})

    def load_weights(self):
        weights = load_file(Path(find_spec("silero_vad").origin).with_name("data") / "silero_vad_16k.safetensors")
        names = {f"{k}_l0" if k.startswith("lstm") else k: v for k, v in weights.items()}
        self.model.load_state_dict({k: v for k, v in names.items() if not k.startswith("final")})

    def encode(self, wave, lengths, all_layers):
        chunks = nn.functional.pad(wave, (64, 0)).unfold(1, 576, 512)  # each sees the end of the one before
        parts = self.model["stft_conv"](nn.functional.pad(chunks.flatten(0, 1)[:, None], (0, 64), mode="reflect"))
        hidden = (parts[:, :129].square() + parts[:, 129:].square() + 1e-12).sqrt()
        for name in ("conv1", "conv2", "conv3", "conv4"):
            hidden = self.model[name](hidden).relu()
        return self.model["lstm_cell"](hidden.view(*chunks.shape[:2], 128))[0]
