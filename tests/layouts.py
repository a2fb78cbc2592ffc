"""The same twenty clips in every layout that is read directly, written by the library of the layout if it has one."""

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from tests.read_source import write_lines

CLIPS, RATE, SECONDS = 20, 16_000, 0.5
QUESTION = "Is the tone high or low?"
ANSWERS = ["high" if n % 3 else "low" for n in range(CLIPS)]
Source = dict[str, Any]
LAYOUTS: dict[str, Callable[[Path], Source]] = {}


def layout(write: Callable[[Path], Source]) -> Callable[[Path], Source]:
    """Enter a function that writes the clips to a folder, and returns the section that reads them."""
    LAYOUTS[write.__name__] = write
    return write


def wave(number: int) -> np.ndarray:
    time = np.arange(round(SECONDS * RATE)) / RATE
    pitch = (700 if ANSWERS[number] == "high" else 150) + 7 * number
    return np.round(9000 * np.sin(2 * np.pi * pitch * time)).astype(np.int16)


def encoded(number: int) -> bytes:
    out = io.BytesIO()
    soundfile.write(out, wave(number), RATE, format="WAV", subtype="PCM_16")
    return out.getvalue()


def write_clips(folder: Path) -> list[str]:
    """Write `clips/00.wav`, ...; return their names."""
    (folder / "clips").mkdir(parents=True)
    names = [f"clips/{n:02d}.wav" for n in range(CLIPS)]
    for number, name in enumerate(names):
        (folder / name).write_bytes(encoded(number))
    return names


def write_members(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def table_of(folder: Path, suffix: str, delimiter: str, audio: str, question: str, answer: str) -> str:
    rows = [[audio, question, answer], *([n, QUESTION, a] for n, a in zip(write_clips(folder), ANSWERS, strict=True))]
    path = folder / f"tones.{suffix}"
    path.write_text("".join(delimiter.join(row) + "\n" for row in rows))
    return str(path)


@layout
def csv(folder: Path) -> Source:
    return {"path": table_of(folder, "csv", ",", "path", "question", "answer")}


@layout
def csv_with_semicolons_and_own_columns(folder: Path) -> Source:
    columns = {"audio": "Datei", "instruction": "Frage", "answer": "Antwort"}
    return {"path": table_of(folder, "csv", ";", "Datei", "Frage", "Antwort"), "columns": columns}


@layout
def tsv(folder: Path) -> Source:
    return {"path": table_of(folder, "tsv", "\t", "audio", "instruction", "answer")}


def lines(folder: Path, row: Callable[[str, str], dict[str, Any]]) -> str:
    rows = [row(name, answer) for name, answer in zip(write_clips(folder), ANSWERS, strict=True)]
    return str(write_lines(folder / "tones.jsonl", rows))


@layout
def jsonl(folder: Path) -> Source:
    return {"path": lines(folder, lambda name, answer: {"audio": name, "question": QUESTION, "answer": answer})}


@layout
def jsonl_gz(folder: Path) -> Source:
    plain = Path(jsonl(folder)["path"])
    packed = folder / "tones.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    return {"path": str(packed)}


@layout
def jsonl_zst(folder: Path) -> Source:
    plain = Path(jsonl(folder)["path"])
    with pa.output_stream(f"{plain}.zst", compression="zstd") as packed:
        packed.write(plain.read_bytes())
    plain.unlink()
    return {"path": f"{plain}.zst"}


@layout
def json_list(folder: Path) -> Source:
    rows = [{"audio": n, "question": QUESTION, "answer": a} for n, a in zip(write_clips(folder), ANSWERS, strict=True)]
    (folder / "tones.json").write_text(json.dumps(rows, indent=1))
    return {"path": str(folder / "tones.json")}


@layout
def ms_swift(folder: Path) -> Source:
    def row(name: str, answer: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": f"<audio>{QUESTION}"}, {"role": "assistant", "content": answer}]
        return {"messages": turns, "audios": [name]}

    return {"path": lines(folder, row)}


@layout
def ms_swift_query_and_response(folder: Path) -> Source:
    return {"path": lines(folder, lambda n, a: {"query": f"<audio>{QUESTION}", "response": a, "audios": [n]})}


@layout
def sharegpt(folder: Path) -> Source:
    def row(name: str, answer: str) -> dict[str, Any]:
        turns = [{"from": "human", "value": f"<audio>\n{QUESTION}"}, {"from": "gpt", "value": answer}]
        return {"conversations": turns, "audios": [name]}

    return {"path": lines(folder, row)}


@layout
def openai(folder: Path) -> Source:
    def row(name: str, answer: str) -> dict[str, Any]:
        parts = [{"type": "audio", "audio": name}, {"type": "text", "text": QUESTION}]
        return {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]}

    return {"path": lines(folder, row)}


@layout
def alpaca(folder: Path) -> Source:
    return {"path": lines(folder, lambda n, a: {"instruction": QUESTION, "input": "", "output": a, "audios": [n]})}


@layout
def nemo(folder: Path) -> Source:
    """Segments of one long recording."""
    soundfile.write(folder / "long.wav", np.concatenate([wave(n) for n in range(CLIPS)]), RATE, subtype="PCM_16")
    rows = [
        {"audio_filepath": "long.wav", "text": answer, "offset": n * SECONDS, "duration": SECONDS}
        for n, answer in enumerate(ANSWERS)
    ]
    return {"path": str(write_lines(folder / "manifest.json", rows)), "instruction": QUESTION}


@layout
def nemo_tarred(folder: Path) -> Source:
    half, names = CLIPS // 2, [f"clips_{n:02d}.wav" for n in range(CLIPS)]
    for shard in (0, 1):
        part = range(shard * half, shard * half + half)
        write_members(folder / f"audio_{shard}.tar", *((names[n], encoded(n)) for n in part))
    rows = [
        {"audio_filepath": names[n], "text": answer, "duration": SECONDS, "shard_id": n // half}
        for n, answer in enumerate(ANSWERS)
    ]
    write_lines(folder / "tarred_audio_manifest.json", rows)
    return {"path": str(folder), "instruction": QUESTION}


def cuts(folder: Path) -> Any:
    from lhotse import CutSet, Recording, SupervisionSegment

    found = []
    for name, answer in zip(write_clips(folder), ANSWERS, strict=True):
        recording = Recording.from_file(folder / name)
        cut = recording.to_cut()
        cut.supervisions = [SupervisionSegment(cut.id, recording.id, 0.0, recording.duration, text=answer)]
        found.append(cut)
    return CutSet.from_cuts(found)


@layout
def lhotse_cuts(folder: Path) -> Source:
    cuts(folder).to_file(folder / "cuts.jsonl.gz")
    return {"path": str(folder / "cuts.jsonl.gz"), "instruction": QUESTION}


@layout
def lhotse_cuts_of_several(folder: Path) -> Source:
    """Appended halves of clips."""
    halves = [
        cut.truncate(duration=SECONDS / 2).append(cut.truncate(offset=SECONDS / 2).drop_supervisions())
        for cut in cuts(folder)
    ]
    with gzip.open(folder / "cuts.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(cut.to_dict()) + "\n" for cut in halves)
    return {"path": str(folder / "cuts.jsonl.gz"), "instruction": QUESTION}


@layout
def lhotse_shar(folder: Path) -> Source:
    (folder / "shar").mkdir()
    cuts(folder).to_shar(folder / "shar", fields={"recording": "wav"}, shard_size=CLIPS)
    return {"path": str(folder / "shar"), "instruction": QUESTION}


@layout
def audiofolder(folder: Path) -> Source:
    names = write_clips(folder)
    rows = [
        "file_name,transcription",
        *(f"{n.removeprefix('clips/')},{a}" for n, a in zip(names, ANSWERS, strict=True)),
    ]
    (folder / "clips" / "metadata.csv").write_text("\n".join(rows))
    return {"path": str(folder / "clips"), "instruction": QUESTION}


@layout
def audiofolder_jsonl(folder: Path) -> Source:
    names = write_clips(folder)
    rows = [{"file_name": n.removeprefix("clips/"), "text": a} for n, a in zip(names, ANSWERS, strict=True)]
    write_lines(folder / "clips" / "metadata.jsonl", rows)
    return {"path": str(folder / "clips"), "instruction": QUESTION}


@layout
def audiofolder_parquet(folder: Path) -> Source:
    names = [name.removeprefix("clips/") for name in write_clips(folder)]
    pq.write_table(pa.table({"file_name": names, "text": ANSWERS}), folder / "clips" / "metadata.parquet")
    return {"path": str(folder / "clips"), "instruction": QUESTION}


@layout
def wav_and_txt(folder: Path) -> Source:
    for name, answer in zip(write_clips(folder), ANSWERS, strict=True):
        (folder / name).with_suffix(".txt").write_text(answer + "\n")
    return {"path": str(folder), "instruction": QUESTION}


@layout
def wav_and_lab(folder: Path) -> Source:
    for name, answer in zip(write_clips(folder), ANSWERS, strict=True):
        (folder / name).with_suffix(".lab").write_text(answer)
    return {"path": f"{folder}/clips", "instruction": QUESTION}


def webdataset_of(path: Path, fields: Callable[[int], dict[str, Any]], first: int = 0, last: int = CLIPS) -> Path:
    from webdataset import TarWriter

    with TarWriter(str(path)) as shard:
        for number in range(first, last):
            shard.write({"__key__": f"speaker.{number % 2}/take{number:02d}", "wav": encoded(number), **fields(number)})
    return path


@layout
def webdataset_json(folder: Path) -> Source:
    webdataset_of(folder / "a.tar", lambda n: {"json": {"question": QUESTION, "answer": ANSWERS[n]}})
    return {"path": str(folder)}


@layout
def webdataset_txt(folder: Path) -> Source:
    return {"path": str(webdataset_of(folder / "a.tar", lambda n: {"txt": ANSWERS[n]})), "instruction": QUESTION}


@layout
def webdataset_cls(folder: Path) -> Source:
    webdataset_of(folder / "a.tar", lambda n: {"cls": int(ANSWERS[n] == "high")})
    return {"path": str(folder), "instruction": QUESTION, "labels": ["low", "high"]}


@layout
def webdataset_in_braces(folder: Path) -> Source:
    for shard in range(2):
        half = CLIPS // 2
        webdataset_of(folder / f"{shard:03d}.tar", lambda n: {"txt": ANSWERS[n]}, shard * half, shard * half + half)
    return {"path": f"{folder}/{{000..001}}.tar", "instruction": QUESTION}


@layout
def webdataset_as_a_list(folder: Path) -> Source:
    webdataset_in_braces(folder)
    return {"path": [f"{folder}/000.tar", f"{folder}/001.tar"], "instruction": QUESTION}


@layout
def webdataset_in_a_file_of_paths(folder: Path) -> Source:
    webdataset_in_braces(folder)
    (folder / "shards.txt").write_text("000.tar\n001.tar\n")
    return {"path": f"{folder}/shards.txt", "instruction": QUESTION}


@layout
def webdataset_tar_gz(folder: Path) -> Source:
    path = webdataset_of(folder / "a.tar", lambda n: {"txt": ANSWERS[n]})
    (folder / "a.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    path.unlink()
    return {"path": str(folder), "instruction": QUESTION}


@layout
def webdataset_tar_zst_and_lz4(folder: Path) -> Source:
    for shard, (suffix, codec) in enumerate({"zst": "zstd", "lz4": "lz4"}.items()):
        half = CLIPS // 2
        path = webdataset_of(folder / f"{shard}.tar", lambda n: {"txt": ANSWERS[n]}, shard * half, shard * half + half)
        with pa.output_stream(f"{path}.{suffix}", compression=codec) as packed:
            packed.write(path.read_bytes())
        path.unlink()
    return {"path": str(folder), "instruction": QUESTION}


@layout
def xares_llm(folder: Path) -> Source:
    webdataset_of(folder / "a.tar", lambda n: {"json": {"captions": [ANSWERS[n], "a tone"], "duration": SECONDS}})
    return {"path": str(folder), "instruction": QUESTION}


def hugging_face(folder: Path) -> Any:
    from datasets import Audio, Dataset

    paths = [str(folder / name) for name in write_clips(folder)]
    return Dataset.from_dict({"audio": paths, "sentence": ANSWERS}).cast_column("audio", Audio(decode=False))


@layout
def hugging_face_parquet(folder: Path) -> Source:
    hugging_face(folder).to_parquet(folder / "train-00000-of-00001.parquet")
    return {"path": str(folder), "instruction": QUESTION}


@layout
def hugging_face_saved_to_disk(folder: Path) -> Source:
    hugging_face(folder).save_to_disk(folder / "saved")
    return {"path": str(folder / "saved"), "instruction": QUESTION}


@layout
def parquet_of_floats_and_large_types(folder: Path) -> Source:
    arrays = [(wave(n) / 32768).tolist() for n in range(CLIPS)]
    audio = pa.StructArray.from_arrays(
        [pa.array(arrays, pa.large_list(pa.float32())), pa.array([RATE] * CLIPS)], ["array", "sampling_rate"]
    )
    pq.write_table(pa.table({"audio": audio, "answer": pa.array(ANSWERS, pa.large_string())}), folder / "a.parquet")
    return {"path": str(folder), "instruction": QUESTION}


@layout
def parquet_of_conversations(folder: Path) -> Source:
    turns = [
        [{"role": "user", "content": f"<audio>{QUESTION}"}, {"role": "assistant", "content": answer}]
        for answer in ANSWERS
    ]
    audios = [[{"bytes": encoded(n), "path": None}] for n in range(CLIPS)]
    pq.write_table(pa.table({"messages": turns, "audios": audios}), folder / "a.parquet")
    return {"path": str(folder)}


def labelled_folders(folder: Path) -> Source:
    for number, answer in enumerate(ANSWERS):
        (folder / answer).mkdir(exist_ok=True)
        (folder / answer / f"{number:02d}.wav").write_bytes(encoded(number))
    return {"path": str(folder), "instruction": QUESTION}
