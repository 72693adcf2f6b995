"""What stock transformers computes on a batch: the numbers to be equalled."""

from dataclasses import dataclass, field
from pathlib import Path

import torch

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

    The model is in train mode (Falcon-H1 has no active dropout): on GPU, transformers' eval mode computes
    ``softplus(dt)`` in bf16 outside of the fused kernel that training uses.

    Args:
        path: Hugging Face checkpoint, a directory or a hub id.
        batch: the tokens.
        dtype: of the weights and activations.
        device: ``"cpu"`` or ``"cuda"``.
        gradients: also run backward.
        train: also run these steps (implies `gradients`).

    Returns:
        Everything on CPU; gradients and weights fp32.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).train()
    backward = gradients or train is not None
    with torch.set_grad_enabled(backward):
        logits, loss = _forward_backward(model, batch, device, backward)
    outcome = Outcome(logits, loss)
    if backward:
        outcome.gradients = {name: p.grad.float().cpu().clone() for name, p in model.named_parameters()}
    if train:
        _train(model, batch, device, train)
        outcome.weights = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    return outcome


def _forward_backward(model, batch: Batch, device: str, backward: bool) -> tuple[torch.Tensor, float]:
    tokens_in_loss = int(batch.loss_mask.sum())
    loss, logits, start = 0.0, [], 0
    for length in batch.documents:
        tokens = batch.tokens[:, start : start + length].to(device)
        start += length
        if length == 1:
            # no successor, no loss; row by row, because FalconH1RMSNormGated drops the sequence dimension of one token
            alone = [model(input_ids=row[None], use_cache=False).logits for row in tokens]
            logits.append(torch.cat(alone).detach().float().cpu())
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
