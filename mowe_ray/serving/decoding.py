"""Uploaded audio to waveforms: in child processes that a hostile file may end, and with a time limit."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from mowe_ray.data.child_process import ChildDied, ChildProcess
from mowe_ray.data.decode import decode_audio
from mowe_ray.data.sample import BadAudio
from mowe_ray.serving.question import Refused, Wave

_ADVICE = {
    "silent": "nothing can be heard in it",
    "too_short": "send a longer clip",
    "zero_length": "send a clip with samples in it",
    "wrong_type": "send wav, mp3, flac, ogg, opus or m4a",
    "truncated": "send the whole file",
}


class Decoders:
    """Decodes uploads, some at a time.

    Args:
        count: Child processes.
        min_s: Shorter clips are refused, in seconds.
        timeout_s: Longest time for one file, in seconds.
    """

    def __init__(self, count: int = 2, *, min_s: float = 0.02, timeout_s: float = 60.0):
        self._min_s, self._timeout_s = min_s, timeout_s
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoder")
        self._idle = [ChildProcess() for _ in range(count)]

    async def decode(self, data: bytes, *, max_s: float, param: str) -> Wave:
        """Decode one file to mono at 16 kHz.

        Args:
            data: The encoded file.
            max_s: Longer ones are refused, in seconds.
            param: The part of the request that holds it.

        Raises:
            Refused: It is no audio, damaged, or too short or long.
        """
        return await asyncio.get_running_loop().run_in_executor(self._threads, self.decode_now, data, max_s, param)

    def close(self) -> None:
        """End the child processes."""
        self._threads.shutdown(cancel_futures=True)
        for child in self._idle:
            child.close()

    def decode_now(self, data: bytes, max_s: float, param: str) -> Wave:
        """As `decode`, for who has nothing else to do."""
        child = self._idle.pop()
        try:
            return child.call(decode_audio, data, None, self._min_s, max_s, timeout_s=self._timeout_s)
        except BadAudio as error:
            if error.cause == "too_long":
                longer = (
                    "" if param == "file" else ", or send it to /v1/audio/transcriptions, which takes longer recordings"
                )
                advice = f"cut it{longer}"
            else:
                advice = _ADVICE.get(error.cause, "send another file")
            raise Refused(f"{param}: {error.detail}: {advice}", code=f"audio_{error.cause}", param=param) from error
        except ChildDied as death:
            raise Refused(f"{param}: the file cannot be decoded: {death}", code="audio_crashed", param=param) from death
        finally:
            self._idle.append(child)
