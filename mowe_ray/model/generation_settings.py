"""Settings of `generate` that give one answer a prompt, the most likely token each time."""

from collections.abc import Sequence

from transformers import GenerationConfig

_KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


def greedy(config: GenerationConfig, end_tokens: Sequence[int] = ()) -> GenerationConfig:
    """Return `config` without all that a checkpoint says on sampling, searching and penalties.

    `do_sample=False` alone still obeys `repetition_penalty`, `no_repeat_ngram_size` or `num_beams`, and settings of
    sampling without `do_sample` may not be saved.

    Args:
        config: A model's.
        end_tokens: More tokens that end an answer.
    """
    kept = GenerationConfig(**{name: getattr(config, name) for name in _KEPT})
    ends = [kept.eos_token_id] if isinstance(kept.eos_token_id, int) else list(kept.eos_token_id or [])
    missing = [token for token in end_tokens if token not in ends]
    if missing:
        kept.eos_token_id = [*ends, *missing] if ends or len(missing) > 1 else missing[0]
    return kept
