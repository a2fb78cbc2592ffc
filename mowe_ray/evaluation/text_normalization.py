"""Normalisation of texts before they are compared, as customary in the field of each task."""

from __future__ import annotations

import re
import string
import unicodedata
from functools import lru_cache

import jiwer
from whisper_normalizer.english import EnglishTextNormalizer

_TO_NINETEEN = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen"),
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_NUMBERS = {str(i): word for i, word in enumerate(_TO_NINETEEN)}
_NUMBERS |= {str(10 * i): word for i, word in enumerate(_TENS, start=2)}
_NUMBER = re.compile(rf"\b({'|'.join(_NUMBERS)})\b")

_ENDINGS = {
    "'m": ("am", "i"),
    "'re": ("are", "you we they"),
    "'s": ("is", "he she it that"),
    "'ve": ("have", "i you we they"),
    "n't": ("not", "is are was were has have had does do did"),
}
_CONTRACTIONS = {
    word + ending: f"{word} {full}" for ending, (full, words) in _ENDINGS.items() for word in words.split()
}
_CONTRACTION = re.compile(rf"\b({'|'.join(_CONTRACTIONS)})\b")

_BRACKETED = re.compile(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|<[^<>]*>")
_FILLER = re.compile(r"\b(uh|umm|um|er|ah)\b")
_ARTICLE = re.compile(r"\b(a|an|the)\b")
_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)

_whisper_english = EnglishTextNormalizer()
_jiwer_steps = jiwer.Compose(
    [
        jiwer.RemoveMultipleSpaces(),
        jiwer.ExpandCommonEnglishContractions(),
        jiwer.RemoveKaldiNonWords(),
        jiwer.RemovePunctuation(),
    ]
)


@lru_cache(maxsize=100_000)  # the same references are scored by several metrics, and for several models
def normalise_transcript(text: str) -> str:
    """Make a transcript comparable as AudioBench does, after Whisper's rules for English; nothing left is "empty".

    Whisper's rules write numbers as digits and take away symbols and contractions, so that of the later steps the
    brackets and contractions find little; they are kept so that this is AudioBench's list. Spaces are single at the
    end, for the character error rate.
    """
    text = _whisper_english(text.lower())
    text = remove_bracketed(expand_contractions(spell_numbers(text)))
    text = remove_fillers(str(_jiwer_steps(text)))
    return " ".join(text.split()) or "empty"


def spell_numbers(text: str) -> str:
    """Write the digits of 0 to 20, and of the tens to 90, as words."""
    return _NUMBER.sub(lambda found: _NUMBERS[found[0]], text)


def expand_contractions(text: str) -> str:
    """Write common English contractions in full."""
    return _CONTRACTION.sub(lambda found: _CONTRACTIONS[found[0]], text)


def remove_bracketed(text: str) -> str:
    """Take out what stands in (), [], {} or <>, innermost first."""
    shorter = _BRACKETED.sub("", text)
    return text if shorter == text else remove_bracketed(shorter)


def remove_fillers(text: str) -> str:
    """Take out uh, umm, um, er and ah."""
    return _FILLER.sub("", text)


def normalise_answer(text: str) -> str:
    """Make a short answer comparable as SQuAD does: lower case, no ASCII punctuation, no articles, single spaces."""
    return " ".join(_ARTICLE.sub(" ", text.lower().translate(_ASCII_PUNCTUATION)).split())


def plain(text: str) -> str:
    """Make texts comparable in any script: without case; punctuation and symbols become single spaces."""
    composed = unicodedata.normalize("NFC", text.casefold())
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in composed).split())


def caption_words(text: str) -> list[str]:
    """Split a caption into lower-case words without punctuation.

    The COCO caption tools run Java's Penn Treebank tokeniser here. It keeps `high-pitched` whole and cuts `don't`
    into `do` and `n't`; here every punctuation mark parts words, so that values can differ a little from theirs.
    """
    return plain(text).split()
