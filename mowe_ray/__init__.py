"""Train AudioLLMs with a mixture of weak encoders (MoWE) on Ray and DeepSpeed."""

__version__ = "0.1.0"
