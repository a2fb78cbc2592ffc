"""The paper's corpora, read from miniatures in their published layouts."""

import io

import numpy as np
import pytest
import soundfile

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.prepare import check_sample
from mowe_ray.data.corpora.question_answering import best_answers
from mowe_ray.data.corpora.registry import KINDS, check_source, detect_kind, read_source
from mowe_ray.data.sample import BadSample, Sample
from tests import tiny_corpora
from tests.tiny_corpora import CORPORA, put, tone


def _read(root, name, split=None, label=None, **said):
    """Samples by their order, after the tree of `name` was made."""
    tiny = getattr(tiny_corpora, name.replace("-", "_"))
    tiny(root)
    defaults = Defaults("corpus", KINDS[name].task, said.get("instruction"))
    check_source(root, name, split, label)
    return list(read_source(root, name, defaults, split, label))


def _good(items):
    return [item for item in items if isinstance(item, Sample)]


def _bad(items):
    return {item.id: item.cause for item in items if isinstance(item, BadSample)}


@pytest.mark.parametrize("name", CORPORA)
def test_each_layout_is_recognised_and_its_missing_clip_counted(tmp_path, name):
    items = _read(tmp_path, name, CORPORA[name][1])
    assert detect_kind(tmp_path) == name
    assert "no_audio" in _bad(items).values()
    assert all(item.task == KINDS[name].task and item.instruction and item.answer for item in _good(items))
    assert all(isinstance(check_sample(item, 0, 3600), Sample) for item in _good(items))


def test_common_voice(tmp_path):
    sample, gone = _read(tmp_path, "common-voice", "test")
    assert (sample.id, sample.answer, sample.suffix) == ("common_voice_en_1", '"Quoted" words, kept.', "mp3")
    assert (gone.id, gone.cause) == ("common_voice_en_2", "no_audio")
    with (tmp_path / "en" / "test.tsv").open("a") as table:
        table.write("c\tcommon_voice_en_3.mp3")  # cut short
    assert _bad(read_source(tmp_path, "common-voice", Defaults("c", "asr"), "test"))["common_voice_en_3"] == "no_answer"
    (tmp_path / "de" / "clips").mkdir(parents=True)
    with pytest.raises(ValueError, match="de, en"):
        list(read_source(tmp_path, "common-voice", Defaults("c", "asr"), "test"))
    with pytest.raises(ValueError, match=r"no dev\.tsv"):
        list(read_source(tmp_path / "en", "common-voice", Defaults("c", "asr"), "dev"))


def test_audiocaps_has_five_references_for_testing_and_one_row_a_caption_for_training(tmp_path):
    items = _read(tmp_path, "audiocaps", "test")
    (sample,) = _good(items)
    assert sample.references == tuple(f"Water, in words {n}" for n in range(5))
    assert (sample.id, sample.answer, sample.suffix) == ("r1nicOVtvkQ_130", "Water, in words 0", "ogg")
    assert _bad(items) == {"gone_20": "no_audio"}
    train = _read(tmp_path, "audiocaps", "train")
    assert [(s.answer, s.references) for s in _good(train)] == [("A dog barks, twice", ())]
    assert _bad(train) == {"gone_0": "no_audio"}


def test_audiocaps_captions_of_one_clip_are_rows_of_train(tmp_path):
    tiny_corpora.audiocaps(tmp_path)
    (tmp_path / "test.csv").rename(tmp_path / "train.csv")
    samples = _good(read_source(tmp_path, "audiocaps", Defaults("c", "ac"), "train"))
    assert [sample.answer for sample in samples] == [f"Water, in words {n}" for n in range(5)]
    assert not any(sample.references for sample in samples)


def test_wavcaps_reads_all_sources_that_are_there_or_one(tmp_path):
    items = _read(tmp_path, "wavcaps")
    assert [(s.id, s.answer) for s in _good(items)] == [
        ("AudioSet_SL-Yb0RFKhbpFJA", "Wind and a man speaking."),
        ("SoundBible-7", "Sound 7."),
    ]
    assert _bad(items) == {"SoundBible-8": "no_audio"}
    with pytest.raises(ValueError, match="json_files/FreeSound"):
        _read(tmp_path, "wavcaps", "FreeSound")


def test_clotho_aqa_takes_the_answers_that_most_sure_annotators_gave(tmp_path):
    items = _read(tmp_path, "clotho-aqa", "test")
    waves, singing = _good(items)
    assert (waves.instruction, waves.answer, waves.references) == ("Are there waves?", "yes", ("yes",))
    assert (singing.instruction, singing.references) == ("What sings, if anything?", ("birds", "crow"))
    rain, gone = (item for item in items if isinstance(item, BadSample))
    assert (rain.cause, gone.cause) == ("no_answer", "no_audio")
    assert "contradict each other: Is it raining?" in rain.detail
    train = _good(_read(tmp_path, "clotho-aqa", "train"))
    assert [(s.answer, s.references) for s in train] == [("yes", ()), ("birds", ()), ("crow", ())]


@pytest.mark.parametrize(
    ("votes", "best"),
    [
        ([("a", "yes"), ("b", "yes"), ("a", "yes")], ["a"]),
        ([("a", "no"), ("a", "no"), ("b", "yes")], ["b"]),  # who is sure goes before the many
        ([("a", "no"), ("b", "maybe"), ("b", "no")], ["b"]),  # nobody is
        ([("a", "yes"), ("b", "yes"), ("c", "yes")], ["a", "b", "c"]),
        ([("", "yes"), ("a", "maybe")], ["a"]),
        ([("", "yes")], []),
    ],
)
def test_best_answers(votes, best):
    assert best_answers(votes) == best


def test_iemocap_keeps_seven_labels_and_counts_the_rest(tmp_path):
    items = _read(tmp_path, "iemocap")
    answers = {s.id: s.answer for s in _good(items)}
    assert list(answers.values()) == ["neutral", "frustration", "excited", "surprise"]
    assert _bad(items) == {"Ses01F_script01_1_M002": "no_answer", "Ses02F_script01_1_M002": "no_audio"}
    assert "xxx" in next(item.detail for item in items if getattr(item, "cause", "") == "no_answer")
    assert items[0].instruction.endswith(
        "one of: frustration, anger, excited, neutral, happiness, surprise, sad."  # AudioBench's list
    )
    (one,) = {s.id[:5] for s in _good(_read(tmp_path, "iemocap", "Session1", instruction="Feeling?"))}
    assert one == "Ses01"
    assert _read(tmp_path, "iemocap", instruction="Feeling?")[0].instruction == "Feeling?"


@pytest.mark.slow
def test_meld_asks_for_emotion_or_sentiment_and_leaves_the_pictures(tmp_path):
    sadness, surprise, gone = _read(tmp_path, "meld", "test")
    assert (sadness.answer, surprise.answer, gone.cause) == ("sadness", "surprise", "no_audio")
    assert sadness.instruction.endswith("neutral, joy, disgust, sadness, surprise, anger, fear.")
    checked = check_sample(sadness, 0, 3600)
    assert checked.audio[:4] == b"fLaC"
    assert checked.duration_s == pytest.approx(1.0, abs=0.1)  # AAC pads
    assert check_sample(surprise, 0, 3600).audio == tone(301)
    feeling = _read(tmp_path, "meld", "test", "sentiment")[0]
    assert (feeling.answer, feeling.instruction) == (
        "negative",
        "Which sentiment does the speaker express? Answer with one of: neutral, positive, negative.",
    )
    with pytest.raises(ValueError, match="emotion or sentiment"):
        _read(tmp_path, "meld", "test", "folder")
    with pytest.raises(ValueError, match="train_sent_emo"):
        _read(tmp_path, "meld", "train")


def test_slue_sqa5_asks_in_writing_about_the_document(tmp_path):
    sample, gone = _read(tmp_path, "slue-sqa5", "verified_test")
    assert (sample.id, sample.instruction, sample.audio) == ("squad-1", "Who, in 1?", tone(301))
    assert (sample.answer, sample.references) == ("she", ("she", "she of course"))
    assert (gone.id, gone.cause) == ("squad-2", "no_audio")
    with pytest.raises(ValueError, match="'validation'"):
        _read(tmp_path, "slue-sqa5", "validation")


@pytest.mark.slow
def test_spoken_squad_joins_the_sentences_of_the_right_paragraph(tmp_path):
    items = _read(tmp_path, "spoken-squad", "test")
    first, second = _good(items)
    assert (first.id, first.answer, first.references) == ("q1", "broncos", ("broncos", "denver broncos"))
    assert first.audio == second.audio
    wave, rate = soundfile.read(io.BytesIO(first.audio))
    assert (len(wave), rate) == (16_000, 16_000)
    pitches = [np.abs(np.fft.rfft(half)).argmax() * 2 for half in np.split(wave, 2)]  # 0.5 s: bins of 2 Hz
    assert pitches == [500, 700]  # of 0_1_0 and 0_1_1; paragraph 0 counts, though nothing is asked about it
    (lost,) = (item for item in items if isinstance(item, BadSample))
    assert (lost.id, lost.cause, lost.detail) == ("q3", "no_audio", "0_2_1.wav is missing")
    put(tmp_path / "Spoken-SQuAD_audio" / "dev_wav" / "0_2_1.wav", b"not sound " * 99)
    assert _bad(_read(tmp_path, "spoken-squad", "test")) == {"q3": "wrong_type"}


@pytest.mark.parametrize("name", CORPORA)
def test_a_folder_of_something_else_is_told_apart(tmp_path, name):
    put(tmp_path / "dog" / "1.wav", tone())
    assert detect_kind(tmp_path) == "folders"
    with pytest.raises(ValueError, match=str(tmp_path)):
        list(read_source(tmp_path, name, Defaults("c", KINDS[name].task), CORPORA[name][1]))


@pytest.mark.parametrize("name", ["audiocaps", "clotho-aqa", "meld"])
def test_a_table_without_its_columns_is_told(tmp_path, name):
    CORPORA[name][0](tmp_path)
    for table in tmp_path.glob("*.csv"):
        table.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="there is no column"):
        list(read_source(tmp_path, name, Defaults("c", KINDS[name].task), CORPORA[name][1]))


def test_a_corpus_with_a_test_set_is_read_one_split_at_a_time(tmp_path):
    with pytest.raises(ValueError, match=r"--split is needed.*train, val, test"):
        check_source(tmp_path, "audiocaps", None, None)
    with pytest.raises(ValueError, match="--split development: audiocaps has train, val, test"):
        check_source(tmp_path, "audiocaps", "development", None)
    check_source(tmp_path, "wavcaps", None, None)
