"""The paper's corpora in miniature, in the layouts in which they are published, each with one clip missing."""

import csv
import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile


def tone(pitch: int = 440, seconds: float = 0.4, container: str = "WAV", rate: int = 16_000) -> bytes:
    """An encoded tone; `pitch` tells clips apart."""
    file = io.BytesIO()
    time = np.arange(int(seconds * rate)) / rate
    soundfile.write(file, 0.5 * np.sin(2 * np.pi * pitch * time), rate, format=container)
    return file.getvalue()


def video(seconds: float = 1.0) -> bytes:
    """An MP4 with black pictures and an AAC tone."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        pictures = out.add_stream("mpeg4", rate=10)
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        sound = out.add_stream("aac", rate=16_000)
        sound.layout = "mono"
        for _ in range(int(10 * seconds)):
            out.mux(pictures.encode(av.VideoFrame(64, 64, "yuv420p")))
        wave = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * 16_000)) / 16_000)
        frame = av.AudioFrame.from_ndarray(wave.astype(np.float32)[None], format="fltp", layout="mono")
        frame.sample_rate = 16_000
        resampler = av.AudioResampler("fltp", "mono", 16_000, frame_size=sound.frame_size or None)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            out.mux(sound.encode(piece))
        for stream in (pictures, sound):
            out.mux(stream.encode(None))
    return file.getvalue()


def put(file: Path, content: bytes | str) -> None:
    """Write a file and the folders above it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())


def put_csv(file: Path, header: str, rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV as Python's and pandas' writers do, with quotes only where they are needed."""
    text = io.StringIO()
    csv.writer(text).writerows([header.split(","), *rows])
    put(file, text.getvalue())


def common_voice(root: Path) -> None:
    columns = "client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccents\tvariant\tlocale\tsegment\n"
    rest = "\t2\t0\t\t\t\t\ten\t\n"
    rows = [f'a\tcommon_voice_en_1.mp3\t"Quoted" words, kept.{rest}', f"b\tcommon_voice_en_2.mp3\tGone.{rest}"]
    put(root / "en" / "test.tsv", columns + "".join(rows))
    put(root / "en" / "train.tsv", columns + f"c\tcommon_voice_en_3.mp3\tTo train on.{rest}")
    for number in (1, 3):
        put(root / "en" / "clips" / f"common_voice_en_{number}.mp3", tone(300 + number, 1.0, "MP3"))


def audiocaps(root: Path) -> None:
    header = "audiocap_id,youtube_id,start_time,caption"
    put_csv(root / "train.csv", header, [(1, "-aB_c", 30, "A dog barks, twice"), (2, "gone", 0, "A cat")])
    captions = [(10 + n, "r1nicOVtvkQ", 130, f"Water, in words {n}") for n in range(5)]
    put_csv(root / "test.csv", header, [*captions, *((20 + n, "gone", 20, "Clanging") for n in range(5))])
    put(root / "audio_32000Hz" / "train" / "-aB_c_30.flac", tone(301, container="FLAC"))  # named as aac-datasets does
    put(root / "test" / "12.ogg", tone(302, container="OGG"))  # and as audiocaps-download does


def wavcaps(root: Path) -> None:
    def table(*entries: dict[str, object]) -> str:
        return json.dumps({"num_captions_per_audio": 1, "data": entries})

    entry = {"id": "Yb0RFKhbpFJA.wav", "caption": "Wind and a man speaking.", "audio": "wav_path", "duration": 10.04}
    put(root / "json_files" / "AudioSet_SL" / "as_final.json", table(entry))
    sounds = [{"id": id, "caption": f"Sound {id}.", "href": "x", "duration": 1.0} for id in ("7", "8")]
    put(root / "json_files" / "SoundBible" / "sb_final.json", table(*sounds))
    deep = root / "mnt" / "fast" / "nobackup" / "scratch4weeks" / "xm00178" / "WavCaps" / "data" / "waveforms"
    put(deep / "AudioSet_SL_flac" / "Yb0RFKhbpFJA.flac", tone(301, container="FLAC"))
    put(root / "Audio" / "SoundBible" / "7.flac", tone(302, container="FLAC"))


def clotho_aqa(root: Path) -> None:
    header = "file_name,QuestionText,answer,confidence"
    asked = {
        "Are there waves?": [("yes", "yes"), ("Yes", "yes"), ("no", "yes")],
        "What sings, if anything?": [("birds", "yes"), ("crow", "yes"), ("people", "maybe")],
        "Is it raining?": [("yes", "yes"), ("no", "yes"), ("yes", "no")],
    }
    rows = [("wind blows (1).wav", question, *vote) for question, votes in asked.items() for vote in votes]
    put_csv(root / "clotho_aqa_test.csv", header, [*rows, ("gone.wav", "Is it?", "no", "yes")])
    put_csv(root / "clotho_aqa_train.csv", header, rows)
    put(root / "audio_files" / "wind blows (1).wav", tone(301))


def iemocap(root: Path) -> None:
    for session, labels in {1: ("neu", "fru", "xxx"), 2: ("exc", "sur", "sad")}.items():
        folder, dialogue = root / "IEMOCAP_full_release" / f"Session{session}", f"Ses0{session}F_script01_1"
        lines = "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
        for number, label in enumerate(labels):
            name = f"{dialogue}_M00{number}"
            lines += f"[{number}.2901 - {number}.9]\t{name}\t{label}\t[2.5000, 2.5000, 2.5000]\n"
            lines += "C-E2:\tNeutral;\t()\nA-E3:\tval 3; act 2; dom  2;\t()\n\n"
            if name != "Ses02F_script01_1_M002":
                put(folder / "sentences" / "wav" / dialogue / f"{name}.wav", tone(300 + 10 * session + number))
        put(folder / "dialog" / "EmoEvaluation" / f"{dialogue}.txt", lines)
        put(folder / "dialog" / "EmoEvaluation" / "Categorical" / f"{dialogue}_e1_cat.txt", f"{dialogue}_M000 :Anger;")
        put(folder / "dialog" / "EmoEvaluation" / f"._{dialogue}.txt", b"\x00\x05\x16\x07Mac OS X")


def meld(root: Path) -> None:
    header = "Sr No.,Utterance,Speaker,Emotion,Sentiment,Dialogue_ID,Utterance_ID,Season,Episode,StartTime,EndTime"
    rest = (4, 7, "00:20:57,256", "00:21:00,049")
    rows = [
        (1, "Oh my God, he’s lost it.", "Phoebe", "sadness", "negative", 0, 0, *rest),
        (2, "What?", "Monica", "surprise", "negative", 0, 1, *rest),
        (3, "You’re a genius!", "Chandler", "joy", "positive", 1, 0, *rest),
    ]
    put_csv(root / "test_sent_emo.csv", header, rows)
    clips = root / "output_repeated_splits_test"
    put(clips / "dia0_utt0.mp4", video())
    put(clips / "final_videos_testdia0_utt0.mp4", b"")
    put(clips / "dia0_utt1.wav", tone(301))


def slue_sqa5(root: Path) -> None:
    def row(number: int, audio: bytes | None, answers: list[str]) -> dict[str, object]:
        times = [0.1 * n for n in range(len(answers))]
        return {
            "question_id": f"squad-{number}",
            "question_audio": {"bytes": tone(900 + number), "path": f"squad-{number}.wav"},
            "question_speaker_id": "s",
            "raw_question_text": f"Who, in {number}?",
            "normalized_question_text": f"who in {number}",
            "document_id": "Germany_1",
            "document_audio": {"bytes": audio, "path": "Germany_1.wav"},
            "document_speaker_id": "d",
            "raw_document_text": "She, of course.",
            "normalized_document_text": "she of course",
            "word2time": {"word": ["She"], "start_second": [0.1], "end_second": [0.2]},
            "answer_spans": {"answer": answers, "start_second": times, "end_second": times},
        }

    rows = [row(1, tone(301), ["she", "she of course", "she"]), row(2, None, ["she"])]
    for split in ("train", "verified_test"):
        put(root / "sqa5" / f"{split}-00000-of-00001.parquet", b"")
        pq.write_table(pa.Table.from_pylist(rows), root / "sqa5" / f"{split}-00000-of-00001.parquet")


def spoken_squad(root: Path) -> None:
    def asked(id: str, *answers: str) -> dict[str, object]:
        return {"id": id, "question": f"Which one, {id}?", "answers": [{"answer_start": 0, "text": a} for a in answers]}

    paragraphs = [
        {"context": "none is asked", "qas": []},
        {"context": "denver broncos", "qas": [asked("q1", "broncos", "denver broncos", "broncos"), asked("q2", "two")]},
        {"context": "a sentence is missing", "qas": [asked("q3", "three")]},
    ]
    for split in ("train", "test"):
        data = {"data": [{"title": "Super_Bowl_50", "paragraphs": paragraphs}], "version": "1.1"}
        put(root / f"spoken_{split}-v1.1.json", json.dumps(data))
    for name, pitch in {"0_0_0": 300, "0_1_0": 500, "0_1_1": 700, "0_2_0": 300, "0_2_2": 300}.items():
        put(root / "Spoken-SQuAD_audio" / "dev_wav" / f"{name}.wav", tone(pitch, 0.5, rate=24_000))


# Each corpus, and a split of it.
CORPORA: dict[str, tuple[Callable[[Path], None], str]] = {
    "common-voice": (common_voice, "test"),
    "audiocaps": (audiocaps, "test"),
    "wavcaps": (wavcaps, "SoundBible"),
    "clotho-aqa": (clotho_aqa, "test"),
    "iemocap": (iemocap, "Session2"),
    "meld": (meld, "test"),
    "slue-sqa5": (slue_sqa5, "verified_test"),
    "spoken-squad": (spoken_squad, "test"),
}
