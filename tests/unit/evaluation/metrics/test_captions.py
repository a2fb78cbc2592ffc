import itertools
import math
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from nltk.stem.porter import PorterStemmer
from transformers import AutoTokenizer, BertConfig, BertModel, BertTokenizerFast

from mowe_ray.evaluation.metrics.captions import ROUGE_L, cider_d, meteor, sentence_similarity
from mowe_ray.evaluation.metrics.text_overlap import CHRF
from mowe_ray.evaluation.predictions import Answer
from mowe_ray.evaluation.text_normalization import caption_words
from tests.made_answers import WORDS, answers_of


@pytest.fixture(scope="module")
def answers():
    return answers_of("ac", most_words=6)


def captioned(answer: str, *references: str) -> Answer:
    return Answer(answer, "ac", "", answer, list(references))


def subsequences(words: list[str]) -> set[tuple[str, ...]]:
    return {part for n in range(len(words) + 1) for part in itertools.combinations(words, n)}


def test_rouge_l_is_the_f_of_the_longest_common_subsequence():
    answers = answers_of("ac", most_words=5)
    total = 0.0
    for answer in answers:
        given = caption_words(answer.answer)
        precisions, recalls = [0.0], [0.0]
        for reference in map(caption_words, answer.references):
            longest = max(map(len, subsequences(given) & subsequences(reference)))
            if longest:
                precisions.append(longest / len(given))
                recalls.append(longest / len(reference))
        p, r = max(precisions), max(recalls)
        total += (1 + 1.2**2) * p * r / (r + 1.2**2 * p) if p else 0.0
    assert ROUGE_L.of(answers) == pytest.approx(100 * total / len(answers), abs=1e-9)
    assert 20 < ROUGE_L.of(answers) < 90


@pytest.mark.parametrize(("candidate", "score"), [("police kill the gunman", 75), ("the gunman kill police", 50)])
def test_rouge_l_of_its_papers_example(candidate, score):
    assert ROUGE_L.of([captioned(candidate, "police killed the gunman")]) == pytest.approx(score)


def chrf_of(counts: list[list[int]]) -> float:
    """F2 from [common, given, reference] by order, as the formula says."""
    orders = [(c / g, c / r) for c, g, r in counts if g and r]
    precision = sum(p for p, _ in orders) / max(1, len(orders))
    recall = sum(r for _, r in orders) / max(1, len(orders))
    return 5 * precision * recall / (4 * precision + recall) if precision else 0.0


def order_counts(given: str, reference: str) -> list[list[int]]:
    counts = []
    for n in range(1, 7):
        mine, theirs = ([t[i : i + n] for i in range(len(t) - n + 1)] for t in (given, reference))
        left, common = list(theirs), 0
        for ngram in mine:
            if ngram in left:
                left.remove(ngram)
                common += 1
        counts.append([common, len(mine) if theirs else 0, len(theirs)])
    return counts


@pytest.mark.slow
def test_chrf_is_the_f2_of_character_ngrams_of_the_whole_set(answers):
    sums = [[0, 0, 0] for _ in range(6)]
    for answer in answers:
        given, *references = ("".join(t.split()) for t in (answer.answer, *answer.references))
        best = max((order_counts(given, reference) for reference in references), key=chrf_of)
        sums = [[a + b for a, b in zip(*rows, strict=True)] for rows in zip(sums, best, strict=True)]
    assert CHRF.of(answers) == pytest.approx(100 * chrf_of(sums), abs=1e-9)
    assert 30 < CHRF.of(answers) < 90


def test_chrf_of_texts_that_are_short_equal_or_empty():
    assert CHRF.of([captioned("a dog", "a dog")]) == pytest.approx(100)
    assert CHRF.of([captioned("", "")]) == CHRF.of([captioned("", "dog")]) == CHRF.of([captioned("dog", "")]) == 0
    # 3 letters: orders 1 to 3; "dot" shares d, o and do with "dog"
    assert CHRF.of([captioned("dot", "dog")]) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def ngrams_of(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def dense_cider_d(answers: list[Answer]) -> list[float]:
    """Equations of section 5 of the paper with whole vectors, weighted as in the COCO caption tools."""
    texts = [[caption_words(t) for t in (a.answer, *a.references)] for a in answers]
    totals = np.zeros(len(answers))
    for n in (1, 2, 3, 4):
        vocabulary = sorted({g for sample in texts for words in sample for g in ngrams_of(words, n)})
        place = {ngram: i for i, ngram in enumerate(vocabulary)}

        def counts(words: list[str], n: int = n, place: dict = place) -> np.ndarray:
            return np.bincount([place[g] for g in ngrams_of(words, n)], minlength=len(place)).astype(np.float64)

        clips = sum(np.any([counts(words) > 0 for words in sample[1:]], axis=0).astype(float) for sample in texts)
        idf = np.log(len(answers) / np.maximum(1.0, clips))
        for i, (given, *references) in enumerate(texts):
            c = counts(given) * idf
            for reference in references:
                r = counts(reference) * idf
                norm = np.linalg.norm(c) * np.linalg.norm(r)
                near = math.exp(-((len(given) - len(reference)) ** 2) / (2 * 6.0**2))
                totals[i] += 10 * near * (np.minimum(c, r) @ r) / norm / len(references) / 4 if norm else 0.0
    return totals.tolist()


def test_cider_d_is_the_clipped_tf_idf_cosine_of_ngrams(answers):
    metric = cider_d(answers)
    assert metric.statistics(answers)[:, 0] == pytest.approx(dense_cider_d(answers), abs=1e-9)
    assert metric.of(answers) == pytest.approx(100 * np.mean(dense_cider_d(answers)), abs=1e-9)


def test_cider_d_knows_what_is_rare_from_the_whole_set():
    rows = [captioned("a dog barks", "a dog barks"), captioned("a bell rings", "a bell rings")]
    assert cider_d(rows).of(rows[:1]) == pytest.approx(1000 * 3 / 4), "three words have no four in a row"
    assert cider_d(rows[:1]).of(rows[:1]) == 0, "in a set of one nothing is rare"
    four = [captioned("a dog barks twice", "a dog barks twice"), *rows]
    assert cider_d(four).of(four[:1]) == pytest.approx(1000)


class Synset:
    def __init__(self, names: list[str]) -> None:
        self.names = names

    def lemmas(self) -> list["Lemma"]:
        return [Lemma(name) for name in self.names]


class Lemma:
    def __init__(self, word: str) -> None:
        self.word = word

    def name(self) -> str:
        return self.word


class TinyWordNet:
    """Some sets of synonyms, as nltk's reader of WordNet gives them."""

    sets = (["rain", "rainfall"], ["roof", "top", "house_top"], ["dog", "an"], ["falls", "naïve", "hello"])

    def synsets(self, word: str) -> list[Synset]:
        return [Synset(names) for names in self.sets if word in names]


def synonyms(word: str) -> set[str]:
    return {word}.union(*(names for names in TinyWordNet.sets if word in names))


def aligned(given: list[str], reference: list[str]) -> list[tuple[int, int]]:
    """Pairs of places: first equal words, then equal stems, then synonyms; from the end, the last free one."""
    stem = PorterStemmer().stem
    pairs: list[tuple[int, int]] = []
    for alike in (
        lambda g, r: g == r,
        lambda g, r: stem(g) == stem(r),
        lambda g, r: stem(r) in {stem(g)} | {s for s in synonyms(stem(g)) if "_" not in s},
    ):
        for i in reversed(range(len(given))):
            free = [j for j in range(len(reference)) if j not in [b for _, b in pairs]]
            fitting = [j for j in free if alike(given[i], reference[j])]
            if i not in [a for a, _ in pairs] and fitting:
                pairs.append((i, fitting[-1]))
    return sorted(pairs)


def meteor_of(given: list[str], reference: list[str]) -> float:
    """Lavie and Agarwal 2007 with alpha 0.9, beta 3, gamma 0.5."""
    pairs = aligned(given, reference)
    if not pairs:
        return 0.0
    precision, recall = len(pairs) / len(given), len(pairs) / len(reference)
    mean = precision * recall / (0.9 * precision + 0.1 * recall)
    chunks = 1 + sum((c - a, d - b) != (1, 1) for (a, b), (c, d) in itertools.pairwise(pairs))
    return mean * (1 - 0.5 * (chunks / len(pairs)) ** 3)


@pytest.mark.slow
def test_meteor_aligns_words_stems_and_synonyms(answers):
    expected = [max(meteor_of(caption_words(a.answer), caption_words(r)) for r in a.references) for a in answers]
    metric = meteor(TinyWordNet())
    assert metric.statistics(answers)[:, 0] == pytest.approx(expected, abs=1e-9)
    assert metric.of(answers) == pytest.approx(100 * np.mean(expected), abs=1e-9)
    assert metric.of([captioned("roof", "top")]) == pytest.approx(50), "a synonym, one chunk of one word"


def test_meteor_of_nltks_own_example():
    answer = captioned(
        "It is a guide to action which ensures that the military always obeys the commands of the party",
        "It is a guide to action that ensures that the military will forever heed Party commands",
    )
    assert meteor(TinyWordNet()).of([answer]) == pytest.approx(69.44, abs=0.005)


@pytest.mark.slow
def test_meteor_without_its_data_says_which_command_installs_them(tmp_path):
    asked = (
        "import nltk; nltk.data.path[:] = []\n"
        "from mowe_ray.evaluation.metrics.registry import metrics_of\n"
        "from mowe_ray.evaluation.predictions import Answer\n"
        "metrics, missing = metrics_of('ac', [Answer('1', 'ac', '', 'a', ['a'])])\n"
        "print([m.name for m in metrics], missing)"
    )
    environment = {**os.environ, "HOME": str(tmp_path), "NLTK_DATA": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", asked], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    missing = {"meteor": "needs the WordNet data: python -m nltk.downloader wordnet"}
    assert result.stdout.strip() == f"['cider_d', 'rouge_l', 'chrf'] {missing}"
    assert not list(tmp_path.iterdir()), "nothing was downloaded"


def test_captions_are_compared_without_case_and_punctuation():
    rng = random.Random(3)
    rows = [captioned(text.upper() + " !", text) for text in (" ".join(rng.sample(WORDS, 6)) for _ in range(5))]
    assert ROUGE_L.of(rows) == pytest.approx(100)
    assert meteor(TinyWordNet()).of(rows) > 99


def test_sentence_similarity_is_the_mean_cosine_of_mean_embeddings(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "cat", "barks"]))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    rows = [captioned("a dog barks", "a cat", "a dog barks"), captioned("cat", "a dog barks")]
    tokenizer, model = AutoTokenizer.from_pretrained(tmp_path), BertModel.from_pretrained(tmp_path).eval()

    def vector(text):  # one at a time, without padding
        states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].detach().double().numpy()
        return states.mean(0) / np.linalg.norm(states.mean(0))

    cosines = [np.mean([vector(row.answer) @ vector(text) for text in row.references]) for row in rows]
    assert sentence_similarity(str(tmp_path)).of(rows) == pytest.approx(100 * np.mean(cosines), abs=1e-4)
    with pytest.raises(ValueError, match=r"sentence_model: .*nowhere is no folder of a model"):
        sentence_similarity(str(tmp_path / "nowhere"))
