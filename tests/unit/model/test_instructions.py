"""Routers that read instructions: which tokens count, for which clip."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mowe_ray.model.instructions import rows_of_clips
from tests.unit.model.conftest import MakeModel

MakeBatch = Callable[..., dict[str, Tensor]]
ROWS = [[0.6], [], [0.5, 0.6]]


def test_a_clip_belongs_to_the_row_that_its_tokens_are_in() -> None:
    assert rows_of_clips([3, 0, 5, 0, 2], [3, 4, 1, 1, 1]) == [0, 2, 2, 4, 4]


def test_clips_and_rows_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="input_ids holds 3 audio tokens, but the clips make 4"):
        rows_of_clips([3], [2, 2])


def test_answers_and_padding_do_not_count(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """A prompt padded on the left is routed as the training row with its answer, padded on the right, is."""
    model = make_model(router_input="prompt").eval()
    labelled, prompts = make_batch(model, ROWS), make_batch(model, ROWS, answers=False)
    trained = model(**labelled).routing.dependent.logits
    asked = model(**prompts).routing.dependent.logits
    torch.testing.assert_close(trained, asked)
    # As the training loop has it, which leaves the mask out.
    del labelled["attention_mask"]
    torch.testing.assert_close(model(**labelled).routing.dependent.logits, trained)


def test_clips_of_one_row_share_its_instruction(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(router_input="prompt").eval()
    first, second, third = model(**make_batch(model, ROWS)).routing.dependent.logits
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


def test_routers_do_not_train_the_embeddings_that_they_read(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(router_input="audio+prompt").train()
    loss = model(**make_batch(model, ROWS)).routing_loss
    loss.backward()
    assert model.audio_tower.dependent_router.weight.grad.abs().max() > 0
    assert model.get_input_embeddings().weight.grad is None


def test_audio_without_its_text_is_refused(make_model: MakeModel, make_batch: MakeBatch) -> None:
    model = make_model(router_input="prompt").eval()
    batch = make_batch(model, ROWS)
    with pytest.raises(ValueError, match=r"model\.router\.input=prompt.*input_ids"):
        model.encode_audio(batch["input_values"], batch["input_lengths"])
