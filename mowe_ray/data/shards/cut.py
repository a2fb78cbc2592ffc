"""Cuts of lhotse: a piece of a recording and what is said in it, as fields of the usual names.

The format: https://lhotse.readthedocs.io/en/latest/cuts.html
"""

from collections.abc import Mapping
from typing import Any

from mowe_ray.data.sample import BadAudio
from mowe_ray.data.shards.fields import as_text

_PADDING = "PaddingCut"
_PACKED = ("shar", "memory")  # types of sources whose audio is the cut itself, and lies elsewhere


def is_cut(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a cut of lhotse."""
    tracks = fields.get("tracks")
    mixed = isinstance(tracks, list) and any(isinstance(track, Mapping) and "cut" in track for track in tracks)
    return mixed or (isinstance(fields.get("supervisions"), list) and "recording" in fields)


def from_cut(cut: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a cut: its own custom ones and those of its supervisions, whose texts are joined.

    Raises:
        BadAudio: it is mixed of several recordings, or of one channel among several.
    """
    cut = _without_padding(cut)
    kind = cut.get("type") or ("MixedCut" if "tracks" in cut else "MonoCut")
    if kind != "MonoCut":
        raise BadAudio("unknown_audio", f"a {kind} of lhotse is more than one recording: save it by cuts.save_audios()")
    recording = cut.get("recording")
    recording = recording if isinstance(recording, Mapping) else {}
    fields: dict[str, Any] = {"duration": cut.get("duration")}
    supervisions = cut.get("supervisions") or []
    for supervision in reversed(supervisions):
        fields |= {**(supervision.get("custom") or {}), "speaker": supervision.get("speaker")}
    fields |= cut.get("custom") or {}
    texts = [as_text(supervision.get("text")) for supervision in supervisions]
    if text := " ".join(filter(None, texts)):
        fields = {"text": text} | fields
    source = (recording.get("sources") or [{}])[0]
    if source.get("type") not in _PACKED:
        if len(recording.get("channel_ids") or source.get("channels") or [0]) > 1:
            raise BadAudio("unknown_audio", "one channel of several: save the cut's audio, as by cuts.save_audios()")
        if source.get("type") not in ("file", "url", None):
            raise BadAudio("unknown_audio", f"its recording is of type {source['type']!r}")
        fields["audio"] = source.get("source")
        if cut.get("start") or cut.get("duration") != recording.get("duration"):
            fields["offset"] = cut.get("start") or 0.0
    return fields | {"id": cut.get("id")}


def _without_padding(cut: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the one cut that a mixed one is made of beside silence, under the id of the mixed one."""
    tracks = cut.get("tracks") or []
    heard = [track["cut"] for track in tracks if track["cut"].get("type") != _PADDING]
    return {**heard[0], "id": cut.get("id")} if len(heard) == 1 else cut
