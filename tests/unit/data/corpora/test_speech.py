"""Corpora of transcribed speech."""

import pytest

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
