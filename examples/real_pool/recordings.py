"""The recordings of a few Debian packages, each with what is known of it: speaker, language, what is said or heard."""

from __future__ import annotations

import gzip
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import av
import numpy as np
import numpy.typing as npt

Wave = npt.NDArray[np.float32]
RATE = 16_000

# Prompts of one speaker each: package, language, voice. Allison speaks two languages; the last three are unseen.
SPEAKERS = {
    "allison-en": ("asterisk-core-sounds-en-g722", "English", "woman"),
    "allison-es": ("asterisk-core-sounds-es-g722", "Spanish", "woman"),
    "june": ("asterisk-core-sounds-fr-g722", "French", "woman"),
    "carlo": ("asterisk-core-sounds-it-g722", "Italian", "man"),
    "ivrvoice": ("asterisk-core-sounds-ru-g722", "Russian", "woman"),
    "es-co": ("asterisk-prompt-es-co", "Spanish", ""),
    "armelle": ("asterisk-prompt-fr-armelle", "French", "woman"),
    "menardi": ("asterisk-prompt-it-menardi-wav", "Italian", "woman"),
}
UNSEEN_SPEAKERS = ("es-co", "armelle", "menardi")
# What English prompts say; in the package that all of a language's prompts share.
TEXTS = ("asterisk-core-sounds-en", "core-sounds-en.txt.gz")

_LANGUAGES = {
    **{"da": "Danish", "de": "German", "en": "English", "es": "Spanish", "fr": "French", "it": "Italian"},
    **{"nl": "Dutch", "cs": "Czech", "ca": "Catalan", "fi": "Finnish", "pt": "Portuguese", "ru": "Russian"},
    **{"sv": "Swedish", "sl": "Slovenian", "uk": "Ukrainian", "hu": "Hungarian", "lt": "Lithuanian", "ro": "Romanian"},
    **{"nb": "Norwegian", "nn": "Norwegian", "en_GB": "English", "pt_BR": "Portuguese", "sk": "Slovak", "el": "Greek"},
}
# Languages whose letters are never trained on.
UNSEEN_LANGUAGES = ("Dutch", "Danish", "Hungarian", "Portuguese")

_NUMBERS = [*map(str, range(21)), *map(str, range(30, 100, 10))]
# What a sound of a desktop theme is for, by a part of its name; the first that fits.
_EVENTS = {
    **{"log-in": "logging in", "login": "logging in", "log-out": "logging out", "logout": "logging out"},
    **{"logoff": "logging out", "error": "an error", "trash": "emptying the trash", "message": "a message"},
    **{"phone": "a phone ringing", "camera": "a camera", "shutter": "a camera", "warning": "a warning"},
    **{"question": "a question", "volume": "a change of volume", "device-added": "a device that is plugged in"},
    **{"device-removed": "a device that is unplugged", "bell": "a bell", "screen-capture": "a camera"},
    **{"battery": "an empty battery", "low": "an empty battery"},
}
THEMES = ("sound-theme-freedesktop", "oxygen-sounds", "deepin-sound-theme", "yaru-theme-sound")
UNSEEN_THEMES = ("yaru-theme-sound",)
PACKAGES = (
    *(package for package, _, _ in SPEAKERS.values()),
    *("asterisk-core-sounds-en", "klettres-data", "ktuberling-data", *THEMES),
)


@dataclass(frozen=True)
class Recording:
    """One recording.

    Attributes:
        key: Of the recording: all clips that are made of it are in one split.
        kind: `number`, `letter`, `prompt` or `word` of speech, `event` of a theme, and those of music.
        text: What is said or heard: a number, a letter, the words of a prompt, an event.
        speaker: Name; a set of recordings whose speaker is not named is one speaker.
        language: Of speech, in English.
        voice: Woman, man, or "" if that is not known.
        unseen: In what it is never trained on: speaker, language, theme, instrument, font; "" for all others.
    """

    key: str
    package: str
    kind: str
    text: str
    wave: Wave
    speaker: str = ""
    language: str = ""
    voice: str = ""
    unseen: str = ""


def fetch(packages: list[str], folder: Path) -> None:
    """Download and unpack the packages that are not there yet, each into a folder of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not (folder / package).is_dir()]
    if missing:
        subprocess.run(["apt-get", "download", "-q", *missing], cwd=folder, check=True)
    for package in missing:
        (archive,) = folder.glob(f"{package}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
        archive.rename(folder / package / archive.name)


def decoded(file: Path) -> Wave:
    """Return a file at 16 kHz, mono, without the silence at its ends."""
    kind = {".g722": "g722", ".gsm": "gsm"}.get(file.suffix)  # they have no header
    with av.open(str(file), format=kind, metadata_errors="ignore") as container:
        resampler = av.AudioResampler("flt", "mono", RATE)
        frames = [out for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        parts = [frame.to_ndarray()[0] for frame in [*frames, *resampler.resample(None)]]
    return trimmed(np.concatenate([np.zeros(0, np.float32), *parts]))


def trimmed(wave: Wave, below: float = 0.02, margin_s: float = 0.05) -> Wave:
    """Cut off what is quieter than a share of the peak, but for a margin."""
    loud = np.flatnonzero(np.abs(wave) > below * np.abs(wave).max(initial=0.0))
    margin = int(margin_s * RATE)
    return wave[max(0, loud[0] - margin) : loud[-1] + margin] if len(loud) else wave[:0]


def prompts(folder: Path) -> Iterator[Recording]:
    """Yield the prompts of telephone exchanges: numbers, letters, and whole sentences."""
    texts = _texts(folder / TEXTS[0] / "usr/share/doc" / TEXTS[0] / TEXTS[1])
    for speaker, (package, language, voice) in SPEAKERS.items():
        unseen = "speaker" if speaker in UNSEEN_SPEAKERS else ""
        sounds = folder / package / "usr/share/asterisk/sounds"
        for file in sorted(path for path in sounds.rglob("*") if path.suffix in (".g722", ".gsm", ".wav")):
            if file.is_symlink() or "silence" in file.parts:
                continue
            name, group = file.stem, "digits" if "digits" in file.parts else file.parent.name
            kind, text = "prompt", texts.get(name if group not in ("letters", "digits") else f"{group}/{name}", "")
            if group == "digits" and name in _NUMBERS:
                kind, text = "number", name
            elif group == "letters" and re.fullmatch("[a-z]", name) and language != "Russian":
                kind, text = "letter", name
            elif group in ("digits", "letters", "phonetic") or "[" in text:
                kind, text = ("prompt", text) if text and "[" not in text else ("", "")
            if kind:
                said = text if kind != "prompt" or language == "English" else ""
                key = f"{speaker}/{group}/{name}"
                who = speaker.partition("-")[0] if speaker.startswith("allison") else speaker
                yield Recording(key, package, kind, said, decoded(file), who, language, voice, unseen)


def _texts(file: Path) -> dict[str, str]:
    lines = gzip.decompress(file.read_bytes()).decode(errors="replace").splitlines()
    pairs = (line.partition(": ") for line in lines if line and not line.startswith(";"))
    return {name.strip(): text.strip() for name, _, text in pairs if text.strip()}


def games(folder: Path) -> Iterator[Recording]:
    """Yield letters (KLettres) and single words (KTuberling) of games for children, in many languages."""
    for package, root, kind in (
        ("klettres-data", "usr/share/klettres", "letter"),
        ("ktuberling-data", "usr/share/ktuberling/sounds", "word"),
    ):
        place = folder / package / root
        tables = place.glob("*/sounds.xml" if kind == "letter" else "*.soundtheme")
        for table in sorted(tables):
            code = table.parent.name if kind == "letter" else table.stem
            language = _LANGUAGES.get(code)
            if language is None:
                continue
            unseen = "language" if kind == "letter" and language in UNSEEN_LANGUAGES else ""
            for name, file in _sounds(table, place, "alphabet" if kind == "letter" else None):
                if kind == "letter" and not re.fullmatch("[a-z]", name):
                    continue
                speaker = f"{package.partition('-')[0]}-{code}"
                wave = decoded(file)
                yield Recording(f"{speaker}/{name}", package, kind, name, wave, speaker, language, "", unseen)


def _sounds(table: Path, place: Path, section: str | None) -> Iterator[tuple[str, Path]]:
    try:
        root = ElementTree.fromstring(table.read_bytes())
    except ElementTree.ParseError:
        return
    scope = root.iter("sound") if section is None else (s for part in root.iter(section) for s in part.iter("sound"))
    seen: set[str] = set()
    for sound in scope:
        name, file = sound.get("name", "").lower(), place / sound.get("file", "")
        if name and name not in seen and file.is_file():
            seen.add(name)
            yield name, file


def events(folder: Path) -> Iterator[Recording]:
    """Yield the sounds of desktop themes whose names say what they are for."""
    for package in THEMES:
        for file in sorted((folder / package / "usr/share/sounds").rglob("*")):
            name = file.stem.lower()
            event = next((event for part, event in _EVENTS.items() if part in name), None)
            if event and file.is_file() and not file.is_symlink() and file.suffix in (".ogg", ".oga", ".wav"):
                unseen = "theme" if package in UNSEEN_THEMES else ""
                yield Recording(f"{package}/{name}", package, "event", event, decoded(file), unseen=unseen)
