import io
import struct
from contextlib import suppress

import numpy as np
import pytest
import soundfile

from mowe_ray.data.decode import decode_audio, header_duration_s, to_int16
from mowe_ray.data.sample import BadAudio

KINDS = ["wav", "flac", "mp3", "ogg", "opus", "m4a", "webm"]


def cause(data: bytes, declared_s: float | None = None, max_s: float = 30.0) -> str:
    with pytest.raises(BadAudio) as error:
        decode_audio(data, declared_s, 0.1, max_s)
    return error.value.cause


def strongest_hertz(wave: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    return float(np.argmax(spectrum) * 16_000 / len(wave))


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_becomes_16_khz_mono(encode, kind):
    data = encode(kind, seconds=2.0)
    wave = decode_audio(data, None, 0.1, 30.0)
    assert wave.dtype == np.float32
    assert wave.ndim == 1
    assert len(wave) / 16_000 == pytest.approx(2.0, abs=0.06)
    assert strongest_hertz(wave) == pytest.approx(440, abs=2)
    assert 0.3 < np.abs(wave).max() < 0.5
    assert header_duration_s(data) == pytest.approx(2.0, abs=0.06)


@pytest.mark.parametrize("kind", ["wav", "flac"])
def test_a_segment_is_the_same_as_a_piece_of_the_whole(encode, kind):
    data = encode(kind, seconds=4.0)
    whole = decode_audio(data, None, 0.1, 30.0)
    segment = decode_audio(data, 1.5, 0.1, 30.0, offset_s=0.25)
    np.testing.assert_array_equal(segment, whole[4000:28_000])
    with pytest.raises(BadAudio, match=r"truncated: 0\.50 s of 1\.50 s"):
        decode_audio(data, 1.5, 0.1, 30.0, offset_s=3.5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_a_file_is_truncated_in_every_container(encode, kind):
    data = encode(kind, seconds=4.0)
    assert cause(data[: len(data) // 2]) == "truncated"


def test_mp3_without_a_frame_count_is_judged_by_the_manifest(encode):
    data = encode("mp3", seconds=4.0).replace(b"Xing", b"\0\0\0\0").replace(b"Info", b"\0\0\0\0")
    half = data[: len(data) // 2]
    assert header_duration_s(data) == pytest.approx(4.0, abs=0.2)
    assert decode_audio(half, None, 0.1, 30.0).size
    assert cause(half, declared_s=4.0) == "truncated"


@pytest.mark.parametrize(("rate", "channels"), [(8_000, 1), (44_100, 2), (48_000, 6)])
def test_resampling_keeps_pitch_level_and_length(tone, encode, rate, channels):
    wave = np.repeat(tone(1.0, 440.0, rate)[:, None], channels, axis=1)
    decoded = decode_audio(encode("wav", wave, rate=rate), None, 0.1, 30.0)
    assert len(decoded) == 16_000
    assert strongest_hertz(decoded) == pytest.approx(440, abs=1)
    assert np.abs(decoded[1000:-1000]).max() == pytest.approx(np.abs(wave).max(), rel=0.05)


def test_channels_in_anti_phase_do_not_cancel(tone, encode):
    wave = tone()
    decoded = decode_audio(encode("float", np.stack([wave, -wave], 1)), None, 0.1, 30.0)
    np.testing.assert_array_equal(decoded, wave)


def test_other_stereo_is_averaged(tone, encode):
    left, right = tone(hertz=300.0), tone(hertz=500.0)
    decoded = decode_audio(encode("float", np.stack([left, right], 1)), None, 0.1, 30.0)
    np.testing.assert_allclose(decoded, (left + right) / 2, atol=1e-6)


def test_over_range_is_scaled_to_one(tone, encode):
    wave = tone()
    decoded = decode_audio(encode("float", 4 * wave), None, 0.1, 30.0)
    assert np.abs(decoded).max() == pytest.approx(1.0)
    np.testing.assert_allclose(decoded, wave / np.abs(wave).max(), atol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_bad_value_makes_nan(tone, encode, value):
    wave = tone().copy()
    wave[5000] = value
    assert cause(encode("float", wave)) == "nan"
    assert cause(encode("float", np.stack([wave, wave], 1))) == "nan"


def test_silence_and_emptiness(encode):
    assert cause(encode("wav", np.zeros(16_000, np.float32))) == "silent"
    assert cause(encode("wav", np.zeros(0, np.float32))) == "zero_length"
    assert cause(b"") == "zero_length"


@pytest.mark.parametrize("data", [b"hello, this is text\n" * 50, bytes(5000), b"<html></html>", b"{}"])
def test_what_is_not_audio_is_a_wrong_type(data):
    assert cause(data) == "wrong_type"
    with pytest.raises(BadAudio, match="wrong_type"):
        header_duration_s(data)


def test_limits(encode):
    assert cause(encode(seconds=0.05)) == "too_short"
    assert cause(encode(seconds=2.0), max_s=1.8) == "too_long"
    assert cause(encode("opus", seconds=2.0), max_s=1.5) == "too_long"
    assert decode_audio(encode(seconds=2.0), None, 2.0, 2.0).size == 32_000
    padded = encode("m4a", seconds=2.0)
    assert decode_audio(padded, None, 0.1, 30.0).size > 32_000
    assert decode_audio(padded, None, 0.1, 2.0).size == 32_000


def test_an_hour_is_refused_from_its_header():
    header = bytearray(encode_flac_header())
    assert cause(bytes(header)) == "too_long"


def encode_flac_header() -> bytes:
    """A FLAC whose header promises an hour and which has no frames: decoding it would fail."""
    out = io.BytesIO()
    soundfile.write(out, np.zeros(10, np.float32), 16_000, format="FLAC")
    data = bytearray(out.getvalue()[:42])
    packed = struct.unpack(">Q", data[18:26])[0] & ~((1 << 36) - 1) | 3600 * 16_000
    data[18:26] = struct.pack(">Q", packed)
    return bytes(data)


def test_the_manifest_must_agree(encode):
    data = encode(seconds=5.0)
    assert decode_audio(data, 5.09, 0.1, 30.0).size == 80_000
    assert decode_audio(data, 4.91, 0.1, 30.0).size == 80_000
    assert cause(data, declared_s=5.2) == "truncated"
    assert cause(data, declared_s=4.5) == "unreadable"


def test_piped_wav_without_a_length(encode):
    data = bytearray(encode("wav", seconds=2.0))
    at = data.index(b"data")
    for size in (0, 0xFFFFFFFF):
        data[at + 4 : at + 8] = struct.pack("<I", size)
        assert decode_audio(bytes(data), None, 0.1, 30.0).size == pytest.approx(32_000, abs=30)


def test_an_impossible_sampling_rate_is_unreadable(encode):
    assert cause(encode("wav", rate=1000, seconds=3.0)) == "unreadable"


@pytest.mark.slow
def test_damage_never_raises_anything_else(encode):
    rng = np.random.default_rng(0)
    for kind in KINDS:
        whole = encode(kind, seconds=0.5)
        for _ in range(40):
            data = bytearray(whole)
            for at in rng.integers(0, [200, 200, len(data)]):
                data[at : at + 4] = rng.bytes(4)
            with suppress(BadAudio):
                decode_audio(bytes(data), None, 0.1, 30.0)
            with suppress(BadAudio):
                header_duration_s(bytes(data))


def test_tags_that_are_not_utf8_do_not_matter(encode):
    data = encode("m4a").replace(b"Lavf", b"L\xe9vf")
    assert b"L\xe9vf" in data
    assert decode_audio(data, None, 0.1, 30.0).size


def test_a_segment_of_a_longer_recording(encode, tone):
    wave = np.concatenate([tone(2.0, 300.0), tone(2.0, 900.0)])
    data = encode("float", wave)
    decoded = decode_audio(data, 1.0, 0.1, 1.5, offset_s=2.5)
    np.testing.assert_array_equal(decoded, wave[40_000:56_000])
    rest = decode_audio(data, None, 0.1, 30.0, offset_s=3.0)
    np.testing.assert_array_equal(rest, wave[48_000:])


@pytest.mark.parametrize("level", [1.0, 10 ** (-30 / 20), 10 ** (-50 / 20)])
def test_int16_with_a_scale_is_exact_to_half_a_step_at_any_level(tone, level):
    wave = tone() * np.float32(level)
    samples, scale = to_int16(wave)
    error = np.abs(samples.astype(np.float64) * scale - wave)
    assert samples.dtype == np.int16
    assert np.abs(samples).max() == 32_767
    assert error.max() <= 0.51 * np.abs(wave).max() / 32_767


def test_broken_mp3_frames_write_nothing_to_stderr(encode, capfd):
    data = bytearray(encode("mp3", seconds=4.0))
    for at in range(2000, len(data), 500):
        data[at : at + 30] = bytes(range(30))
    with suppress(BadAudio):
        decode_audio(bytes(data), None, 0.1, 30.0)
    assert capfd.readouterr().err == ""
