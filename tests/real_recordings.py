"""Real human speech from Debian's asterisk-core-sounds-en-wav: prompts of which there is more than one recording.

One speaker, 8 kHz, 16 bit. A prompt counts only when its recordings are different takes: two pairs that hold the
same samples under two names ("thank you", "seconds") are left out. One take of each prompt is held out.
"""

import json
from pathlib import Path

import numpy as np
import soundfile
import soxr

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
INSTALL = "apt-get install -y asterisk-core-sounds-en-wav"
RATE = 8_000

# What is said: the takes to train on, and after the bar the one that is held out.
_PROMPTS = """
at: digits/at | letters/at
extension: dir-multi3 extension | vm-extension
first: digits/h-1 | vm-first
for: dir-multi2 for | vm-for
from an unknown caller: from-unknown-caller | vm-unknown-caller
goodbye: goodbye | vm-goodbye
has left the conference: conf-hasleft | confbridge-has-left
i am sorry that's not a valid extension please try again: invalid | pbx-invalid
i a x: spy-iax | spy-iax2
less than: letters/ascii60 | queue-less-than
minute: minute | queue-minute
minutes: minutes queue-minutes | vm-minutes
november: digits/mon-10 | phonetic/n_p
please try again: please-try-again | vm-pls-try-again
press: dir-multi1 | vm-press
second: digits/h-2 | second
something is terribly wrong: something-terribly-wrong | tt-somethingwrong
star: digits/star | letters/ascii42
the conference is now locked: conf-lockednow | confbridge-locked
the conference is now unlocked: conf-unlockednow | confbridge-unlocked
the conference will begin when our glorious leader arrives: confbridge-begin-glorious-a confbridge-begin-glorious-b \
| confbridge-begin-glorious-c
the conference will begin when the leader arrives: conf-waitforleader | confbridge-begin-leader
there are currently: conf-thereare | confbridge-there-are
there is currently one other participant in the conference: conf-onlyone | confbridge-only-one
to decrease the audio volume from other participants: confbridge-dec-list-vol-in | confbridge-dec-list-vol-out
to decrease your speaking volume to other participants: confbridge-dec-talk-vol-in | confbridge-dec-talk-vol-out
to exit the menu: confbridge-menu-exit-in | confbridge-menu-exit-out
to increase the audio volume from other participants: confbridge-inc-list-vol-in | confbridge-inc-list-vol-out
to increase your speaking volume to other participants: confbridge-inc-talk-vol-in | confbridge-inc-talk-vol-out
to leave the conference: confbridge-leave-in | confbridge-leave-out
to lock or unlock the conference: confbridge-lock-in | confbridge-lock-out
to mute or unmute yourself: confbridge-mute-in | confbridge-mute-out
to remove the participant who most recently joined the conference: confbridge-remove-last-in \
| confbridge-remove-last-out
to reset the audio volume of the conference to the default level: confbridge-rest-list-vol-in \
| confbridge-rest-list-vol-out
to reset your speaking volume to the default level: confbridge-rest-talk-vol-in | confbridge-rest-talk-vol-out
you are now muted: conf-muted | confbridge-muted
"""


def takes(held_out: bool) -> list[tuple[str, Path]]:
    """What is said and the recording of it, for one side of the split."""
    found = []
    for line in _PROMPTS.replace("\\\n", "").strip().splitlines():
        text, files = line.split(": ")
        found += [(text, SOUNDS / f"{name}.wav") for name in files.split(" | ")[held_out].split()]
    missing = [str(path) for _, path in found if not path.exists()]
    assert not missing, f"real recordings are missing, {INSTALL}: {missing[:3]}"
    return found


def varied(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another speed and pitch (up to 12 %), level, and a little noise and silence around."""
    wave = soxr.resample(wave, RATE, RATE / rng.uniform(0.88, 1.12), quality="HQ")
    around = [np.zeros(int(RATE * seconds), np.float32) for seconds in rng.uniform(0, 0.3, 2)]
    wave = np.concatenate([around[0], wave * rng.uniform(0.4, 1.0), around[1]])
    noise = rng.normal(0, np.abs(wave).max() * rng.uniform(0, 0.02), len(wave))
    return np.clip(wave + noise, -1, 1).astype(np.float32)


def write_recordings(folder: Path, *, held_out: bool, variants: int = 0, seed: int = 0) -> Path:
    """Write `folder`/N/WORDS-SAID.wav and manifest.jsonl, which says the same; returns the manifest.

    Args:
        variants: `varied` copies of each recording, on top of the untouched one.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for number, (text, path) in enumerate(takes(held_out)):
        wave, rate = soundfile.read(path, dtype="float32")
        assert rate == RATE
        for variant in range(variants + 1):
            file = folder / f"{number:02d}-{variant:02d}" / f"{text.replace(' ', '-')}.wav"
            file.parent.mkdir(parents=True)
            soundfile.write(file, varied(wave, rng) if variant else wave, RATE, subtype="PCM_16")
            rows.append({"audio": str(file.relative_to(folder)), "text": text})
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return manifest
