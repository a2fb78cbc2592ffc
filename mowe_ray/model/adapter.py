"""Adapters: from encoder frames to fewer, language-model-wide audio tokens.

All share one contract: features (C, T, D) of which the first `valid` (C,) frames count become
(C, ceil(T / downsample), W), of which the first ceil(valid / downsample) count, and those do not
depend on what the padding holds. Legend: C clips, T frames, D width of the features, H inner width,
W width of the language model.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .registry import Registry

ADAPTERS: Registry[type[nn.Module]] = Registry("model.adapter.kind")
"""Class by name; it is called with the widths D, H and W, and the frames of one token."""


def valid_mask(valid: Tensor, frames: int) -> Tensor:
    """Mark the first `valid` (C,) of `frames` positions: (C, frames) bool."""
    return torch.arange(frames, device=valid.device) < valid[:, None]


def shrunk(length: int | Tensor, factor: int) -> int | Tensor:
    """Return ceil(length / factor)."""
    return (length + factor - 1) // factor


@ADAPTERS.register("seqcnn")
class SeqCnn(nn.Module):
    """One stride-2 convolution (kernel 3) and GELU per halving, then a linear map.

    The name and the factor of 8 are the paper's (`seqcnn8`); kernel, depth and width are [ours].
    """

    def __init__(self, width: int, hidden: int, out: int, downsample: int):
        super().__init__()
        halvings = downsample.bit_length() - 1
        if 2**halvings != downsample or halvings < 1:
            raise ValueError(f"model.adapter.downsample: seqcnn needs a power of 2 above 1, not {downsample}")
        widths = [width] + [hidden] * halvings
        self.convs = nn.ModuleList(
            nn.Conv1d(before, after, kernel_size=3, stride=2, padding=1) for before, after in pairwise(widths)
        )
        self.proj = nn.Linear(hidden, out)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Map features (C, T, D) to tokens (C, ceil(T / downsample), W)."""
        hidden = features.transpose(1, 2)
        for conv in self.convs:
            # Every layer's bias makes padding non-zero again, and the next kernel reaches into it.
            hidden = hidden * valid_mask(valid, hidden.shape[-1])[:, None]
            if hidden.shape[-1] == 1:
                # The same result; but torch leaves the bfloat16 weight gradient of one frame uninitialised on CPUs.
                hidden = F.pad(hidden, (0, 1))
            hidden = F.gelu(conv(hidden))
            valid = torch.as_tensor(shrunk(valid, 2))
        tokens: Tensor = self.proj(hidden.transpose(1, 2))
        return tokens


@ADAPTERS.register("stack_mlp")
class StackMlp(nn.Module):
    """Stack `downsample` neighbouring frames and map each stack through a two-layer perceptron."""

    def __init__(self, width: int, hidden: int, out: int, downsample: int):
        super().__init__()
        self.downsample = downsample
        self.inner = nn.Linear(width * downsample, hidden)
        self.proj = nn.Linear(hidden, out)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Map features (C, T, D) to tokens (C, ceil(T / downsample), W)."""
        windows, _ = split_windows(features, valid, self.downsample)
        tokens: Tensor = self.proj(F.gelu(self.inner(windows.flatten(2))))
        return tokens


@ADAPTERS.register("qformer")
class QFormer(nn.Module):
    """One learned query per window of `downsample` frames, cross-attending to that window.

    After the window-level Q-Former of SALMONN (arXiv 2310.13289), with one query [ours].
    """

    def __init__(self, width: int, hidden: int, out: int, downsample: int, heads: int = 4, blocks: int = 2):
        super().__init__()
        self.downsample = downsample
        self.query = nn.Parameter(torch.empty(hidden))
        # Attention ignores order, so each frame's position in its window is added.
        self.positions = nn.Parameter(torch.empty(downsample, hidden))
        self.inner = nn.Linear(width, hidden)
        self.norm = nn.LayerNorm(hidden)
        self.blocks = nn.ModuleList(CrossAttentionBlock(hidden, heads) for _ in range(blocks))
        self.proj = nn.Linear(hidden, out)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw query and positions; the other tensors belong to submodules."""
        nn.init.normal_(self.query, std=0.02)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Map features (C, T, D) to tokens (C, ceil(T / downsample), W)."""
        windows, mask = split_windows(features, valid, self.downsample)
        clips, count = windows.shape[:2]
        # Even a window of padding needs one key, or softmax gives NaN; its token is never read.
        mask = mask | (torch.arange(self.downsample, device=mask.device) == 0)
        memory = self.norm(self.inner(windows.flatten(0, 1))) + self.positions
        tokens: Tensor = self.query.expand(clips * count, 1, -1)
        for block in self.blocks:
            tokens = block(tokens, memory, mask.flatten(0, 1))
        projected: Tensor = self.proj(tokens)
        return projected.view(clips, count, -1)


class CrossAttention(nn.Module):
    """Cross-attention of normalised queries, of plain linears: ZeRO-3 gathers what is called."""

    def __init__(self, width: int, heads: int = 4):
        super().__init__()
        # Tiny models have widths that do not divide.
        self.heads = heads if width % heads == 0 else 1
        self.query_norm = nn.LayerNorm(width)
        self.q = nn.Linear(width, width)
        # No bias: it would move all scores of a query alike, to which softmax is invariant.
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def attend(self, tokens: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Return what tokens (R, Q, H) find in the frames of memory (R, T, H) that `mask` (R, T) shows: (R, Q, H)."""
        query = self._heads(self.q(self.query_norm(tokens)))
        key, value = self._heads(self.k(memory)), self._heads(self.v(memory))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None])
        found: Tensor = self.o(seen.transpose(1, 2).flatten(2))
        return found

    def _heads(self, states: Tensor) -> Tensor:
        clips, frames, width = states.shape
        return states.view(clips, frames, self.heads, width // self.heads).transpose(1, 2)


class CrossAttentionBlock(CrossAttention):
    """Pre-norm cross-attention and perceptron."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Update tokens (R, Q, H) from the frames of memory (R, T, H) that `mask` (R, T) shows."""
        tokens = tokens + self.attend(tokens, memory, mask)
        update: Tensor = self.down(F.gelu(self.up(self.mlp_norm(tokens))))
        return tokens + update


@ADAPTERS.register("moe_mlp")
class MoeMlp(nn.Module):
    """`StackMlp` with several experts, softly merged for each token: routing in the adapter, in place of the encoders.

    Each layer is the sum of all experts' layers, weighted by a router that reads the token's frames: what SMEAR
    (arXiv 2306.03745) merges for a whole sequence, frame-wise as in MOSA (arXiv 2508.18998).
    """

    num_experts = 4

    def __init__(self, width: int, hidden: int, out: int, downsample: int):
        super().__init__()
        self.downsample = downsample
        self.router = nn.Linear(width * downsample, self.num_experts)
        self.inner = nn.Linear(width * downsample, self.num_experts * hidden)
        self.proj = nn.Linear(hidden, self.num_experts * out)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Map features (C, T, D) to tokens (C, ceil(T / downsample), W)."""
        windows, _ = split_windows(features, valid, self.downsample)
        stacked = windows.flatten(2)
        weights = self.router(stacked).float().softmax(-1).to(stacked.dtype)
        hidden = F.gelu(self._merged(self.inner(stacked), weights))
        return self._merged(self.proj(hidden), weights)

    def _merged(self, outputs: Tensor, weights: Tensor) -> Tensor:
        """Sum the experts' outputs (C, N, experts * H), weighted by (C, N, experts): (C, N, H)."""
        merged: Tensor = weights[..., None, :] @ outputs.unflatten(-1, (self.num_experts, -1))
        return merged.squeeze(-2)


def split_windows(features: Tensor, valid: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Cut features (C, T, D) into windows (C, ceil(T / window), window, D), with their mask."""
    frames = features.shape[1]
    # The last window of a clip may hold padding: its content must not depend on the batch.
    features = features * valid_mask(valid, frames)[..., None]
    features = F.pad(features, (0, 0, 0, -frames % window))
    mask = valid_mask(valid, features.shape[1])
    return features.unflatten(1, (-1, window)), mask.unflatten(1, (-1, window))


def build_adapter(kind: str, width: int, hidden: int, out: int, downsample: int) -> nn.Module:
    """Return the adapter `kind` from features of `width` over `hidden` to tokens of width `out`.

    Raises:
        ValueError: if `kind` is unknown or does not support `downsample`.
    """
    if downsample < 1:
        raise ValueError(f"model.adapter.downsample must be at least 1, not {downsample}")
    return ADAPTERS.find(kind)(width, hidden, out, downsample)
