"""A pool member that is left out is as good as never there; heard once, audio serves forward and generate."""

import pytest
import torch

from mowe_ray.model.building import WeakEncoder
from tests.tiny_models import tiny_hubert_config, tiny_whisper_config
from tests.unit.model.test_fusion import PAIRS, name_of

ROWS = [[0.5], [0.9, 0.6], []]
POOL = [
    WeakEncoder("a", tiny_whisper_config(d_model=16), train="full"),
    WeakEncoder("b", tiny_hubert_config(), train="full"),
    WeakEncoder("c", tiny_whisper_config(d_model=24, encoder_attention_heads=2), train="full"),
]


def without(model, small, member):
    """Give `small`, whose pool lacks the member, the weights of `model`."""
    kept = [i for i in range(len(model.audio_tower.pool.members)) if i != member]
    weights = {}
    for name, weight in model.state_dict().items():
        if "_router." in name and ".inner_" not in name:
            weight = weight[kept]
        if ".pool.members." in name:
            number = int(name.split(".pool.members.")[1].split(".")[0])
            if number == member:
                continue
            name = name.replace(f".members.{number}.", f".members.{kept.index(number)}.")
        weights[name] = weight
    small.load_state_dict(weights)
    return small


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "routers"), [pair for pair in PAIRS if pair[0] != "concat"], ids=name_of)
def test_leaving_a_member_out_is_a_pool_without_it(make_model, make_batch, fusion, routers) -> None:
    options = routers | {"fusion": fusion}
    member = PAIRS.index((fusion, routers)) % len(POOL)
    model = make_model(weak_encoders=POOL, **options).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            parameter.data.fill_(0.8)
    small = make_model(weak_encoders=[w for i, w in enumerate(POOL) if i != member], **options)
    small = without(model, small.eval(), member)
    batch = make_batch(model, ROWS)
    before = model(**batch).logits
    model.audio_tower.excluded_members = (member,)
    torch.testing.assert_close(model(**batch).logits, small(**batch).logits)
    model.audio_tower.excluded_members = ()
    assert torch.equal(model(**batch).logits, before)


def test_a_left_out_block_of_a_concatenation_is_zero(make_model, make_batch) -> None:
    model = make_model(weak_encoders=POOL, fusion="concat").eval()
    seen = []
    model.audio_tower.adapter.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model.audio_tower.excluded_members = (1,)
    model(**make_batch(model, ROWS))
    _, *blocks = seen[0].chunk(4, dim=-1)
    assert [bool(block.any()) for block in blocks] == [True, False, True]


def test_leaving_out_everyone_leaves_the_base(make_model, make_batch) -> None:
    model = make_model().eval()
    model.audio_tower.excluded_members = (0, 1)
    seen = []
    model.audio_tower.adapter.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    output = model(**make_batch(model, ROWS))
    base, *blocks = seen[0].chunk(3, dim=-1)
    assert base.any()
    assert not any(block.any() for block in blocks)
    assert not output.routing.dependent.chosen.any()
    assert output.logits.isfinite().all()


@pytest.mark.parametrize("rows", [ROWS, [[], []]])
def test_audio_heard_once_serves_forward_and_generate(make_model, make_batch, rows) -> None:
    model = make_model().eval()
    labelled, prompts = make_batch(model, rows), make_batch(model, rows, answers=False)
    sound = {name: labelled.pop(name, None) for name in ("input_values", "input_lengths")}
    audio = model.encode_audio(**sound)
    output = model(**labelled, audio=audio)
    assert torch.equal(output.logits, model(**labelled, **sound).logits)
    wanted = model.generate(**prompts, max_new_tokens=5, do_sample=False)
    texts = {name: prompts[name] for name in ("input_ids", "attention_mask")}
    assert torch.equal(model.generate(**texts, audio=audio, max_new_tokens=5, do_sample=False), wanted)
    assert (audio is None) == (rows == [[], []])
