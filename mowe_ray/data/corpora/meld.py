"""MELD: utterances from the series Friends, as video clips, with an emotion and a sentiment each.

    train_sent_emo.csv  train_splits/dia0_utt0.mp4
    dev_sent_emo.csv    dev_splits_complete/dia0_utt0.mp4
    test_sent_emo.csv   output_repeated_splits_test/dia0_utt0.mp4

as MELD.Raw.tar.gz and the three archives in it unpack; the CSVs are also at github.com/declare-lab/MELD. Their columns
include Emotion, Sentiment, Dialogue_ID and Utterance_ID. Clips that no row names (among them final_videos_test*) are
ignored, as the authors advise (issue 22 there); train/dia125_utt3 is broken and dev/dia110_utt7 was never there.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, audio_by_stem, choose_from, find, need, read_csv
from mowe_ray.data.sample import BadSample, Sample

_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
SPLITS = tuple(_CLIPS)
LABELS = {
    "emotion": ("neutral", "joy", "disgust", "sadness", "surprise", "anger", "fear"),
    "sentiment": ("neutral", "positive", "negative"),
}
_QUESTIONS = {
    "emotion": "Which emotion does the speaker express?",
    "sentiment": "Which sentiment does the speaker express?",
}


def is_meld(path: Path) -> bool:
    """Whether a folder holds one of the tables."""
    return any(find(path, f"{split}_sent_emo.csv") for split in SPLITS)


def read_meld(folder: Path, defaults: Defaults, split: str, label: str = "emotion") -> Iterator[Sample | BadSample]:
    """Read one split; of a video only the sound is kept.

    Args:
        folder: with the CSV of the split and its clips in it, which may have been converted (WAV, FLAC).
        defaults: task and instruction; the instruction lists the labels unless another is given.
        split: one of SPLITS.
        label: the answer, `emotion` or `sentiment`.

    Raises:
        ValueError: the CSV or the folder of the clips is not there.
    """
    table = need(folder, f"{split}_sent_emo.csv", "MELD")
    videos = need(folder, _CLIPS[split], "MELD")
    clips = audio_by_stem(videos)
    question = choose_from(LABELS[label], _QUESTIONS[label])
    asked = replace(defaults, instruction=defaults.instruction or question)
    for row in read_csv(table, "Dialogue_ID", "Utterance_ID", label.capitalize()):
        id = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        clip = clips.get(id, videos / f"{id}.mp4")
        fields = {"id": id, "audio": str(clip.absolute()), "answer": row[label.capitalize()].strip().lower()}
        # A clip with an offset is cut out and stored as FLAC: this is how the pictures are left behind.
        yield asked.sample({**fields, "offset": 0.0} if clip.suffix == ".mp4" else fields, id, table)
