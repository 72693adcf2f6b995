"""Weights that give a wrong scale away: every Hugging Face matrix, row block and column block has its own std."""

import torch

from falcon_bridge.bitnet.segments import gate_up_row_segments, qkv_row_segments


def draw(*shape, seed=0, std=1.0, dtype=torch.float32):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * std).to(dtype)


def uneven(out_features, in_features, *, seed=0, dtype=torch.float32, blocks=4):
    """A matrix whose row blocks and column blocks differ in std, so that shards differ in scale."""
    std_of_row = 0.02 * 1.7 ** (torch.arange(out_features) * blocks // out_features)
    std_of_column = 1.6 ** (torch.arange(in_features) * blocks // in_features)
    W = draw(out_features, in_features, seed=seed).double() * std_of_row[:, None] * std_of_column
    return W.to(dtype)


def fused(kind, in_features, *, seed=0, dtype=torch.float32):
    """Return a fused weight, its row segments and their number; the matrices differ in std by up to 8 times."""
    row_segments, stds = {
        "qkv": (qkv_row_segments(8, 2, 6), (0.02, 0.16, 0.05)),
        "gate_up": (gate_up_row_segments(20), (0.03, 0.21)),
    }[kind]
    W = uneven(len(row_segments), in_features, seed=seed).double() * torch.tensor(stds)[row_segments][:, None]
    return W.to(dtype), row_segments, len(stds)
