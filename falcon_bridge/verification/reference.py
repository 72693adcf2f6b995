"""What stock transformers computes on a batch: the numbers to be equalled."""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from falcon_bridge.conversion.bitnet_config import is_bitnet
from falcon_bridge.verification.batch import Batch


@dataclass(frozen=True)
class TrainSteps:
    """A few steps of AdamW on one batch.

    ``eps`` is far above Adam's usual one, so that the update is a smooth function of the gradient: with 1e-8, elements
    whose gradient is rounding noise would move by ±lr in either implementation and nothing could be compared.
    """

    steps: int = 5
    lr: float = 1e-2
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-3
    clip_grad: float = 1.0


@dataclass
class Outcome:
    """What a model computes on a batch.

    Attributes:
        logits: `[b, s, vocab]` fp32.
        loss: mean cross entropy over the tokens that have a successor, in nats.
        gradients: of the loss, by Hugging Face tensor name; empty without a train step.
        weights: after the train steps, by the same names; empty without them.
    """

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)


def transformers_outcome(
    path: str | Path,
    batch: Batch,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    gradients: bool = False,
    train: TrainSteps | None = None,
) -> Outcome:
    """Run stock transformers on `batch`; a packed batch document by document, each alone in its own forward.

    The projections of a BitNet checkpoint are `bitnet.reference.bitlinear`, see `reference_bitnet.load_bitnet_llama`.

    The model is in train mode (Falcon-H1 has no active dropout): on GPU, transformers' eval mode computes
    ``softplus(dt)`` in bf16 outside of the fused kernel that training uses.

    Args:
        path: Hugging Face checkpoint, a directory or a hub id.
        batch: the tokens.
        dtype: of the weights and activations; see `working_dtype`.
        device: ``"cpu"`` or ``"cuda"``.
        gradients: also run backward.
        train: also run these steps (implies `gradients`).

    Returns:
        Everything on CPU; gradients and weights fp32.
    """
    model = _load(path, dtype, device, widen=True)
    backward = gradients or train is not None
    with torch.set_grad_enabled(backward):
        logits, loss = _forward_backward(model, batch, device, backward)
    outcome = Outcome(logits, loss)
    if backward:
        outcome.gradients = {name: p.grad.float().cpu().clone() for name, p in model.named_parameters()}
    if train:
        if next(model.parameters()).dtype != dtype:  # Megatron's optimizers refuse the wider one
            model = _load(path, dtype, device, widen=False)
            _forward_backward(model, batch, device, backward)
        _train(model, batch, device, train)
        outcome.weights = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    return outcome


def working_dtype(config: Any, dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which two implementations of a model can be compared in `dtype`.

    That of everything but the BitNet linears, whose own arithmetic is fp32 and, in its integer part, exact. Where the
    rest is fp32, too, any two implementations differ by some 1e-7; activations that lie as near to the middle between
    two int8 codes then get different ones, and a step of 1/127 hides what is compared. So the rest is fp64 where it
    can be: on CPU.

    Args:
        config: The transformers config.
        dtype: What is wanted.
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        fp64 for a BitNet model in fp32 on CPU, `dtype` otherwise.
    """
    return torch.float64 if is_bitnet(config) and dtype == torch.float32 and device == "cpu" else dtype


def _load(path: str | Path, dtype: torch.dtype, device: str, widen: bool) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    if is_bitnet(config):
        from falcon_bridge.verification.reference_bitnet import load_bitnet_llama

        model = load_bitnet_llama(path, working_dtype(config, dtype, device) if widen else dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        modeling = sys.modules[type(model).__module__]
        if device == "cpu" and getattr(modeling, "causal_conv1d_fn", None) is not None:
            # transformers calls the CUDA kernel wherever it is installed; each new model looks for it again
            modeling.causal_conv1d_fn = None
    return model.to(device).train()


def _forward_backward(model, batch: Batch, device: str, backward: bool) -> tuple[torch.Tensor, float]:
    tokens_in_loss = int(batch.loss_mask.sum())
    loss, logits, start = 0.0, [], 0
    for length in batch.documents:
        tokens = batch.tokens[:, start : start + length].to(device)
        start += length
        if length == 1:
            # no successor, no loss; kernels refuse a row of one token and FalconH1RMSNormGated drops its sequence
            # dimension, so it is followed by a second, which it cannot see
            output = model(input_ids=tokens.repeat(1, 2), use_cache=False)
            logits.append(output.logits[:, :1].detach().float().cpu())
            continue
        output = model(input_ids=tokens, labels=tokens, use_cache=False)
        logits.append(output.logits.detach().float().cpu())
        # transformers' loss is the mean over the document's tokens
        share = output.loss * (tokens.shape[0] * (length - 1) / tokens_in_loss)
        loss += share.item()
        if backward:
            share.backward()
    return torch.cat(logits, dim=1), loss


def _train(model, batch: Batch, device: str, train: TrainSteps) -> None:
    """`train.steps` steps, of which the gradients of the first are there already."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=train.betas, eps=train.eps, weight_decay=0.0, foreach=False
    )
    for step in range(train.steps):
        if step:
            optimizer.zero_grad(set_to_none=True)
            _forward_backward(model, batch, device, backward=True)
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad)
        optimizer.step()
