import io

import numpy as np
import pytest
import soundfile

from mowe_ray.data.corpora.layout import Defaults


@pytest.fixture
def make_audio():
    """Encoded tone of some length; `pitch` tells clips apart."""

    def make(seconds=0.5, pitch=440, container="WAV"):
        time = np.arange(int(seconds * 16_000)) / 16_000
        file = io.BytesIO()
        soundfile.write(file, 0.5 * np.sin(2 * np.pi * pitch * time), 16_000, format=container)
        return file.getvalue()

    return make


@pytest.fixture
def asr():
    return Defaults("corpus", task="asr")
