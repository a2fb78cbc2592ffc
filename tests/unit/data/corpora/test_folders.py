"""LibriSpeech's layout and labelled folders."""

import pytest

from mowe_ray.data.corpora.layout import Defaults
from mowe_ray.data.corpora.manifest_and_folders import read_labelled_folders
from mowe_ray.data.corpora.speech import read_librispeech


def test_librispeech_keeps_the_flac_bytes_and_lowers_the_words(tmp_path, make_audio, asr):
    flac = make_audio(container="FLAC")
    for subset in ("dev-clean", "test-clean"):
        chapter = tmp_path / subset / "84" / "121"
        chapter.mkdir(parents=True)
        (chapter / "84-121-0000.flac").write_bytes(flac)
        (chapter / "84-121.trans.txt").write_text("84-121-0000 GO AWAY\n84-121-0001 LOST\n")
    good, lost = read_librispeech(tmp_path, asr, "dev-clean")
    assert (good.id, good.audio, good.answer) == ("84-121-0000", flac, "go away")
    assert (lost.id, lost.cause) == ("84-121-0001", "no_audio")
    assert len(list(read_librispeech(tmp_path, asr))) == 4
    with pytest.raises(ValueError, match="train-clean-100"):
        list(read_librispeech(tmp_path, asr, "train-clean-100"))


def test_the_answer_is_the_folder_or_the_file(tmp_path, make_audio):
    for name in ("angry/2.wav", "angry/1.WAV", "very_sad/1.wav", "very_sad/notes.txt", "loose.wav"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(make_audio())
    er = Defaults("corpus", "er")
    by_folder = list(read_labelled_folders(tmp_path, er))
    found = {item.id: getattr(item, "answer", None) for item in by_folder}
    assert found == {"angry/1": "angry", "angry/2": "angry", "loose": None, "very_sad/1": "very sad"}
    assert next(item for item in by_folder if item.id == "loose").cause == "no_answer"
    by_stem = [sample.answer for sample in read_labelled_folders(tmp_path, er, "stem")]
    assert by_stem == ["1", "2", "loose", "1"]
