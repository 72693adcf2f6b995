import pytest
import torch

from falcon_bridge.errors import UserError
from falcon_bridge.inference.sampling import Sampling, TokenSampler


LOGITS = torch.tensor([0.0, 2.0, 1.5, -1.0, 1.9])


def draws(sampling, number=400):
    sampler = TokenSampler(sampling)
    return [sampler(LOGITS) for _ in range(number)]


def test_greedy_takes_the_most_likely():
    assert set(draws(Sampling(), 3)) == {1}


def test_sampling_follows_the_probabilities():
    tokens = torch.tensor(draws(Sampling(temperature=2.0), 20_000))
    shares = tokens.bincount(minlength=5) / len(tokens)
    assert torch.allclose(shares, (LOGITS / 2).softmax(0), atol=0.015)


def test_top_k_and_top_p_leave_the_unlikely_out():
    assert set(draws(Sampling(temperature=1.0, top_k=2))) == {1, 4}
    kept = LOGITS.softmax(0)[1] + LOGITS.softmax(0)[4]
    assert set(draws(Sampling(temperature=1.0, top_p=float(kept) - 0.01))) == {1, 4}


def test_the_seed_decides():
    first, same, other = (draws(Sampling(temperature=1.0, seed=s), 50) for s in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"temperature": -1}, "--temperature"),
        ({"temperature": float("nan")}, "--temperature"),
        ({"temperature": 1.0, "top_k": -1}, "--top-k"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"temperature": 1.0, "top_p": 1.5}, "--top-p"),
        ({"top_k": 5}, "--temperature above 0"),
    ],
)
def test_bad_options_are_refused(options, says):
    with pytest.raises(UserError, match=says):
        Sampling(**options)
