"""DeepSpeed: the engine, and optimizer state under ZeRO.

DeepSpeed is imported here, once its environment is set: import it from this package.
"""

import os

import torch

# Everything here is tested with transformers imported before DeepSpeed.
import transformers.integrations.deepspeed
import transformers.tokenization_utils_base  # noqa: F401

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it would look for others, and warn

import deepspeed

__all__ = ["deepspeed"]
