"""IEMOCAP: acted and improvised dialogues, cut into utterances with one emotion each.

    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav
    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
        [6.2901 - 8.2357] TAB Ses01F_impro01_F000 TAB neu TAB [2.5000, 2.5000, 2.5000]

for five sessions, as in IEMOCAP_full_release and as the readers of torchaudio and s3prl have it.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mowe_ray.data.corpora.layout import Defaults, choose_from, find
from mowe_ray.data.sample import BadSample, Sample

SPLITS = ("Session1", "Session2", "Session3", "Session4", "Session5")
LABELS = {
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
    return any(find(path, f"{session}/{_EVALUATION}") for session in SPLITS)


def read_iemocap(folder: Path, defaults: Defaults, session: str | None = None) -> Iterator[Sample | BadSample]:
    """Read utterances with one of seven emotions, called as AudioBench calls them (LABELS).

    Labels are not merged. Utterances with another one are left out and counted: fea (fear) and dis (disgust), of which
    there are a handful, oth (other), and xxx, where the annotators did not agree. The corpus has no split of its own;
    people hold out whole sessions, because speakers do not cross them.

    Args:
        folder: with the sessions in it, or one level below.
        defaults: task and instruction; the instruction lists the labels unless another is given.
        session: only this one of SPLITS; None = all that are there.

    Raises:
        ValueError: there is no session.
    """
    wanted = [find(folder, f"{name}/{_EVALUATION}") for name in ([session] if session else SPLITS)]
    if not any(wanted):
        raise ValueError(f"{folder}: no {session or 'Session1'}/{_EVALUATION} in it, so this is not IEMOCAP's layout")
    asked = replace(defaults, instruction=defaults.instruction or choose_from(LABELS.values()))
    for evaluation in filter(None, wanted):
        clips = evaluation.parent.parent / "sentences" / "wav"
        for dialogue in sorted(evaluation.glob("Ses*.txt")):
            for line in dialogue.read_text(encoding="utf-8", errors="replace").splitlines():
                fields = line.split("\t")
                if line.startswith("[") and len(fields) >= 3:
                    yield _utterance(clips / dialogue.stem / f"{fields[1]}.wav", fields[2], asked)


def _utterance(clip: Path, label: str, defaults: Defaults) -> Sample | BadSample:
    if label not in LABELS:
        return BadSample(clip.stem, defaults.source, "no_answer", f"label {label} is none of {', '.join(LABELS)}")
    return defaults.file(clip, clip.stem, LABELS[label])
