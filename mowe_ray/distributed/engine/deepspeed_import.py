"""DeepSpeed, imported after its environment is set; decoding tasks need neither it nor torch."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and warn

import deepspeed

__all__ = ["deepspeed"]
