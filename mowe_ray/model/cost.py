"""Parameters, operations and memory of a model, counted on PyTorch's meta device: no weights and no accelerator."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from .encoders import AudioEncoder, find_encoder, read_config
from .frontends import SAMPLE_RATE

Found = TypeVar("Found")


@dataclass(frozen=True)
class Cost:
    """Size and work of one part of a model.

    Attributes:
        parameters: weights stored.
        trainable: weights that get a gradient.
        gflops: 1e9 floating-point operations of one forward pass; a multiply-add counts as two.
    """

    parameters: int
    trainable: int
    gflops: float


def encoder_on_meta(source: str | Mapping[str, Any]) -> AudioEncoder | None:
    """An encoder without weights; None when its hub id is neither in our table nor within reach."""
    found = _found(source, find_encoder)
    if found is None:
        return None
    config, family = found
    with torch.device("meta"):
        return family(config, family.make_front_end(config, {}))


def language_model_on_meta(source: str | Mapping[str, Any]) -> PreTrainedModel | None:
    """A language model without weights; None as for `encoder_on_meta`."""
    config = _found(source, read_config)
    if config is None:
        return None
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def encoder_cost(encoder: AudioEncoder, seconds: float) -> Cost:
    """Cost of one clip padded to `seconds`; the encoder must be on the meta device."""
    samples = max(round(seconds * SAMPLE_RATE), encoder.min_samples)
    wave = torch.empty(1, samples, device="meta")
    features = encoder.front_end(wave, torch.tensor([samples], device="meta"), samples)
    mode = encoder.training
    encoder.eval()  # batch normalisation refuses a clip of one frame in training
    recurrent = [module for module in encoder.modules() if isinstance(module, nn.RNNBase)]
    for module in recurrent:
        module.forward = partial(_all_steps_at_once, module)
    # The device for what transformers makes on the way: there are masks that no other tensor can be filled into.
    with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
        encoder(features)
    for module in recurrent:
        del module.forward
    encoder.train(mode)
    return _cost(encoder, counter)


def _all_steps_at_once(module: nn.RNNBase, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Multiply what an LSTM, GRU or RNN does, for all T steps in one product each, and return tensors of its shapes.

    On the meta device the counter would go through it step by step: 30 s of audio are a minute of Python.
    """
    directions, last, cells = ("", "_reverse") if module.bidirectional else ("",), [], []
    for layer in range(module.num_layers):
        outputs = []
        for direction in directions:
            name = f"l{layer}{direction}"
            torch.matmul(inputs, getattr(module, f"weight_ih_{name}").T)
            out = inputs.new_empty(*inputs.shape[:-1], getattr(module, f"weight_hh_{name}").shape[1])
            torch.matmul(out, getattr(module, f"weight_hh_{name}").T)
            cell = inputs.new_empty(*inputs.shape[:-1], module.hidden_size)
            if module.proj_size:
                out = torch.matmul(cell, getattr(module, f"weight_hr_{name}").T)
            time = 1 if module.batch_first and inputs.dim() == 3 else 0
            outputs.append(out)
            last.append(out.select(time, -1))
            cells.append(cell.select(time, -1))
        inputs = torch.cat(outputs, -1)
    hidden = torch.stack(last)
    return inputs, (hidden, torch.stack(cells)) if isinstance(module, nn.LSTM) else hidden


def language_model_cost(model: PreTrainedModel, tokens: int) -> Cost:
    """Cost of one sequence of so many text and audio tokens; the model must be on the meta device.

    Attention is counted over all pairs of tokens; kernels that skip the causal half do less.
    """
    width = model.config.get_text_config().hidden_size
    embeddings = torch.empty(1, tokens, width, device="meta", dtype=model.dtype)
    # A ready-made mask, because transformers would look at values to make one, and there are none.
    mask = torch.empty(1, 1, tokens, tokens, device="meta", dtype=torch.bool)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False)
    return _cost(model, counter)


def zero_memory_bytes(
    trainable: int, frozen: int, stage: int, world_size: int, bytes_per_weight: int, *, float32_sums: bool = False
) -> dict[str, int]:
    """Bytes per worker for model states under ZeRO with AdamW; activations come on top.

    From arXiv 1910.02054 section 5: a trained weight takes its own bytes, as many for its gradient,
    and 12 for float32 master copy, mean and variance. Stage 1 divides the optimizer's part by the
    number of workers, stage 2 also the gradients, stage 3 also the weights, frozen ones included.
    In float32 the master copy exists only because DeepSpeed makes one from stage 1 on.

    Args:
        trainable: number of trained weights.
        frozen: number of frozen weights; they have neither gradients nor optimizer states.
        stage: ZeRO stage, 0 to 3.
        world_size: number of workers.
        bytes_per_weight: 2 for bfloat16, 4 for float32.
        float32_sums: bfloat16 gradients are summed over micro-batches in float32, in 4 more bytes.

    Returns:
        Bytes of `weights`, `gradients`, `optimizer` and their `total`.
    """
    assert stage in range(4), stage
    master_copy = 4 if bytes_per_weight < 4 or stage > 0 else 0
    parts = {
        "weights": (bytes_per_weight * (trainable + frozen), 3),
        "gradients": ((bytes_per_weight + (4 if float32_sums and bytes_per_weight < 4 else 0)) * trainable, 2),
        "optimizer": ((master_copy + 8) * trainable, 1),
    }
    divided = {
        name: -(-size // world_size) if stage >= first_divided else size
        for name, (size, first_divided) in parts.items()
    }
    return {**divided, "total": sum(divided.values())}


def _found(source: str | Mapping[str, Any], find: Callable[[str | Mapping[str, Any]], Found]) -> Found | None:
    if isinstance(source, str) and source in KNOWN_ARCHITECTURES:
        return find(KNOWN_ARCHITECTURES[source])
    try:
        return find(source)
    except ValueError:
        if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            return None
        raise


def _cost(module: nn.Module, counter: FlopCounterMode) -> Cost:
    sizes = [(p.numel(), p.requires_grad) for p in module.parameters()]
    return Cost(
        parameters=sum(size for size, _ in sizes),
        trainable=sum(size for size, trained in sizes if trained),
        gflops=counter.get_total_flops() / 1e9,
    )


_HUBERT_BASE = {"model_type": "hubert"}  # HubertConfig's defaults are this model

KNOWN_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "openai/whisper-large-v3": {
        "model_type": "whisper",
        "d_model": 1280,
        "encoder_layers": 32,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "num_mel_bins": 128,
    },
    "openai/whisper-tiny": {
        "model_type": "whisper",
        "d_model": 384,
        "encoder_layers": 4,
        "encoder_attention_heads": 6,
        "encoder_ffn_dim": 1536,
        "num_mel_bins": 80,
    },
    "facebook/hubert-base-ls960": _HUBERT_BASE,
    "superb/hubert-base-superb-er": _HUBERT_BASE,
    "microsoft/Phi-3-mini-4k-instruct": {
        "model_type": "phi3",
        "vocab_size": 32064,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
}
"""Inline configuration by hub id."""
