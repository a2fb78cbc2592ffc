"""Cuts of lhotse: a piece of a recording, or several mixed, and its transcript, as fields of the usual names.

The format: https://lhotse.readthedocs.io/en/latest/cuts.html
"""

from collections.abc import Mapping
from typing import Any

from mowe_ray.data.sample import BadAudio
from mowe_ray.data.shards.fields import as_text
from mowe_ray.data.shards.mix import Mix, Track

_PADDING = "PaddingCut"
_PACKED = ("shar", "memory")  # types of sources whose audio is the cut itself, and lies elsewhere
_READ = ("file", "url", None)


def is_cut(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a cut of lhotse."""
    tracks = fields.get("tracks")
    mixed = isinstance(tracks, list) and any(isinstance(track, Mapping) and "cut" in track for track in tracks)
    return mixed or (isinstance(fields.get("supervisions"), list) and "recording" in fields)


def from_cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a cut: its own custom ones and those of its supervisions, whose texts are joined.

    Raises:
        BadAudio: its audio is made in a way that is not known here.
    """
    tracks = [track for track in cut.get("tracks") or [{"cut": cut}] if not track.get("mute")]
    supervisions = [one for track in tracks for one in track["cut"].get("supervisions") or []]
    fields: dict[str, Any] = {}
    for supervision in reversed(supervisions):
        fields |= {**(supervision.get("custom") or {}), "speaker": supervision.get("speaker")}
    for track in reversed(tracks):
        fields |= track["cut"].get("custom") or {}
    texts = [as_text(supervision.get("text")) for supervision in supervisions]
    if text := " ".join(filter(None, texts)):
        fields = {"text": text} | fields
    audio = _mix(cut) if "tracks" in cut else _piece(cut)
    return fields | audio | {"id": cut.get("id")}


def _piece(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about the audio of a cut of one recording."""
    recording = cut.get("recording") or {}
    sources = recording.get("sources") or [{}]
    fields = {"duration": cut.get("duration")}
    if any(source.get("type") in _PACKED for source in sources):
        return fields
    channels = len(recording.get("channel_ids") or sources[0].get("channels") or [0])
    if channels > 1 or len(sources) > 1 or _gain(recording) != 1:
        track = _track({"cut": cut})
        return {**fields, "audio": Mix((track,), track.rate, track.seconds)}
    whole = not cut.get("start") and cut.get("duration") == recording.get("duration")
    return {**fields, "audio": _file(sources[0])} | ({} if whole else {"offset": cut.get("start") or 0.0})


def _mix(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields about the audio of a cut that is mixed, appended or padded."""
    given = list(cut["tracks"])
    if reference := cut.get("snr_reference"):
        given.append({**reference, "is_snr_reference": True, "mute": True})
    tracks = tuple(map(_track, given))
    audible = [track for track in tracks if not track.mute] or tracks
    rate = next((track.rate for track in audible if track.sources), audible[0].rate)
    seconds = round(max(track.offset + track.seconds for track in audible), 8)
    return {"audio": Mix(tracks, rate, seconds, _gain(cut)), "duration": seconds}


def _track(track: Mapping[str, Any]) -> Track:
    cut = track["cut"]
    padding = _PADDING in (track.get("type"), cut.get("type"))
    recording = {} if padding else cut.get("recording") or {}
    channel = cut.get("channel") or 0
    wanted = channel if isinstance(channel, list) else [channel]
    sources = []
    for source in recording.get("sources") or []:
        kept = [place for place, channel in enumerate(source.get("channels") or [0]) if channel in wanted]
        sources += [(_file(source), tuple(kept))] if kept else []
    if not (sources or padding):
        raise BadAudio("no_audio", f"the cut {cut.get('id')} has no recording")
    return Track(
        tuple(sources),
        rate=int(recording.get("sampling_rate") or cut.get("sampling_rate") or 16_000),
        start=float(cut.get("start") or 0),
        seconds=float(cut["duration"]),
        gain=_gain(recording),
        offset=float(track.get("offset") or 0),
        snr=track.get("snr"),
        reference=bool(track.get("is_snr_reference")),
        mute=bool(track.get("mute")),
    )


def _file(source: Mapping[str, Any]) -> str:
    if source.get("type") not in _READ:
        raise BadAudio("unknown_audio", f"its recording is of type {source['type']!r}: save it by cuts.save_audios()")
    return str(source.get("source"))


def _gain(made: Mapping[str, Any]) -> float:
    """Return the product of the volumes among the transforms of a recording or cut.

    Raises:
        BadAudio: there are others; but for resampling, since all is brought to the rate of the cut.
    """
    gain = 1.0
    for transform in made.get("transforms") or []:
        name = str(transform.get("name")).rpartition(".")[2]
        if name == "Volume":
            gain *= float((transform.get("kwargs") or {})["factor"])
        elif name != "Resample":
            raise BadAudio(
                "unknown_audio", f"'transforms' has {name}, which lhotse applies: save the audio by cuts.save_audios()"
            )
    return gain
