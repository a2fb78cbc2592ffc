"""The pool's forward and backward with top-1 routing: sparse execution against dense, by size of the pool.

The members are trained Whisper encoders of equal size and every clip goes to one of them, in equal shares, so the work
that is needed is 1 / pool size of the dense work. The rest is dispatch, and the front-end, which the members share.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from measuring import Check, conclude, cpu_seconds, interleave, ratio

from mowe_ray.model.encoders import load_encoder
from mowe_ray.model.fusion import Mixture
from mowe_ray.model.pool import BaseFrames, Clips, PoolMember, WeakEncoderPool
from mowe_ray.model.routing import route

SAMPLE_RATE = 16_000
TARGETS = {2: 0.60, 4: 0.35, 8: 0.20}
BASE_WIDTH, BASE_HOP = 256, 320


def main() -> int:
    """Measure and print; returns 0 if all targets are met, else 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=16, help="clips in the batch (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each clip (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds (%(default)s)")
    parser.add_argument("--width", type=int, default=128, help="width of a member (%(default)s)")
    parser.add_argument("--layers", type=int, default=2, help="layers of a member (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    samples = round(arguments.seconds * SAMPLE_RATE)
    wave = torch.randn(arguments.clips, samples, generator=torch.Generator().manual_seed(0))
    table, checks = {}, []
    for size, target in TARGETS.items():
        pool = make_pool(size, arguments.width, arguments.layers)

        def step(execution: str, pool: WeakEncoderPool = pool) -> None:
            pool.execution = execution
            forward_backward(pool, wave)

        modes = ("sparse", "dense")
        step("sparse")
        times = interleave(
            {mode: lambda mode=mode: cpu_seconds(lambda: step(mode)) for mode in modes}, arguments.rounds
        )
        for mode in modes:
            table[f"pool {size}, {mode}"] = f"{statistics.median(times[mode]):7.3f} CPU s"
        checks.append(Check(f"pool {size}, sparse / dense", ratio(times["sparse"], times["dense"]), target))
    return conclude("sparse", table, checks, clips=arguments.clips, width=arguments.width, layers=arguments.layers)


def make_pool(size: int, width: int, layers: int) -> WeakEncoderPool:
    """Build a pool of equal members with random weights, in training mode."""
    config = {
        "model_type": "whisper",
        "d_model": width,
        "encoder_layers": layers,
        "encoder_attention_heads": max(1, width // 64),
        "encoder_ffn_dim": 4 * width,
    }
    members = [PoolMember(load_encoder(config, seed)[0], BASE_WIDTH, "last") for seed in range(size)]
    return WeakEncoderPool(members, "sparse").train()


def forward_backward(pool: WeakEncoderPool, wave: torch.Tensor) -> None:
    """Send clip i to member i modulo the size of the pool, as the data-dependent router would."""
    size, clips = len(pool.members), Clips(wave, torch.full((len(wave),), wave.shape[1]))
    logits = torch.nn.functional.one_hot(torch.arange(len(wave)) % size, size).float().requires_grad_()
    routing = route(logits, k=1, temperature=1.0, noise=None)
    frames = wave.shape[1] // BASE_HOP
    base = BaseFrames(wave.new_zeros(len(wave), frames, BASE_WIDTH), torch.full((len(wave),), frames), BASE_HOP)
    mixtures = [Mixture(routing.weights[:, None], routing.chosen)]
    (mixture,) = pool(clips, mixtures, base, frames, enter_idle=False)
    mixture.square().mean().backward()
    pool.zero_grad(set_to_none=True)


if __name__ == "__main__":
    sys.exit(main())
