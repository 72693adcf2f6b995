"""What each of the scan's Triton kernels computes, in fp64 and by dense formulas: the oracle of their tests.

One chunk and one head at a time, every pair of tokens written out. The gradients of C·B, of the states and of the
decays are those that the kernels hand to each other, so each kernel can be held against its own.
"""

from dataclasses import dataclass, fields

import torch


@dataclass
class Inputs:
    """Random inputs of a scan; `x`, `b`, `c` and `dy` are views of wider rows whose memory is sequence first.

    Attributes:
        x: `[b, s, heads, head_dim]`.
        b: `[b, s, groups, d_state]`.
        c: as b.
        dy: as x.
        raw_dt: `[b, s, heads]`, before multiplier, bias and softplus.
        dt_scale: Multiplier of raw_dt.
        dt_bias: `[heads]`, fp32.
        a: `[heads]`, fp32, negative.
        d: `[heads]`, fp32.
        seq_idx: int32 `[b, s]`, or None.
        chunk: Tokens a chunk.
    """

    x: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor
    dy: torch.Tensor
    raw_dt: torch.Tensor
    dt_scale: float
    dt_bias: torch.Tensor
    a: torch.Tensor
    d: torch.Tensor
    seq_idx: torch.Tensor | None
    chunk: int

    def cuda(self) -> "Inputs":
        """The same on the GPU; `terms` takes its many small operations faster on the CPU."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        return Inputs(**{name: v.cuda() if isinstance(v, torch.Tensor) else v for name, v in moved.items()})


def make_inputs(
    *,
    batch=2,
    length=75,
    heads=4,
    head_dim=16,
    groups=1,
    d_state=32,
    chunk=32,
    documents=False,
    dtype=torch.float32,
    device="cpu",
    seed=0,
) -> Inputs:
    """Inputs whose heads, groups and tokens differ in scale, with decays from slow to fast."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    inner, state = heads * head_dim, groups * d_state
    scale = torch.cat([0.5 + torch.rand(inner, generator=generator), 0.2 + torch.rand(2 * state, generator=generator)])
    row = (randn(length, batch, inner + 2 * state) * scale).to(device, dtype).transpose(0, 1)
    x, b, c = row.split([inner, state, state], dim=-1)
    gradient = randn(length, batch, inner + 8) * (0.3 + torch.rand(inner + 8, generator=generator))
    dy = gradient.to(device, dtype).transpose(0, 1)[..., :inner]
    raw_dt = randn(length, batch, heads + 3).to(device, dtype).transpose(0, 1)[..., :heads]
    seq_idx = None
    if documents:
        starts = torch.rand(batch, length, generator=generator) < 0.06
        starts[:, 0] = False
        starts[0, chunk] = True  # one document begins with a chunk, one ends a token before
        starts[0, 2 * chunk - 1] = True
        seq_idx = starts.cumsum(1).to(device, torch.int32)
    heads_shape = (heads, head_dim)
    return Inputs(
        x=x.unflatten(2, heads_shape),
        b=b.unflatten(2, (groups, d_state)),
        c=c.unflatten(2, (groups, d_state)),
        dy=dy.unflatten(2, heads_shape),
        raw_dt=raw_dt,
        dt_scale=0.7,
        dt_bias=(randn(heads) - 1.0).to(device),
        a=-torch.exp(torch.linspace(-2.5, 1.5, heads)).to(device),
        d=randn(heads).to(device),
        seq_idx=seq_idx,
        chunk=chunk,
    )


def terms(inputs: Inputs) -> dict[str, torch.Tensor]:
    """Every tensor that the kernels give, fp64, by the names of `falcon_bridge/ops/ssd/kernels`.

    Chunked per-token tensors are `[b, heads, chunks, chunk]`, padded behind the row's end: dt, gradients with 0,
    log2_decay with its last value.
    """
    device = inputs.x.device
    x, b, c, dy = (t.double() for t in (inputs.x, inputs.b, inputs.c, inputs.dy))
    batch, length, heads, head_dim = x.shape
    groups, d_state = b.shape[2:]
    size = inputs.chunk
    chunks = -(-length // size)
    b, c = (t.repeat_interleave(heads // groups, dim=2) for t in (b, c))
    a, d = inputs.a.double(), inputs.d.double()
    pre = inputs.raw_dt.double() * inputs.dt_scale + inputs.dt_bias.double()
    dt = torch.nn.functional.softplus(pre)
    documents = torch.zeros(batch, length, device=device) if inputs.seq_idx is None else inputs.seq_idx

    def zeros(*shape):
        return torch.zeros(*shape, dtype=torch.float64, device=device)

    per_token = (batch, heads, chunks, size)
    found = {name: zeros(*per_token) for name in ("dt", "log2_decay", "ddt", "pair", "key", "query", "dalpha")}
    found |= {"states": zeros(batch, chunks, heads, head_dim, d_state)}
    found |= {"dstates": zeros(batch, chunks, heads, head_dim, d_state)}
    found |= {"decay_grad": zeros(batch, heads, chunks), "dscores": zeros(batch, chunks, groups, size, size)}
    found |= {"y": zeros(*x.shape), "dx": zeros(*x.shape)}
    db, dc = zeros(*b.shape), zeros(*b.shape)
    for row in range(batch):
        for head in range(heads):
            spans = [slice(k * size, min((k + 1) * size, length)) for k in range(chunks)]
            sums = [torch.cumsum(dt[row, span, head] * a[head], 0) for span in spans]
            docs = [documents[row, span] for span in spans]
            state = zeros(head_dim, d_state)
            for k, (span, s, doc) in enumerate(zip(spans, sums, docs, strict=True)):
                n = len(s)
                xs, bs, cs = x[row, span, head], b[row, span, head], c[row, span, head]
                step = dt[row, span, head]
                found["dt"][row, head, k, :n] = step
                found["log2_decay"][row, head, k] = s[-1] / torch.tensor(2.0).double().log()
                found["log2_decay"][row, head, k, :n] = s / torch.tensor(2.0).double().log()
                found["states"][row, k, head] = state
                enters = doc == documents[row, max(span.start - 1, 0)]
                leaves = doc == doc[-1]
                decays = _decays(s, doc)
                y = ((cs @ bs.T) * decays * step) @ xs + (enters * torch.exp(s))[:, None] * (cs @ state.T)
                found["y"][row, span, head] = y + d[head] * xs
                kept = torch.exp(s[-1]) * (enters & leaves)[-1]
                state = kept * state + (xs * (leaves * torch.exp(s[-1] - s) * step)[:, None]).T @ bs
            dstate = zeros(head_dim, d_state)
            for k in reversed(range(chunks)):
                span, s, doc = spans[k], sums[k], docs[k]
                n, group = len(s), head // (heads // groups)
                xs, bs, cs, dys = x[row, span, head], b[row, span, head], c[row, span, head], dy[row, span, head]
                step, state = dt[row, span, head], found["states"][row, k, head]
                enters = doc == documents[row, max(span.start - 1, 0)]
                leaves = doc == doc[-1]
                decays = _decays(s, doc)
                kept = torch.exp(s[-1]) * (enters & leaves)[-1]
                found["dstates"][row, k, head] = dstate
                found["decay_grad"][row, head, k] = kept * (dstate * state).sum()
                products = dys @ xs.T
                found["dscores"][row, k, group, :n, :n] += products * decays * step
                pairs = (products * decays * step * (cs @ bs.T)).tril(-1)
                found["pair"][row, head, k, :n] = pairs.sum(1) - pairs.sum(0)
                within = ((cs @ bs.T) * decays).T @ dys
                outward = (leaves * torch.exp(s[-1] - s))[:, None] * (bs @ dstate.T)
                found["ddt"][row, head, k, :n] = (xs * (within + outward)).sum(1)
                found["key"][row, head, k, :n] = step * (xs * outward).sum(1)
                found["dx"][row, span, head] = d[head] * dys + step[:, None] * (within + outward)
                inward = (enters * torch.exp(s))[:, None] * (dys @ state)
                found["query"][row, head, k, :n] = (inward * cs).sum(1)
                dc[row, span, head] = inward
                db[row, span, head] = (leaves * torch.exp(s[-1] - s) * step)[:, None] * (xs @ dstate)
                dstate = kept * dstate + (dys * (enters * torch.exp(s))[:, None]).T @ cs
    rows = found["pair"] + found["query"]
    before = found["key"].cumsum(-1) - found["key"]
    dalpha = rows.flip(-1).cumsum(-1).flip(-1) + before + found["decay_grad"][..., None]
    found["dalpha"] = dalpha
    flat = [t.flatten(2)[..., :length].transpose(1, 2) for t in (dalpha, found["ddt"])]
    dpre = (flat[1] + a * flat[0]) * torch.sigmoid(pre)
    found |= {"draw_dt": dpre * inputs.dt_scale, "ddt_bias": dpre.sum((0, 1)), "da": (flat[0] * dt).sum((0, 1))}
    found["dd"] = (x * dy).sum((0, 1, 3))
    dscores = found["dscores"]
    for k in range(chunks):
        span = slice(k * size, min((k + 1) * size, length))
        n = span.stop - span.start
        for group in range(groups):
            first = group * (heads // groups)
            within = dscores[:, k, group, :n, :n]
            dc[:, span, first] += within @ b[:, span, first]
            db[:, span, first] += within.transpose(1, 2) @ c[:, span, first]
    for name, value in (("db", db), ("dc", dc)):
        found[name] = value.unflatten(2, (groups, heads // groups)).sum(3)
    return found


def _decays(sums: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """`exp(sums_i - sums_j)` where j does not come after i and both are of one document, else 0."""
    lower = torch.ones(len(sums), len(sums), device=sums.device).tril().bool()
    lower &= documents[:, None] == documents[None, :]
    return torch.exp((sums[:, None] - sums[None, :]).masked_fill(~lower, -torch.inf))
