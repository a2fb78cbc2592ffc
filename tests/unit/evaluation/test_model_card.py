"""The model card of an export: what the hub reads of it, and what an evaluation changes."""

from typing import Literal

import pytest
import yaml

from mowe_ray.config import load_config
from mowe_ray.evaluation.model_card import CardScore, card_of_part, model_card, while_training, with_scores
from mowe_ray.evaluation.results import Interval, TaskScores

LAST = {
    "builtin": {
        task: {"score": score, "majority": 0.125, "samples": 30}
        for task, score in (("asr", 0.2), ("er", 0.9), ("ac", 0.5), ("aqa", 0.4))
    }
}


def metadata(card: str) -> dict:
    start, block, _ = card.split("---\n", 2)
    assert start == ""
    return yaml.safe_load(block)


def paper() -> dict:
    data = ["data.train.0.path=/home/me/secret/librispeech/train", "data.validation.0.path=s3://bucket/librispeech/dev"]
    return load_config("paper", data).model_dump(mode="json")


def test_the_hub_finds_what_it_looks_for():
    card = model_card("mowe", paper(), while_training(LAST), "0.1.0")
    found = metadata(card)
    assert (found["library_name"], found["pipeline_tag"]) == ("transformers", "audio-text-to-text")
    assert found["base_model"] == [
        "openai/whisper-large-v3",
        "openai/whisper-tiny",
        "facebook/hubert-base-ls960",
        "superb/hubert-base-superb-er",
        "microsoft/Phi-3-mini-4k-instruct",
    ]
    assert {"license", "license_name", "license_link", "tags"} <= found.keys()
    (entry,) = found["model-index"]
    assert entry["name"] == "mowe"
    names = [one["task"]["name"] for one in entry["results"]]
    assert names == ["transcription", "emotion", "captions", "questions about sounds"]
    asr = next(one for one in entry["results"] if one["task"]["type"] == "automatic-speech-recognition")
    assert asr["dataset"]["name"] == "builtin"
    assert asr["metrics"][0]["value"] == 0.2


@pytest.mark.parametrize(("part", "pipeline"), [("llm", "text-generation"), ("front", "audio-text-to-text")])
def test_a_part_has_a_card_of_its_own(part: Literal["llm", "front"], pipeline: str):
    whole = model_card("mowe", paper(), while_training(LAST), "0.1.0")
    card = card_of_part(whole, part)
    found = metadata(card)
    assert (found["pipeline_tag"], found["base_model"]) == (pipeline, metadata(whole)["base_model"])
    assert "model-index" not in found
    assert ("custom_code" in found["tags"]) == (part == "front")
    assert f"# mowe: {part}" in card
    assert "mowe_ray.serve" not in card
    assert card.count("## Use") == 1
    assert "| builtin | transcription |" in card
    own = card_of_part("# mine\n\nMy words.\n", part)  # somebody's own card
    assert f"# mine: {part}" in own
    assert own.index("My words.") < own.index("## Use")


def test_it_says_what_the_model_is_and_not_where_files_lie():
    card = model_card("mowe", paper(), [], "0.1.0")
    for text in (
        "# mowe",
        "weak encoder `",
        "librispeech/train",
        "trust_remote_code=True",
        "mowe_ray.ask",
        "Not scored yet",
    ):
        assert text in card
    assert "secret" not in card
    assert "bucket" not in card
    assert "no pool" in model_card("b", load_config("paper_baseline").model_dump(mode="json"), [], "0.1.0")


def test_scores_with_intervals_take_the_place_of_others_and_the_users_words_stay():
    card = model_card("q", load_config("quickstart").model_dump(mode="json"), while_training(LAST), "0.1.0")
    assert "| builtin | transcription | validation score of 0 to 1, higher is better | **0.2** | 0.125 | 30 |" in card
    edited = card.replace("license: other", "license: mit") + "\nIt fails on whispers.\n"
    scored = TaskScores(
        "dev", "asr", 30, {"wer": Interval(12.5, 10.0, 15.25)}, {"wer": "WER, %"}, {"wer": "lower"}, {"wer": 90.0}
    )
    again = with_scores(edited, [CardScore.of(scored)])
    assert "| dev | transcription | WER, %, lower is better | **12.5** (10 to 15.25) | 90 | 30 |" in again
    assert "| builtin |" not in again
    assert "It fails on whispers." in again
    assert metadata(again)["license"] == "mit"
    (result,) = metadata(again)["model-index"][0]["results"]
    assert (result["metrics"][0]["type"], result["metrics"][0]["value"]) == ("wer", 12.5)
    assert with_scores(again, [CardScore.of(scored)]) == again
