"""The SSM branch at the greatest lengths that mamba-ssm's kernels can address, ours beyond, and the guard."""

from dataclasses import replace

import pytest
import torch

from falcon_bridge.ops.ssd import offsets
from falcon_bridge.ops.ssm_scan import SSMShape, ssm_scan


pytestmark = pytest.mark.gpu

ROWS, WINDOW = 2, 4096
SHAPE = SSMShape(
    heads=24,
    head_dim=64,
    groups=1,
    d_state=64,
    chunk_size=128,
    scales=(0.35, 0.9, 0.8, 0.7, 1.2),
    out_scale=0.24,
    norm_width=1536,
    backend="mamba_ssm",
)
REACH = offsets.ADDRESSABLE["mamba_ssm"]
# rows longer than mamba-ssm's kernels can address, and nearly as long as causal-conv1d can
BEYOND = 1.03


def longest() -> int:
    """Tokens of a row, whole chunks, that the guard lets through."""
    length = REACH // ROWS // SHAPE.chunk_size * SHAPE.chunk_size
    while max(offsets.scan_spans(ROWS, length, SHAPE).values()) > REACH:
        length -= SHAPE.chunk_size
    return length


def parameters() -> list[torch.Tensor]:
    """Of a scan that forgets within hundreds of tokens: e^-140 and less is left of a state after `WINDOW` tokens."""
    generator = torch.Generator("cuda").manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    channels = SHAPE.segments[1]
    a_log = (0.05 + 0.45 * torch.rand(SHAPE.heads, generator=generator, device="cuda")).log()
    found = [
        0.5 * draw(channels, 4).bfloat16(),
        0.2 * draw(channels).bfloat16(),
        0.5 * draw(SHAPE.heads),
        a_log,
        1 + 0.5 * draw(SHAPE.heads),
        (1 + 0.3 * draw(SHAPE.inner)).bfloat16(),
    ]
    return [tensor.requires_grad_() for tensor in found]


def step(zxbcdt: torch.Tensor, grad: torch.Tensor, shape: SSMShape) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output, and the gradients of zxbcdt and the parameters where the last tokens have `grad`."""
    weights = parameters()
    zxbcdt.requires_grad_()
    y, _ = ssm_scan(zxbcdt, *weights, shape)
    whole = torch.zeros_like(y)
    whole[-WINDOW:] = grad
    return y, list(torch.autograd.grad(y, [zxbcdt, *weights], whole))


def ends_of_the_longest_row(backend: str, length: int) -> dict[str, float]:
    """Relative differences between a call on whole rows and calls on their first and on their last tokens."""
    torch.manual_seed(7)
    shape = replace(SHAPE, backend=backend)
    zxbcdt = torch.randn(length, ROWS, sum(SHAPE.segments), device="cuda", dtype=torch.bfloat16)
    grad = torch.randn(WINDOW, ROWS, SHAPE.inner, device="cuda", dtype=torch.bfloat16)
    head, tail = zxbcdt[:WINDOW].clone(), zxbcdt[-3 * WINDOW :].clone()
    y, gradients = step(zxbcdt, grad, shape)
    with torch.no_grad():
        first, _ = ssm_scan(head, *parameters(), shape)
    last, expected = step(tail, grad, shape)

    def difference(found, wanted):
        return ((found.float() - wanted.float()).norm() / wanted.float().norm()).item()

    names = ["zxbcdt", "conv weight", "conv bias", "dt_bias", "a_log", "d_skip", "norm weight"]
    # what lies before the last tokens' reach has no gradient
    elsewhere = gradients[0][: -3 * WINDOW].flatten().norm(torch.inf).item()
    gradients[0], expected[0] = gradients[0][-2 * WINDOW :], expected[0][-2 * WINDOW :]
    found = {name: difference(*pair) for name, *pair in zip(names, gradients, expected, strict=True)}
    return {
        "first tokens": difference(y[:WINDOW], first),
        "last tokens": difference(y[-WINDOW:], last[-WINDOW:]),
        "gradient elsewhere": elsewhere,
        **found,
    }


@pytest.mark.parametrize("backend", ["mamba_ssm", "triton"])
def test_the_longest_rows_are_right_at_both_ends(backend, rank, report):
    length = longest() if backend == "mamba_ssm" else int(BEYOND * longest())
    try:
        differences = rank(ends_of_the_longest_row, backend, length)
    finally:
        rank(torch.cuda.empty_cache)  # the process serves other tests
    report(test="longest rows", backend=backend, length=length, rows=ROWS, **differences)
    assert differences.pop("gradient elsewhere") < 1e-20
    # the same kernels on the same numbers; atomic additions have no order
    assert max(differences.values()) < 5e-3, differences


def error_beyond(limit: int) -> str:
    """What a scan says that spans more than `limit` elements."""
    offsets.ADDRESSABLE["mamba_ssm"] = limit
    zxbcdt = torch.zeros(257, ROWS, sum(SHAPE.segments), device="cuda", dtype=torch.bfloat16)
    try:
        with torch.no_grad():
            ssm_scan(zxbcdt, *parameters(), SHAPE)
    except ValueError as error:
        return str(error)
    finally:
        offsets.ADDRESSABLE["mamba_ssm"] = REACH
    return ""


def test_longer_rows_are_refused(rank):
    largest = max(offsets.scan_spans(ROWS, 257, SHAPE).values())
    assert rank(error_beyond, largest) == ""
    assert "2 rows of 257 tokens are too long" in rank(error_beyond, largest - 1)
