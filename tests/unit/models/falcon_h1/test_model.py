"""Tiny models in all their kinds: they build, run, learn, and ignore how their vocabulary is padded."""

import pytest
import torch

from falcon_bridge import FalconH1ModelProvider


TINY = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 16,
    "ffn_hidden_size": 56,
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "mamba_state_dim": 8,
    "mamba_num_groups": 2,
    "vocab_size": 131,
    "make_vocab_size_divisible_by": 1,
    "seq_length": 32,
    "transformer_impl": "local",
    "embedding_multiplier": 2.2,
    "lm_head_multiplier": 0.45,
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 1.2,
    "ssm_out_multiplier": 0.55,
    "mlp_multipliers": (0.8, 1.4),
    "ssm_multipliers": (0.9, 0.65, 1.6, 0.75, 0.5),
}
KINDS = {
    "all kinds": {"layer_pattern": "PM*-"},
    "SSM and MLP": {"layer_pattern": "M-M-", "num_attention_heads": 0},
    "attention and MLP": {"layer_pattern": "*-*-", "mamba_num_heads": 0},
    "MLP only": {"layer_pattern": "----", "num_attention_heads": 0, "mamba_num_heads": 0},
    "by ratio": {"parallel_ratio": 0.5, "mamba_ratio": 0.25, "attention_ratio": 0.25},
    "8:0": {"num_attention_heads": 8, "mamba_num_heads": 0},
    "6:2": {"num_attention_heads": 6, "mamba_num_heads": 2},
    "2:6": {"num_attention_heads": 2, "mamba_num_heads": 6},
    "0:8": {"num_attention_heads": 0, "mamba_num_heads": 8},
}


def build(seed=0, **fields):
    """A model whose every parameter is random, norms included."""
    provider = FalconH1ModelProvider(**{**TINY, **fields})
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and not name.endswith("conv1d_bias"):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(noise * 1.2 / max(parameter.shape[-1], 4) ** 0.5)
    return model


def batch(vocab_size=131, rows=2, length=23, seed=1):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    tokens[0, -1] = vocab_size - 1  # the last real token is a target
    return tokens[:, :-1], tokens[:, 1:]


def run(model, vocab_size=131):
    tokens, labels = batch(vocab_size)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return model(tokens, positions, None, labels=labels)


def mean_loss_and_gradients(model):
    model.zero_grad()
    loss = run(model).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_runs_forward_and_backward(kind, one_rank):
    model = build(**KINDS[kind])
    loss, gradients = mean_loss_and_gradients(model)
    assert 2 < loss < 20
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.isfinite().all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("kind", KINDS)
def test_each_layer_has_the_branches_of_its_kind(kind, one_rank):
    model = build(**KINDS[kind])
    pattern = model.config.resolve_layer_pattern()
    names = [name for name, _ in model.named_parameters()]
    for layer, symbol in enumerate(pattern):
        own = [name for name in names if name.startswith(f"decoder.layers.{layer}.")]
        has = {part: any(part in name for name in own) for part in (".attention.", ".mamba_mixer.", ".mlp.")}
        assert has == {
            ".attention.": symbol in "P*" and model.config.num_attention_heads > 0,
            ".mamba_mixer.": symbol in "PM" and model.config.mamba_num_heads > 0,
            ".mlp.": symbol in "P-",
        }


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind, one_rank):
    model = build(**KINDS[kind])
    tokens, _ = batch()
    changed = tokens.clone()
    changed[:, 11:] = (changed[:, 11:] + 7) % 131
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        before, after = (model(t, positions, None)[:, :] for t in (tokens, changed))
    assert torch.allclose(before[:, :11], after[:, :11], atol=1e-5)
    assert not torch.allclose(before[:, 11:], after[:, 11:], atol=1e-2)


def padded_copy(model, **fields):
    """The same weights with more rows of vocabulary, and something large in the rows that pad it."""
    padded = build(seed=5, **fields)
    state = model.state_dict()
    with torch.no_grad():
        for name, parameter in padded.named_parameters():
            if parameter.shape[0] > state[name].shape[0]:
                parameter.normal_(std=5.0, generator=torch.Generator().manual_seed(6))
                parameter[: state[name].shape[0]] = state[name]
            else:
                parameter.copy_(state[name])
    return padded


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("divisor", [64, 128])
def test_padding_of_the_vocabulary_is_invisible(divisor, tied, one_rank):
    fields = {"num_layers": 2, "share_embeddings_and_output_weights": tied}
    model = build(**fields)
    padded = padded_copy(model, **fields, make_vocab_size_divisible_by=divisor)
    width = -(-131 // divisor) * divisor
    assert padded.embedding.word_embeddings.weight.shape[0] == width

    loss, gradients = mean_loss_and_gradients(model)
    padded_loss, padded_gradients = mean_loss_and_gradients(padded)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        own = padded_gradients[name]
        torch.testing.assert_close(own[: gradient.shape[0]], gradient, rtol=1e-5, atol=1e-7)
        assert (own[gradient.shape[0] :] == 0).all(), name


def test_padded_columns_are_never_sampled(one_rank):
    model = build(num_layers=1, make_vocab_size_divisible_by=64)
    tokens, _ = batch()
    with torch.no_grad():
        logits = model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
    assert logits.shape[-1] == 192
    assert (logits[..., 131:] == torch.finfo(logits.dtype).min).all()
    assert (logits[..., :131].abs() < 1e3).all()


def test_a_model_learns(one_rank):
    model = build(layer_pattern="PM*-")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(15):
        loss, _ = mean_loss_and_gradients(model)
        losses.append(loss)
        optimizer.step()
    assert losses[-1] < losses[0] - 1
