"""Normalisation of texts before they are compared, as customary in the field of each task."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Iterable
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


@lru_cache(maxsize=100_000)
def normalise_any_transcript(text: str) -> str:
    """Make a transcript of any language comparable; nothing left is "empty".

    As Whisper's basic normaliser (lower case, no brackets, punctuation and symbols), except that it keeps combining
    marks: these are the vowel signs of Indic and Southeast Asian scripts (https://github.com/openai/whisper/issues/858).
    Accents stay too. Between characters of scripts without spaces there are none.
    """
    text = remove_bracketed(unicodedata.normalize("NFKC", text).lower().replace(*_TURKISH_I))
    kept = (_SEPARATED.get(unicodedata.category(c), _SEPARATED.get(unicodedata.category(c)[0], c)) for c in text)
    words = unicodedata.normalize("NFC", "".join(kept)).split()
    return _SPACE_BESIDE_UNSPACED.sub("", " ".join(words)) or "empty"


_TURKISH_I = ("i\u0307", "i")  # the small letter of İ, which Python writes with a dot of its own
# Categories: format characters such as the zero-width joiner are not seen, punctuation and symbols part words.
_SEPARATED = {"Cf": "", "P": " ", "S": " "}
# Thai, Lao, Tibetan, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = (
    "[\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\U00020000-\U000323af]"
)
_UNSPACED_CHARACTER = re.compile(f"({_UNSPACED})")
_SPACE_BESIDE_UNSPACED = re.compile(f"(?<={_UNSPACED}) | (?={_UNSPACED})")


def has_unspaced(text: str) -> bool:
    """Whether a text has characters of a script that puts no spaces between words."""
    return _UNSPACED_CHARACTER.search(text) is not None


def part_unspaced(text: str) -> str:
    """Put spaces around each character of a script without spaces, so that it counts as a word."""
    return " ".join(_UNSPACED_CHARACTER.sub(r" \1 ", text).split())


def has_accents(text: str) -> bool:
    """Whether a text has letters or marks other than those of English."""
    return any(ord(c) > 127 and unicodedata.category(c)[0] in "LM" for c in text)


# Common in English, and hardly a word of other languages in Latin letters.
_ENGLISH_WORDS = frozenset(
    ("the", "and", "of", "that", "it", "with", "this", "you", "she", "they", "what", "from", "were", "are", "is")
)
_ENGLISH_SHARE, _ACCENTED_SHARE, _OTHER_SCRIPT_SHARE = 0.10, 0.01, 0.02


def seems_english(texts: Iterable[str]) -> bool:
    """Guess whether texts are English: by letters of other scripts, by accents, and by the commonest words.

    Texts without accents pass for English, as short English answers have few of its commonest words.
    """
    letters = other_letters = words = accented = common = 0
    for text in texts:
        for word in unicodedata.normalize("NFC", text).lower().split():
            foreign = [c for c in word if ord(c) > 127 and unicodedata.category(c)[0] in "LM"]
            letters += sum(unicodedata.category(c)[0] in "LM" for c in word)
            other_letters += sum(not unicodedata.name(c, "").startswith(("LATIN", "COMBINING")) for c in foreign)
            words += 1
            accented += bool(foreign)
            common += word.strip(string.punctuation) in _ENGLISH_WORDS
    if other_letters > _OTHER_SCRIPT_SHARE * letters:
        return False
    return accented <= _ACCENTED_SHARE * words or common >= _ENGLISH_SHARE * words


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
    lowered = text.lower()
    words = lowered.translate(_ASCII_PUNCTUATION).split()
    # A text that is nothing else ("A", "+") is an answer too, not the same as silence.
    return " ".join(_ARTICLE.sub(" ", " ".join(words)).split()) or " ".join(words) or " ".join(lowered.split())


def plain(text: str) -> str:
    """Make texts comparable in any script: without case; punctuation and symbols become single spaces."""
    composed = unicodedata.normalize("NFC", text.casefold().replace(*_TURKISH_I))
    return " ".join("".join(" " if unicodedata.category(c)[0] in "PS" else c for c in composed).split())


def plain_label(text: str) -> str:
    """Make a label comparable as `plain` does; one of signs alone ("+") stays what it is."""
    return plain(text) or " ".join(text.split())


def caption_words(text: str) -> list[str]:
    """Split a caption into lower-case words without punctuation.

    The COCO caption tools run Java's Penn Treebank tokeniser here. It keeps `high-pitched` whole and cuts `don't`
    into `do` and `n't`; here every punctuation mark parts words, so that values can differ a little from theirs.
    """
    return plain(text).split()
