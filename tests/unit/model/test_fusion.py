"""Every fusion against its formula, written out clip by clip and frame by frame in float64."""

import math
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mowe_ray.model import MoweForConditionalGeneration
from mowe_ray.model.building import WeakEncoder, build_processor
from mowe_ray.model.export import export
from mowe_ray.model.fusion import FUSIONS
from tests.tiny_models import tiny_hubert_config, tiny_whisper_config
from tests.unit.model.conftest import MakeModel

MakeBatch = Callable[..., dict[str, Tensor]]

NO_DROPOUT = dict.fromkeys(("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout"), 0.0)
POOL = [
    WeakEncoder("a", tiny_whisper_config(d_model=16), train="full"),
    WeakEncoder("b", tiny_hubert_config(**NO_DROPOUT), train="full"),
    WeakEncoder("c", tiny_whisper_config(d_model=24, encoder_attention_heads=2), train="full"),
]
ROWS = [[0.5], [0.9, 0.6], []]
CLIPS = 3
ROUTED = [name for name, fusion in FUSIONS.items() if fusion.routed]
TOP_TWO_OF_FRAMES = {"router_granularity": "frame", "router_top_k": 2}
# Each router input, granularity and number of members at least once; all fusions are tried with each.
ROUTERS = [
    {"router_top_k": 2},
    {"router_input": "prompt", "router_hidden": 5},
    TOP_TWO_OF_FRAMES | {"router_input": "audio+prompt"},
    {"router_granularity": "frame", "router_data_independent": False},
]
# All pairs: with a router that hears nothing as well, and of the fusions without routers.
PAIRS = [
    *product(ROUTED, [*ROUTERS, {"router_data_dependent": False}]),
    *((name, {}) for name, fusion in FUSIONS.items() if not fusion.routed),
]


def name_of(value: Any) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value)


def decided(model: MoweForConditionalGeneration, batch: dict[str, Tensor]) -> MoweForConditionalGeneration:
    """Let the routers hear differences between clips, frames and instructions, and open the gates."""
    router = model.audio_tower.dependent_router
    for name, parameter in model.named_parameters():
        if name.endswith(".gate"):
            parameter.data.fill_(0.8)
    if router is not None:
        router.weight.data.mul_(200)
        logits = model(**batch).routing.dependent.logits.detach()
        router.bias.data.sub_(logits.flatten(0, -2).mean(0))
    return model


def heard(model: MoweForConditionalGeneration, make_model: MakeModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return base features and each member's frames, (C, T, D) each, in float64: what `concat` gives the adapter."""
    dense = make_model(weak_encoders=POOL, fusion="concat").double().train(model.training)
    known = {name: weight for name, weight in model.state_dict().items() if ".adapter." not in name}
    dense.load_state_dict(known, strict=False)
    return list(fused_by(dense, batch).chunk(1 + len(POOL), dim=-1))


def fused_by(model: MoweForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Return what the adapter gets."""
    seen: list[Tensor] = []
    hook = model.audio_tower.adapter.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model.encode_audio(**batch)
    hook.remove()
    return seen[0]


# ---- the formulas -----------------------------------------------------------------------------


def weights_by_hand(model: MoweForConditionalGeneration, base: Tensor, prompts: Tensor, valid: list[int]) -> Tensor:
    """Weights (routers, C, T, M), ranked: entry (router, rank, C, T, M) holds the weight of that rank alone."""
    config, tower = model.config, model.audio_tower
    ranked = torch.zeros(2, config.router_top_k, len(base), base.shape[1], len(POOL), dtype=torch.float64)
    for clip, frames in enumerate(valid):
        for frame in range(frames):
            for number, p in enumerate(_probabilities(tower, config, base[clip], prompts[clip], frames, frame)):
                for rank, member in enumerate(sorted(range(len(POOL)), key=lambda m: -p[m])[: config.router_top_k]):
                    ranked[number, rank, clip, frame, member] = p[member]
    return ranked[0 if tower.independent_router is not None else 1 :]


def _probabilities(tower: Any, config: Any, base: Tensor, prompt: Tensor, frames: int, frame: int) -> Iterator[Any]:
    if tower.independent_router is not None:
        yield tower.independent_router.logits.double().softmax(-1).tolist()
    else:
        yield [0.0] * len(POOL)
    own = base[frame] if config.router_granularity == "frame" else base[:frames].mean(0)
    spread = (prompt - prompt.mean()) / (prompt.var(correction=0) + 1e-5).sqrt()
    read = torch.cat([part for part, kind in ((own, "audio"), (spread, "prompt")) if kind in config.router_input])
    router = tower.dependent_router
    if router.inner_weight is not None:
        inner = router.inner_weight @ read + router.inner_bias
        read = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))
    yield (router.weight @ read + router.bias).softmax(-1).tolist()


def attended(block: Any, queries: Tensor, memory: Tensor) -> Tensor:
    """Multi-head attention of queries (Q, D) to memory (T, D), head by head."""
    mean, deviation = queries.mean(-1, keepdim=True), queries.var(-1, correction=0, keepdim=True)
    normal = (queries - mean) / (deviation + 1e-5).sqrt() * block.query_norm.weight + block.query_norm.bias
    query, key, value = (
        normal @ block.q.weight.T + block.q.bias,
        memory @ block.k.weight.T,
        memory @ block.v.weight.T + block.v.bias,
    )
    heads = []
    for q, k, v in zip(*(part.chunk(block.heads, -1) for part in (query, key, value)), strict=True):
        heads.append((q @ k.T / math.sqrt(q.shape[-1])).softmax(-1) @ v)
    return torch.cat(heads, -1) @ block.o.weight.T + block.o.bias


@torch.no_grad()
def by_hand(
    model: MoweForConditionalGeneration, clip: int, frames: int, ranked: Tensor, h: Tensor, s: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return the features (T, F) of one clip's own frames, and its latents (tokens, D); none for other fusions."""
    own, members = h[clip, :frames], [states[clip, :frames] for states in s]
    weight = ranked[:, :, clip, :frames].sum(1)  # (routers, T, M)
    mixed = [sum(w[:, m, None] * states for m, states in enumerate(members)) for w in weight]
    blocks = [member.fuse for member in model.audio_tower.pool]
    nothing = own.new_zeros(0, own.shape[1])
    match model.config.fusion:
        case "routed":
            return torch.cat([own, *mixed], -1), nothing
        case "sum":
            return own + sum(mixed), nothing
        case "cross_attention":
            for m, (block, states) in enumerate(zip(blocks, members, strict=True)):
                gate = weight.sum(0)[:, m, None] * math.tanh(float(block.gate))
                own = own + gate * attended(block, h[clip, :frames], states)
            return own, nothing
        case "latents":
            tokens = []
            for router in ranked:
                for rank in router:
                    share = rank[clip, :frames].mean(0)  # (M,)
                    found = [b.latents + attended(b, b.latents, x) for b, x in zip(blocks, members, strict=True)]
                    tokens.append(sum(w * latents for w, latents in zip(share, found, strict=True)))
            return own, torch.cat(tokens)
    raise AssertionError(model.config.fusion)


# ---- the tests --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("routers", ROUTERS, ids=name_of)
@pytest.mark.parametrize("fusion", ROUTED)
def test_fusion_is_its_formula(make_model: MakeModel, make_batch: MakeBatch, fusion: str, routers: Any) -> None:
    model = make_model(weak_encoders=POOL, fusion=fusion, **routers).double().eval()
    batch = make_batch(model, ROWS)
    decided(model, batch)
    tower = model.audio_tower
    valid = tower.base_encoder.num_frames(batch["input_lengths"]).tolist()
    h, *s = heard(model, make_model, batch)
    prompts = torch.stack([_instruction(model, batch, row) for row, clips in enumerate(ROWS) for _ in clips])
    ranked = weights_by_hand(model, h, prompts, valid)
    fused, audio = fused_by(model, batch), model.encode_audio(**batch)
    assert len({tuple(row) for row in audio.record.dependent.chosen.flatten(0, -2).tolist()}) > 1
    for clip, frames in enumerate(valid):
        wanted, latents = by_hand(model, clip, frames, ranked, h, s)
        # Routers work in float32.
        torch.testing.assert_close(fused[clip, :frames], wanted, atol=3e-5, rtol=3e-5)
        own = -(-frames // 8)
        assert audio.valid[clip] == own + len(latents)
        if len(latents):
            project = tower.fusion.project
            tokens = latents @ project.weight.T + project.bias
            torch.testing.assert_close(audio.tokens[clip, own : audio.valid[clip]], tokens, atol=3e-5, rtol=3e-5)


@torch.no_grad()
def _instruction(model: MoweForConditionalGeneration, batch: dict[str, Tensor], row: int) -> Tensor:
    ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
    first = next(place for place, label in enumerate(labels) if label != -100)
    words = [token for token in ids[:first] if token != model.config.audio_token_id]
    return model.get_input_embeddings().weight.double()[words].mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("routers", [*ROUTERS, {}], ids=name_of)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_sparse_equals_dense(make_model: MakeModel, make_batch: MakeBatch, fusion: str, routers: Any) -> None:
    found = {}
    for execution in ("sparse", "dense"):
        model = make_model(weak_encoders=POOL, fusion=fusion, router_execution=execution, **routers).double().train()
        batch = make_batch(model, ROWS)
        if model.config.routed:
            decided(model, batch)
        output = model(**batch, present=torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]]).bool())
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        assert all(gradient is not None for gradient in gradients.values())
        found[execution] = output.loss.detach(), gradients
    sparse, dense = found["sparse"], found["dense"]
    torch.testing.assert_close(sparse[0], dense[0], atol=1e-9, rtol=1e-9)
    for name, gradient in sparse[1].items():
        # Routers work in float32, and their gradients are sums over all frames.
        torch.testing.assert_close(gradient, dense[1][name], atol=1e-7, rtol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("routers", [{}, {"router_input": "prompt"}, TOP_TWO_OF_FRAMES], ids=name_of)
@pytest.mark.parametrize("fusion", ROUTED)
def test_the_language_models_loss_teaches_the_routers(
    make_model: MakeModel, make_batch: MakeBatch, fusion: str, routers: Any
) -> None:
    model = make_model(weak_encoders=POOL, fusion=fusion, mowe_loss_weight=0.0, **{"router_top_k": 1} | routers).train()
    batch = make_batch(model, ROWS)
    decided(model, batch)(**batch).loss.backward()
    tower = model.audio_tower
    assert (tower.independent_router.logits.grad != 0).all()
    assert (tower.dependent_router.weight.grad.abs().sum(1) > 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_tokens_of_a_clip_do_not_depend_on_its_neighbours(
    make_model: MakeModel, make_batch: MakeBatch, fusion: str
) -> None:
    model = make_model(weak_encoders=POOL, fusion=fusion, router_granularity="frame").eval()
    batch = make_batch(model, [[0.7], [0.4], [0.7]])
    together = model.encode_audio(batch["input_values"], batch["input_lengths"])
    for clip in (0, 2):
        alone = model.encode_audio(batch["input_values"][[clip]], batch["input_lengths"][[clip]])
        assert alone.valid == [together.valid[clip]]
        torch.testing.assert_close(alone.tokens[0], together.tokens[clip], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("fusion", "routers"), PAIRS, ids=name_of)
def test_an_export_answers_alike(
    make_model: MakeModel, make_batch: MakeBatch, tokenizer: Any, tmp_path: Path, fusion: str, routers: Any
) -> None:
    model = make_model(weak_encoders=POOL, fusion=fusion, latents=3, **routers)
    batch = make_batch(model.eval(), ROWS)
    if model.config.routed:
        decided(model, batch)
    processor = build_processor(model, tokenizer)
    export(model, processor, tmp_path)
    loaded = MoweForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    read = type(processor).from_pretrained(tmp_path)
    assert (
        read.num_audio_tokens(16_000)
        == processor.num_audio_tokens(16_000)
        == model.audio_tower.token_counts([16_000])[0]
    )
    kept = model.config.num_routers * model.config.router_top_k
    assert processor.num_audio_tokens(16_000) == 7 + (kept * 3 if fusion == "latents" else 0)


def test_a_gate_is_closed_at_first(make_model: MakeModel, make_batch: MakeBatch) -> None:
    """So that training starts from the base encoder alone; the gate itself learns from the first step on."""
    model = make_model(weak_encoders=POOL, fusion="cross_attention").train()
    batch = make_batch(model, ROWS)
    h, *_ = heard(model.double(), make_model, batch)
    torch.testing.assert_close(fused_by(model, batch), h)
    model(**batch).loss.backward()
    gates = [parameter.grad for name, parameter in model.named_parameters() if name.endswith(".gate")]
    assert len(gates) == len(POOL)
    assert any(gradient.abs() > 0 for gradient in gates)
