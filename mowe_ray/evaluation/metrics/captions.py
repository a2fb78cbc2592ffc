"""Metrics of captions: METEOR, ROUGE-L and CIDEr-D, which compare words as `caption_words` gives them, and meanings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from mowe_ray.evaluation.metrics.metric import Array, Metric, MissingDataError, mean_metric, mean_percent
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import caption_words

Ngrams = Counter[tuple[str, ...]]

_ROUGE_BETA = 1.2  # how much recall outweighs precision in the COCO caption tools
_CIDER_ORDERS = 4
_CIDER_SIGMA = 6.0  # words by which lengths may differ until similarity falls to exp(-1/2)


def meteor(wordnet: Any = None) -> Metric:
    """Return METEOR, against the best reference, in percent.

    Args:
        wordnet: An nltk reader of WordNet; None takes the installed one.

    Raises:
        MissingDataError: WordNet is not installed; nothing is downloaded here.
    """
    from nltk.translate.meteor_score import meteor_score  # here, as it loads scipy: a second of every worker's start

    wordnet = wordnet or _installed_wordnet()

    def score(answer: Answer) -> float:
        references = [caption_words(reference) for reference in answer.references]
        return float(meteor_score(references, caption_words(answer.answer), wordnet=wordnet))

    return mean_metric("meteor", "METEOR (%)", score)


def _installed_wordnet() -> Any:
    from nltk.corpus import wordnet

    try:
        wordnet.ensure_loaded()
    except LookupError:
        raise MissingDataError("needs the WordNet data: python -m nltk.downloader wordnet") from None
    return wordnet


def _rouge_l(answer: Answer) -> float:
    """Return F of the best precision and the best recall over references, which may be of different ones."""
    given = caption_words(answer.answer)
    references = [caption_words(reference) for reference in answer.references]
    common = [longest_common_subsequence(given, reference) for reference in references]
    if not any(common):
        return 0.0
    precision = max(common) / len(given)
    recall = max(n / len(reference) for n, reference in zip(common, references, strict=True) if n)
    return (1 + _ROUGE_BETA**2) * precision * recall / (recall + _ROUGE_BETA**2 * precision)


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many words two texts share in the same order."""
    above = [0] * (len(second) + 1)
    for word in first:
        row = [0]
        for j, second_word in enumerate(second):
            row.append(above[j] + 1 if word == second_word else max(above[j + 1], row[j]))
        above = row
    return above[-1]


ROUGE_L = mean_metric("rouge_l", "ROUGE-L (%)", _rouge_l)


def cider_d(answers: Sequence[Answer]) -> Metric:
    """Return CIDEr-D (arXiv 1411.5726, section 5), as the COCO caption tools count it, times 100.

    Args:
        answers: The whole set: how rare an n-gram is, is taken from its references. One clip alone scores 0, for in it
            nothing is rare.
    """
    spread = Counter(ngram for answer in answers for ngram in _all_ngrams(answer.references))
    rarity = {ngram: math.log(len(answers) / clips) for ngram, clips in spread.items()}
    unseen = math.log(max(1, len(answers)))

    def weighted(words: Sequence[str]) -> list[dict[tuple[str, ...], float]]:
        return [
            {ngram: count * rarity.get(ngram, unseen) for ngram, count in _ngrams(words, n).items()}
            for n in range(1, _CIDER_ORDERS + 1)
        ]

    def score(answer: Answer) -> float:
        given = caption_words(answer.answer)
        given_weights = weighted(given)
        total = 0.0
        for reference in answer.references:
            words = caption_words(reference)
            pairs = zip(given_weights, weighted(words), strict=True)
            # The Gaussian length penalty of CIDEr-D.
            near = math.exp(-((len(given) - len(words)) ** 2) / (2 * _CIDER_SIGMA**2))
            total += near * sum(_clipped_cosine(g, r) for g, r in pairs) / _CIDER_ORDERS
        return 10 * total / len(answer.references)

    def note(_: Sequence[Answer]) -> str | None:
        if any(rarity.values()):
            return None
        return (
            f"in {len(answers)} clip{'s that are all alike' if len(answers) > 1 else ''} no word is rare (its inverse "
            "document frequency is 0), so that every caption scores 0"
        )

    return replace(mean_metric("cider_d", "CIDEr-D (×100)", score), note=note)


def _ngrams(words: Sequence[str], n: int) -> Ngrams:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def _all_ngrams(references: Sequence[str]) -> set[tuple[str, ...]]:
    texts = [caption_words(reference) for reference in references]
    return {ngram for words in texts for n in range(1, _CIDER_ORDERS + 1) for ngram in _ngrams(words, n)}


def _clipped_cosine(given: dict[tuple[str, ...], float], reference: dict[tuple[str, ...], float]) -> float:
    """Return the cosine of two weightings, in which no n-gram counts more often than the reference has it."""
    lengths = math.hypot(*given.values()) * math.hypot(*reference.values())
    if not lengths:
        return 0.0
    shared = given.keys() & reference.keys()
    return sum(min(given[ngram], reference[ngram]) * reference[ngram] for ngram in shared) / lengths


_TEXTS_AT_A_TIME = 64


def sentence_similarity(folder: str) -> Metric:
    """Return the mean cosine of the embeddings of a caption and of its references, times 100.

    With `sentence-transformers/paraphrase-TinyBERT-L6-v2` it is what FENSE (arXiv 2110.04684) takes before it punishes
    errors of fluency, for which its second model is not read here.

    Args:
        folder: Of an encoder of sentences that transformers loads, whose embedding is the mean over its tokens.

    Raises:
        ValueError: It cannot be loaded.
    """
    from transformers import AutoModel, AutoTokenizer  # torch takes seconds, which other metrics need not wait for

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"sentence_model: {folder} is no folder of a model and its tokenizer: {error}") from error

    def embedded(texts: Sequence[str]) -> Array:
        """Return (N, E) of unit length."""
        tokens = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        mask = tokens["attention_mask"][..., None]
        states = model(**tokens).last_hidden_state.detach()
        means = ((states * mask).sum(1) / mask.sum(1)).double().numpy()
        return np.asarray(means / np.linalg.norm(means, axis=1, keepdims=True))

    def statistics(answers: Sequence[Answer]) -> Array:
        texts = sorted({text for answer in answers for text in (answer.answer, *answer.references)}, key=len)
        parts = [texts[i : i + _TEXTS_AT_A_TIME] for i in range(0, len(texts), _TEXTS_AT_A_TIME)]
        vectors = dict(zip(texts, (vector for part in parts for vector in embedded(part)), strict=True))
        cosines = [np.mean([vectors[text] @ vectors[a.answer] for text in a.references]) for a in answers]
        return np.array([(cosine, 1.0) for cosine in cosines], np.float64).reshape(-1, 2)

    return Metric("sentence_similarity", "sentence similarity (%)", "higher", statistics, mean_percent)
