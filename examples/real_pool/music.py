"""Notes, chords and phrases of the recorded instruments of two sound fonts, rendered by fluidsynth."""

from __future__ import annotations

import random
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
from recordings import RATE, Recording, trimmed

# By program of General MIDI, from 0.
INSTRUMENTS = {
    **{0: "piano", 6: "harpsichord", 9: "glockenspiel", 11: "vibraphone", 12: "marimba", 13: "xylophone"},
    **{19: "church organ", 21: "accordion", 24: "acoustic guitar", 30: "distorted guitar", 32: "double bass"},
    **{40: "violin", 42: "cello", 46: "harp", 52: "choir", 56: "trumpet", 57: "trombone", 58: "tuba", 66: "saxophone"},
    **{68: "oboe", 70: "bassoon", 71: "clarinet", 73: "flute", 75: "pan flute", 104: "sitar", 105: "banjo"},
    **{108: "kalimba", 109: "bagpipe", 114: "steel drums"},
}
# Never trained on: what they play is asked, not which they are.
UNSEEN_INSTRUMENTS = {8: "celesta", 41: "viola", 60: "horn", 74: "recorder", 107: "koto", 69: "English horn"}
# Keys of the drum kit (channel 10).
DRUMS = {
    **{36: "a bass drum", 38: "a snare drum", 39: "hand claps", 42: "a closed hi-hat", 46: "an open hi-hat"},
    **{49: "a crash cymbal", 54: "a tambourine", 56: "a cowbell", 60: "a bongo", 70: "maracas", 71: "a whistle"},
    **{73: "a guiro", 76: "a wood block", 81: "a triangle"},
}
EFFECTS = {122: "the sea", 123: "a bird", 124: "a telephone", 125: "a helicopter", 126: "applause", 127: "a gunshot"}
PITCHES = ("C", "C sharp", "D", "D sharp", "E", "F", "F sharp", "G", "G sharp", "A", "A sharp", "B")
FONTS = {
    "timgm6mb-soundfont": "usr/share/sounds/sf2/TimGM6mb.sf2",
    "fluidr3mono-gm-soundfont": "usr/share/sounds/sf3/FluidR3Mono_GM.sf3",
}
UNSEEN_FONT = "fluidr3mono-gm-soundfont"
_SLOT_S = 2.5  # from one clip to the next, of which the end is for the sound to die away
_TICKS = 480  # a second, at 60 beats a minute

Notes = list[tuple[float, float, int]]  # start and length in seconds, key


def played(folder: Path, seed: int = 0) -> Iterator[Recording]:
    """Yield what every instrument of both fonts plays, and the drums and effects of each.

    `text` is `INSTRUMENT|WHAT`, with WHAT one of `note PITCH`, `chord`, `up`, `down`, `higher` and `lower`; of drums
    and effects what is heard.
    """
    for package, path in FONTS.items():
        font = folder / package / path
        programs = INSTRUMENTS if package == UNSEEN_FONT else INSTRUMENTS | UNSEEN_INSTRUMENTS
        for program, name in programs.items():
            rng = random.Random(f"{seed} {package} {program}")
            pieces = _pieces(rng, program)
            unseen = "font" if package == UNSEEN_FONT else "instrument" if program in UNSEEN_INSTRUMENTS else ""
            clips = _rendered(font, [notes for _, notes in pieces], program, 0, rng)
            for i, ((what, _), wave) in enumerate(zip(pieces, clips, strict=True)):
                yield Recording(f"{package}/{program}/{i}", package, "music", f"{name}|{what}", wave, unseen=unseen)
        yield from _noises(font, package, seed)


def _noises(font: Path, package: str, seed: int) -> Iterator[Recording]:
    unseen = "font" if package == UNSEEN_FONT else ""
    rng = random.Random(f"{seed} {package}")
    hits = [(name, [(0.3 * k, 0.25, key) for k in range(times)]) for key, name in DRUMS.items() for times in (1, 2, 3)]
    for (name, notes), wave in zip(hits, _rendered(font, [notes for _, notes in hits], 0, 9, rng), strict=True):
        yield Recording(f"{package}/{name}/{len(notes)}", package, "sound", name, wave, unseen=unseen)
    for program, name in EFFECTS.items():
        keys = [48, 55, 60, 62, 64, 67]
        for key, wave in zip(keys, _rendered(font, [[(0.0, 1.8, k)] for k in keys], program, 0, rng), strict=True):
            yield Recording(f"{package}/{name}/{key}", package, "sound", name, wave, unseen=unseen)


def _pieces(rng: random.Random, program: int) -> list[tuple[str, Notes]]:
    """Return what an instrument plays, and the notes of it."""
    low = 36 if program in (32, 42, 57, 58, 70) else 55
    keys = range(low, low + 25)
    pieces: list[tuple[str, Notes]] = [(f"note {PITCHES[key % 12]}", [(0.0, 1.2, key)]) for key in keys]
    for key in rng.sample(keys, 8):
        pieces.append(("chord", [(0.0, 1.4, key + step) for step in rng.choice([(0, 4, 7), (0, 3, 7), (0, 5, 9)])]))
    for what, sign in (("up", 1), ("down", -1)):
        for _ in range(5):
            first, step = rng.choice(keys), rng.choice([1, 2, 3])
            pieces.append((what, [(0.4 * k, 0.38, first + sign * step * k) for k in range(rng.choice([3, 4]))]))
    for what, sign in (("higher", 1), ("lower", -1)):
        for _ in range(7):
            first = rng.choice(keys)
            pieces.append((what, [(0.0, 0.7, first), (0.9, 0.7, first + sign * rng.choice([2, 3, 4, 5, 7, 9, 12]))]))
    return pieces


def _rendered(font: Path, pieces: list[Notes], program: int, channel: int, rng: random.Random) -> list[np.ndarray]:
    """Render all pieces with one call, and return a wave of each."""
    with tempfile.TemporaryDirectory() as folder:
        midi, wav = Path(folder, "played.mid"), Path(folder, "played.wav")
        midi.write_bytes(_midi(pieces, program, channel, rng))
        flags = f"-niq -R 0 -C 0 -g 0.7 -r {RATE} -T wav".split()  # no reverberation, no chorus
        command = ["fluidsynth", *flags, "-F", wav, font, midi]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        stereo, _ = soundfile.read(wav, dtype="float32", always_2d=True)
    wave, slot = stereo.mean(1), int(_SLOT_S * RATE)
    wave = np.pad(wave, (0, max(0, slot * len(pieces) - len(wave))))
    return [trimmed(wave[i * slot : (i + 1) * slot]) for i in range(len(pieces))]


def _midi(pieces: list[Notes], program: int, channel: int, rng: random.Random) -> bytes:
    """Return a standard MIDI file of one track."""
    events = [(0, bytes([0xC0 | channel, program]))]
    for i, notes in enumerate(pieces):
        loudness = rng.randint(70, 120)
        for start, length, key in notes:
            at = i * _SLOT_S + start
            events.append((round(at * _TICKS), bytes([0x90 | channel, key, loudness])))
            events.append((round((at + length) * _TICKS), bytes([0x80 | channel, key, 0])))
    events.append((round(len(pieces) * _SLOT_S * _TICKS), b"\xff\x2f\x00"))
    track, before = b"\x00\xff\x51\x03" + (1_000_000).to_bytes(3, "big"), 0
    for at, event in sorted(events, key=lambda pair: pair[0]):
        track += _length(at - before) + event
        before = at
    return b"MThd" + struct.pack(">IHHH", 6, 0, 1, _TICKS) + b"MTrk" + struct.pack(">I", len(track)) + track


def _length(ticks: int) -> bytes:
    """Write a number in groups of seven bits, the last without a mark."""
    groups = [ticks & 0x7F]
    while ticks := ticks >> 7:
        groups.append(0x80 | (ticks & 0x7F))
    return bytes(reversed(groups))
