"""Settings of `generate` that give one answer a prompt, the most likely token each time."""

from transformers import GenerationConfig

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


def greedy(config: GenerationConfig) -> GenerationConfig:
    """Return `config` without all that a checkpoint says on sampling, searching and penalties.

    `do_sample=False` alone still obeys `repetition_penalty`, `no_repeat_ngram_size` or `num_beams`, and settings of
    sampling without `do_sample` may not be saved.
    """
    return GenerationConfig(**{name: getattr(config, name) for name in _KEPT})
