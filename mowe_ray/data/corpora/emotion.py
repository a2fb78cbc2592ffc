"""Corpora of emotional speech: IEMOCAP and MELD.

IEMOCAP: acted and improvised dialogues, cut into utterances with one emotion each.

    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav
    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
        [6.2901 - 8.2357] TAB Ses01F_impro01_F000 TAB neu TAB [2.5000, 2.5000, 2.5000]

for five sessions, as in IEMOCAP_full_release and as the readers of torchaudio and s3prl have it.

MELD: utterances from the series Friends, as video clips, with an emotion and a sentiment each.

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

IEMOCAP_SESSIONS = ("Session1", "Session2", "Session3", "Session4", "Session5")
IEMOCAP_LABELS = {
    "fru": "frustration",
    "ang": "anger",
    "exc": "excited",
    "neu": "neutral",
    "hap": "happiness",
    "sur": "surprise",
    "sad": "sad",
}
_EVALUATION = "dialog/EmoEvaluation"


def is_iemocap(path: Path) -> bool:
    """Whether a folder holds a session."""
    return any(find(path, f"{session}/{_EVALUATION}") for session in IEMOCAP_SESSIONS)


def read_iemocap(folder: Path, defaults: Defaults, session: str | None = None) -> Iterator[Sample | BadSample]:
    """Read utterances with one of seven emotions, called as AudioBench calls them (IEMOCAP_LABELS).

    Labels are not merged. Utterances with another one are left out and counted: fea (fear) and dis (disgust), of which
    there are a handful, oth (other), and xxx, where the annotators did not agree. The corpus has no split of its own;
    people hold out whole sessions, because speakers do not cross them.

    Args:
        folder: with the sessions in it, or one level below.
        defaults: task and instruction; the instruction lists the labels unless another is given.
        session: only this one of IEMOCAP_SESSIONS; None = all that are there.

    Raises:
        ValueError: there is no session.
    """
    wanted = [find(folder, f"{name}/{_EVALUATION}") for name in ([session] if session else IEMOCAP_SESSIONS)]
    if not any(wanted):
        raise ValueError(f"{folder}: no {session or 'Session1'}/{_EVALUATION} in it, so this is not IEMOCAP's layout")
    asked = replace(defaults, instruction=defaults.instruction or choose_from(IEMOCAP_LABELS.values()))
    for evaluation in filter(None, wanted):
        clips = evaluation.parent.parent / "sentences" / "wav"
        for dialogue in sorted(evaluation.glob("Ses*.txt")):
            for line in dialogue.read_text(encoding="utf-8", errors="replace").splitlines():
                fields = line.split("\t")
                if line.startswith("[") and len(fields) >= 3:
                    yield _iemocap_utterance(clips / dialogue.stem / f"{fields[1]}.wav", fields[2], asked)


def _iemocap_utterance(clip: Path, label: str, defaults: Defaults) -> Sample | BadSample:
    if label not in IEMOCAP_LABELS:
        return BadSample(
            clip.stem, defaults.source, "no_answer", f"label {label} is none of {', '.join(IEMOCAP_LABELS)}"
        )
    return defaults.file(clip, clip.stem, IEMOCAP_LABELS[label])


_MELD_CLIPS = {"train": "train_splits", "dev": "dev_splits_complete", "test": "output_repeated_splits_test"}
MELD_SPLITS = tuple(_MELD_CLIPS)
MELD_LABELS = {
    "emotion": ("neutral", "joy", "disgust", "sadness", "surprise", "anger", "fear"),
    "sentiment": ("neutral", "positive", "negative"),
}
_MELD_QUESTIONS = {
    "emotion": "Which emotion does the speaker express?",
    "sentiment": "Which sentiment does the speaker express?",
}


def is_meld(path: Path) -> bool:
    """Whether a folder holds one of the tables."""
    return any(find(path, f"{split}_sent_emo.csv") for split in MELD_SPLITS)


def read_meld(folder: Path, defaults: Defaults, split: str, label: str = "emotion") -> Iterator[Sample | BadSample]:
    """Read one split; of a video only the sound is kept.

    Args:
        folder: with the CSV of the split and its clips in it, which may have been converted (WAV, FLAC).
        defaults: task and instruction; the instruction lists the labels unless another is given.
        split: one of MELD_SPLITS.
        label: the answer, `emotion` or `sentiment`.

    Raises:
        ValueError: the CSV or the folder of the clips is not there.
    """
    table = need(folder, f"{split}_sent_emo.csv", "MELD")
    videos = need(folder, _MELD_CLIPS[split], "MELD")
    clips = audio_by_stem(videos)
    question = choose_from(MELD_LABELS[label], _MELD_QUESTIONS[label])
    asked = replace(defaults, instruction=defaults.instruction or question)
    for row in read_csv(table, "Dialogue_ID", "Utterance_ID", label.capitalize()):
        id = f"dia{row['Dialogue_ID']}_utt{row['Utterance_ID']}"
        clip = clips.get(id, videos / f"{id}.mp4")
        fields = {"id": id, "audio": str(clip.absolute()), "answer": row[label.capitalize()].strip().lower()}
        # A clip with an offset is cut out and stored as FLAC: this is how the pictures are left behind.
        yield asked.sample({**fields, "offset": 0.0} if clip.suffix == ".mp4" else fields, id, table)
