"""Answers on storage: any place where a run can die leaves files that the next one completes to the same bytes."""

from pathlib import Path

import pytest

from mowe_ray.data.sample import BadSample
from mowe_ray.evaluation.predictions import Answer, Predictions, RouterChoice
from mowe_ray.output.run_folder import RunFolder

SETTINGS = {"model": {"model.safetensors": "12-34"}, "generation": {"num_beams": 1}}
# A line separator inside an answer is no end of a line.
BATCHES = [
    ([Answer("a", "asr", "Say it.", "one\u2028two", ["one"], 1.5, None, RouterChoice([0.0, 1.0], [0.25, 0.75]))], []),
    ([], [BadSample("b", "x", "silent", "peak 0")]),
    ([Answer("c", "er", "?", "Gr\u00fc\u00dfe\n", ["x", "y"]), Answer("d", "er", "?", "", ["z"])], []),
]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(str(tmp_path), "evaluation")


def write(folder: RunFolder, settings=SETTINGS, batches=BATCHES) -> Predictions:
    predictions = Predictions(folder, "predictions/set", settings)
    predictions.begin()
    for answers, bad in batches[predictions.finished :]:
        predictions.add(answers, bad, audio_s=2.0, seconds=0.5)
    return predictions


def files(folder: RunFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.local_path("predictions").iterdir()}


def test_what_was_added_is_there(folder):
    for predictions in (write(folder), Predictions(folder, "predictions/set", SETTINGS)):
        assert predictions.answers() == [answer for answers, _ in BATCHES for answer in answers]
        assert predictions.bad == {"silent": 1}
        assert (predictions.audio_s, predictions.seconds, predictions.finished <= 3) == (6.0, 1.5, True)


@pytest.mark.slow
@pytest.mark.parametrize("file", ["set.jsonl", "set.steps.jsonl"])
def test_every_cut_of_a_file_is_completed_to_the_same_bytes(folder, file):
    write(folder)
    whole = files(folder)
    for length in range(len(whole[file])):
        folder.local_path(f"predictions/{file}").write_bytes(whole[file][:length])
        again = write(folder)
        assert files(folder) == whole, f"cut at {length}"
        assert again.replaced == []
        for name, content in whole.items():
            folder.local_path(f"predictions/{name}").write_bytes(content)


def test_finished_micro_batches_are_not_asked_again(folder):
    write(folder, batches=BATCHES[:2])
    assert Predictions(folder, "predictions/set", SETTINGS).finished == 2


def test_other_settings_begin_anew_and_say_which(folder):
    write(folder)
    others = {**SETTINGS, "generation": {"num_beams": 4}, "seed": 1}
    predictions = Predictions(folder, "predictions/set", others)
    assert predictions.replaced == ["generation", "seed"]
    assert (predictions.finished, predictions.answers()) == (0, [])
    assert Predictions(folder, "predictions/set", SETTINGS).finished == 3, "nothing is lost before it begins"
    predictions.begin()
    assert Predictions(folder, "predictions/set", SETTINGS).finished == 0


def test_answers_come_back_from_a_url():
    folder = RunFolder("memory://runs", "evaluation")
    predictions = write(folder)
    assert folder.read_text("predictions/set.jsonl") == "", "an object store is written now and then"
    predictions.flush()
    assert Predictions(folder, "predictions/set", SETTINGS).answers() == predictions.answers()
