"""Training of a tokenizer, for language models that start from random weights."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .processing_mowe import AUDIO_TOKEN

PAD_TOKEN, END_TOKEN = "<|pad|>", "<|end|>"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: it can write any text; equal texts give an equal one.

    Args:
        texts: What to learn merges from.
        vocab_size: Tokens at most, special ones and the 256 bytes included.

    Raises:
        ValueError: if `vocab_size` has no room for the bytes.
    """
    specials = [PAD_TOKEN, END_TOKEN, AUDIO_TOKEN]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < len(specials) + len(alphabet):
        raise ValueError(f"vocab_size must be at least {len(specials) + len(alphabet)}, not {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer_from_json(tokenizer.to_str())


def tokenizer_from_json(text: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `train_tokenizer` from its `backend_tokenizer.to_str()`."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[AUDIO_TOKEN],
        clean_up_tokenization_spaces=False,
    )
