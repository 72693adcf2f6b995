"""The SSD scan by mamba-ssm's kernels, with the interface of `ops.ssd.kernels.scan`."""

import torch

from falcon_bridge.ops.tuning.shipped import use_shipped_tuning


def scan_forward(
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    chunk: int,
) -> torch.Tensor:
    """`kernels.scan.scan_forward`; the chunk is the kernels' own.

    Raises:
        ImportError: Without mamba-ssm.
    """
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_fwd

    use_shipped_tuning()
    return _mamba_chunk_scan_combined_fwd(
        x, raw_dt * dt_scale, a, b, c, chunk, D=d, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True
    )[0]


def scan_backward(
    dy: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    raw_dt: torch.Tensor,
    dt_scale: float,
    dt_bias: torch.Tensor,
    a: torch.Tensor,
    d: torch.Tensor,
    seq_idx: torch.Tensor | None,
    chunk: int,
    *,
    dx: torch.Tensor,
    db: torch.Tensor,
    dc: torch.Tensor,
    draw_dt: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`kernels.scan.scan_backward`."""
    from mamba_ssm.ops.triton.ssd_combined import _mamba_chunk_scan_combined_bwd

    # in a tensor of its own: as a view of in_proj's gradient it would span most 32-bit offsets (ops/ssd/offsets.py)
    ddt = torch.empty(raw_dt.shape, dtype=raw_dt.dtype, device=raw_dt.device)
    _, _, da, _, _, dd, _, ddt_bias, _ = _mamba_chunk_scan_combined_bwd(
        dy, x, raw_dt * dt_scale, a, b, c, y, chunk,
        D=d, dt_bias=dt_bias, seq_idx=seq_idx, dt_softplus=True, dx=dx, ddt=ddt, dB=db, dC=dc,
    )  # fmt: skip
    torch.mul(ddt, dt_scale, out=draw_dt)
    return da, ddt_bias, dd
