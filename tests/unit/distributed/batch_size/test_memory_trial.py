import numpy as np

from mowe_ray.distributed.batch_size.memory_trial import synthetic_batch, synthetic_texts
from mowe_ray.model.tokenizing import train_tokenizer


def test_a_synthetic_batch_has_full_clips_and_long_texts():
    batch = synthetic_batch(3, 20.0)
    assert batch.lengths == [320_000] * 3
    assert len(batch.audio) == 960_000
    assert np.ptp(batch.audio) > 10_000
    assert [len(answer.split()) for answer in batch.answers] == [70] * 3
    assert len(synthetic_batch(1, 1.0).answers[0].split()) == 30
    tokenizer = train_tokenizer(synthetic_texts(), 1024)
    assert 70 <= len(tokenizer(batch.answers[0]).input_ids) <= 100, "about one token a word, as of a trained tokenizer"
