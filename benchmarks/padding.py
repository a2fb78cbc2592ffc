"""Time of a Whisper base encoder on 10 s clips, padded to their bucket against padded to 30 s.

Front-end and encoder, forward only, as a frozen base runs; random weights in the shape of whisper-base.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from measuring import Check, conclude, cpu_seconds, interleave, ratio

from mowe_ray.model.encoders import load_encoder
from mowe_ray.model.pool import Clips

SAMPLE_RATE = 16_000


def main() -> int:
    """Measure and print; returns 0 if the target is met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=2, help="clips in the batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (%(default)s)")
    parser.add_argument("--width", type=int, default=512, help="width of the encoder (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers of the encoder (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    encoder, _ = load_encoder(
        {
            "model_type": "whisper",
            "d_model": arguments.width,
            "encoder_layers": arguments.layers,
            "encoder_attention_heads": max(1, arguments.width // 64),
            "encoder_ffn_dim": 4 * arguments.width,
        }
    )
    encoder.requires_grad_(False).eval()
    samples = round(arguments.seconds * SAMPLE_RATE)
    wave = torch.randn(arguments.clips, samples, generator=torch.Generator().manual_seed(0))

    def encode(pad_audio: str) -> None:
        clips = Clips(wave, torch.full((arguments.clips,), samples), pad_audio)
        key, everyone = clips.key(encoder), torch.arange(arguments.clips)
        clips.compute([(key, everyone)])
        encoder(clips.take(key, everyone), lengths=clips.lengths)

    modes = ("bucket", "full30")
    for mode in modes:
        encode(mode)
    times = interleave({mode: lambda mode=mode: cpu_seconds(lambda: encode(mode)) for mode in modes}, arguments.rounds)
    table = {
        f"{mode}, {encoder.pad_samples(samples, mode) // SAMPLE_RATE} s": f"{statistics.median(times[mode]):7.3f} CPU s"
        for mode in modes
    }
    check = Check("base encoder, bucket / full30", ratio(times["bucket"], times["full30"]), 0.45)
    return conclude("padding", table, [check], clip_s=arguments.seconds, width=arguments.width, layers=arguments.layers)


if __name__ == "__main__":
    sys.exit(main())
