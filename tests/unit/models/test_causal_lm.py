"""Models whose loss comes from no logits: the same loss and gradients, and nothing else changes."""

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear

from falcon_bridge import FalconEdgeModelProvider, FalconH1ModelProvider
from falcon_bridge.ops import linear_cross_entropy as ops
from tests.unit.models.falcon_h1.conftest import one_rank, process_groups  # noqa: F401
from tests.unit.models.falcon_h1.tiny import TINY


EDGE = {name: value for name, value in TINY.items() if not name.startswith("mamba")}
FAMILIES = {
    "Falcon-H1": lambda **fields: FalconH1ModelProvider(**{**TINY, "lm_head_multiplier": 0.4, **fields}),
    "Falcon-Edge": lambda **fields: FalconEdgeModelProvider(**{**EDGE, **fields}),
}


def build(family="Falcon-H1", **fields):
    """A model whose logits spread, its vocabulary of 131 padded to 192."""
    provider = FAMILIES[family](num_layers=1, make_vocab_size_divisible_by=64, **fields)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if parameter.dim() == 1 else 0.4 * noise)
    return model


def run(model, **arguments):
    """Loss or logits of two rows of 21 tokens; labels are the tokens after them, one of them masked."""
    tokens = torch.randint(131, (2, 22), generator=torch.Generator().manual_seed(2))
    if arguments.pop("labels", True):
        arguments["labels"] = tokens[:, 1:].clone()
        arguments["labels"][0, 3] = -100
    return model(tokens[:, :-1], torch.arange(21).expand(2, 21), None, **arguments)


def loss_and_gradients(model):
    loss = run(model)
    assert loss.shape == (2, 21) and loss.is_contiguous()
    weights = torch.rand(2, 21, generator=torch.Generator().manual_seed(3))
    weights[1, 2] = 0.0
    (loss * weights).sum().backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_loss_and_gradients_are_those_with_logits(family, tied, one_rank, monkeypatch):  # noqa: F811
    monkeypatch.setattr(ops, "default_chunk_tokens", lambda *_: 8)
    fields = {"share_embeddings_and_output_weights": tied}
    loss, gradients = loss_and_gradients(build(family, **fields))
    exact_loss, exact_gradients = loss_and_gradients(build(family, fuse_linear_cross_entropy=False, **fields))
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == exact_gradients.keys()
    for name, gradient in exact_gradients.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@torch.no_grad()
def test_what_computes_logits_is_called_where_they_are_wanted_only(one_rank, monkeypatch):  # noqa: F811
    calls = []
    forward = ColumnParallelLinear.forward

    def counted(self, *args, **kwargs):
        if self is model.output_layer:
            calls.append(kwargs)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(ColumnParallelLinear, "forward", counted)
    model = build()
    loss = run(model)
    assert not calls
    assert run(model, labels=False).shape == (2, 21, 192) and len(calls) == 1
    torch.testing.assert_close(run(model, runtime_gather_output=True), loss)
    assert len(calls) == 2
    assert run(model, output_processor=lambda hidden_states, **_: hidden_states).shape == (21, 2, 48)
    model.config.fuse_linear_cross_entropy = False
    torch.testing.assert_close(run(model), loss)
    assert len(calls) == 3


def test_the_output_layer_is_called_with_its_hooks(one_rank):  # noqa: F811
    """Megatron's DistributedDataParallel waits for gathered weights in a hook before the module that holds them."""
    model, calls = build(), []
    model.output_layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.output_layer.register_forward_hook(lambda *_: calls.append("after"))
    run(model)
    assert calls == ["before", "after"]
    assert "forward" not in vars(model.output_layer)


def test_an_error_leaves_the_output_layer_as_it_was(one_rank):  # noqa: F811
    model = build()
    with pytest.raises(ValueError, match="do not fit"):
        model(torch.zeros(1, 5, dtype=torch.long), torch.arange(5)[None], None, labels=torch.zeros(1, 4).long())
    assert run(model, labels=False).shape == (2, 21, 192)


def test_a_frozen_head_gets_no_gradient(one_rank):  # noqa: F811
    model, trained = build(), build()
    model.output_layer.weight.requires_grad_(False)
    (_, gradients), (_, others) = loss_and_gradients(model), loss_and_gradients(trained)
    assert others.keys() - gradients.keys() == {"output_layer.weight"}
    for name, gradient in gradients.items():
        assert torch.equal(gradient, others[name]), name


@pytest.mark.parametrize("order", ["loss, then logits", "logits, then loss", "at once"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_step_may_use_the_loss_and_logits(order, tied, one_rank):  # noqa: F811
    """The fused loss marks the head's weight as done; Megatron must not pass over what comes from logits."""
    main_grads = []
    for fuse in (True, False):
        model = build(share_embeddings_and_output_weights=tied, fuse_linear_cross_entropy=fuse)
        (ddp,) = model.config.provide_distributed_model(
            ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), mixed_precision_wrapper=None
        )
        ddp.module.load_state_dict(model.state_dict())
        ddp.zero_grad_buffer()
        kinds = {
            "loss": lambda ddp=ddp: run(ddp).mean(),
            "logits": lambda ddp=ddp: run(ddp, labels=False)[..., :131].logsumexp(-1).square().mean(),
        }
        if order == "at once":
            (kinds["loss"]() + kinds["logits"]()).backward()
        else:
            for kind in order.split(", then "):
                kinds[kind]().backward()
        main_grads.append({name: p.main_grad.clone() for name, p in ddp.module.named_parameters()})
    fused, exact = main_grads
    for name, gradient in exact.items():
        assert (fused[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_deferred_gradient_of_the_head_is_refused(family, one_rank):  # noqa: F811
    provider = build(family).config
    provider.defer_embedding_wgrad_compute = True
    with pytest.raises(ValueError, match="fuse_linear_cross_entropy=False"):
        provider.provide()
