"""A block of whole chunks of the SSD algorithm (arXiv 2405.21060 §6), forward and backward.

Letters in shapes: b batch, k chunks in the block, q tokens in a chunk, g groups, r heads in a group, p head size,
n state size. "Token-major" tensors are ``[b, k, g, q, r·p]``: a group's heads side by side, so that products with B, C
and the states need no expansion from groups to heads. "Head-major" ones are ``[b, k, g, r, q, ·]``.
"""

import math
from typing import NamedTuple

import torch


# Elements of a block's decay matrices [b, k, h, q, q] or states [b, k, h, p, n], whichever are more: few enough to
# stay in a core's cache, enough to hide the cost of dispatching an operator. Found with benchmarks/ssd_cpu.py sweep.
_BLOCK_ELEMENTS = 1 << 18


class BlockSpan(NamedTuple):
    """Tokens ``start`` to ``stop`` of a sequence, cut into chunks of ``chunk`` tokens."""

    start: int
    stop: int
    chunk: int


def block_spans(x: torch.Tensor, state_size: int, chunk_size: int) -> list[BlockSpan]:
    """Cut x's length into blocks of whole chunks, then one shorter chunk for what is left."""
    b, length, h, p = x.shape
    whole = length - length % chunk_size
    step = max(1, _BLOCK_ELEMENTS // (b * h * max(chunk_size**2, p * state_size))) * chunk_size
    spans = [BlockSpan(start, min(start + step, whole), chunk_size) for start in range(0, whole, step)]
    if whole < length:
        spans.append(BlockSpan(whole, length, length - whole))
    return spans


class BlockGradients(NamedTuple):
    """Gradients of one block: x, dt, B, C as in the public function, A and D ``[h]``, state ``[b, g, n, r·p]``."""

    x: torch.Tensor
    dt: torch.Tensor
    B: torch.Tensor
    C: torch.Tensor
    A: torch.Tensor
    D: torch.Tensor | None
    state: torch.Tensor


class SSDBlock:
    """One block: inputs cast to the accumulation dtype, its decays, and the products that forward and backward share.

    Args:
        span: which tokens.
        x: ``[b, l, h, p]``, the whole sequence, as are dt and B.
        dt: ``[b, l, h]``.
        A: ``[h]``.
        B: ``[b, l, g, n]``.
        documents: non-decreasing int64 ``[b, l]`` or None for one document.
        dtype: accumulation dtype.
    """

    def __init__(self, span, x, dt, A, B, documents, dtype):
        self.span, self.dtype = span, dtype
        self.groups = B.shape[2]
        self.head_dim = x.shape[3]
        self.A = A.double().view(self.groups, 1, -1)
        self.x = self._token_major(x)
        self.B = self._token_major(B)
        self.dt = self._token_major(dt[..., None])

        # [b, k, g, q, r]; float64 since the differences of large sums are what counts
        self.cumulated = (self.dt.double() * self.A).cumsum(3)
        total = self.cumulated[..., -1:, :]
        from_entry, to_end, across = (
            self._exp_(log_decays.to(dtype, copy=True))
            for log_decays in (self.cumulated, total - self.cumulated, total)
        )
        self.documents = None
        if documents is not None:
            self.documents = documents[:, span.start : span.stop].unflatten(1, (-1, span.chunk))
            # the state entering a chunk is of the token before it, the initial state of the first token
            entries = torch.arange(span.start, span.stop, span.chunk, device=documents.device)
            before = documents[:, (entries - 1).clamp_(min=0)]
            last = self.documents[..., -1:]
            from_entry = from_entry * (self.documents == before[..., None])[:, :, None, :, None]
            to_end = to_end * (self.documents == last)[:, :, None, :, None]
            across = across * (last == before[..., None])[:, :, None, :, None]
        # decay from the chunk's entry to a token, from a token to the chunk's end (both [b, k, g, q, r, 1]), and
        # across the chunk ([b, k, g, 1, r, 1]); zero where another document begins in between
        self.from_entry, self.to_end, self.across = (w[..., None] for w in (from_entry, to_end, across))

    def _token_major(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rows of ``[b, l, h or g, ·]`` as ``[b, k, g, q, r·]`` (n for B and C) in the accumulation dtype."""
        rows = tensor[:, self.span.start : self.span.stop].to(self.dtype)
        return rows.unflatten(1, (-1, self.span.chunk)).unflatten(3, (self.groups, -1)).flatten(4).transpose(2, 3)

    def _public(self, tensor: torch.Tensor, *trailing: int) -> torch.Tensor:
        """``[b, k, g, q, ·]`` as ``[b, rows, *trailing]``, where one size may be -1."""
        return tensor.transpose(2, 3).reshape(tensor.shape[0], self.span.stop - self.span.start, *trailing)

    def _by_head(self, token_major: torch.Tensor) -> torch.Tensor:
        """``[b, k, g, q, r·p]`` as ``[b, k, g, q, r, p]``."""
        return token_major.unflatten(4, (-1, self.head_dim))

    def _head_major(self, token_major: torch.Tensor) -> torch.Tensor:
        """``[b, k, g, q, r·p]`` as contiguous ``[b, k, g, r, q, p]``."""
        return self._by_head(token_major).transpose(3, 4).contiguous()

    def _decay_matrix(self) -> torch.Tensor:
        """``exp(sum of dt·A over s < i ≤ t)`` at ``[..., t, s]``, zero where s > t or s is of another document.

        ``[b, k, g, r, q, q]``, the 1-semiseparable mask L of the paper.
        """
        q = self.span.chunk
        visible = torch.ones(q, q, dtype=torch.bool, device=self.x.device).tril()
        if self.documents is not None:
            visible = visible & (self.documents[..., :, None] == self.documents[..., None, :])[:, :, None, None]
        masked = torch.zeros(visible.shape, dtype=self.dtype, device=self.x.device).masked_fill_(~visible, -torch.inf)
        cumulated = self.cumulated.transpose(3, 4)
        sums = (cumulated[..., :, None] - cumulated[..., None, :]).to(self.dtype)
        # masked before the exponential: above the diagonal the sums are large and positive
        return self._exp_(sums.add_(masked))

    def _exp_(self, log_decays: torch.Tensor) -> torch.Tensor:
        """Exponential in place, where what is within e⁸ of the dtype's smallest normal number becomes exactly zero.

        Subnormal factors would make the matrix products up to four times slower, for parts of the result far below its
        rounding: a token's own part has the factor 1.
        """
        floor = math.log(torch.finfo(self.dtype).tiny) + 8
        return torch.nn.functional.threshold_(log_decays, floor, -torch.inf).exp_()

    def scan_states(self, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Carry the state through the block's chunks.

        Args:
            state: ``[b, g, n, r·p]``, before the block.

        Returns:
            The states entering each chunk ``[b, k, g, n, r·p]``, and the state after the block ``[b, g, n, r·p]``.
        """
        weighted = (self._by_head(self.x) * (self.dt[..., None] * self.to_end)).flatten(4)
        added = self.B.transpose(3, 4) @ weighted
        entering = torch.empty_like(added)
        across = self._across_states()
        for chunk in range(added.shape[1]):
            entering[:, chunk] = state
            state = torch.addcmul(added[:, chunk], state, across[:, chunk])
        return entering, state

    def _across_states(self) -> torch.Tensor:
        """The decay across each chunk, per column of a state: ``[b, k, g, 1, r·p]``."""
        return self.across.expand(*self.across.shape[:-1], self.head_dim).flatten(4)

    def outputs(self, C: torch.Tensor, D: torch.Tensor | None, entering: torch.Tensor) -> torch.Tensor:
        """Outputs ``[b, rows, h, p]`` in the accumulation dtype, from the states entering each chunk."""
        C = self._token_major(C)
        y = self._by_head(C @ entering).mul_(self.from_entry)
        weights = self._decay_matrix().mul_((C @ self.B.transpose(3, 4)).unsqueeze(3))
        inputs = self._head_major((self._by_head(self.x) * self.dt[..., None]).flatten(4))
        y.add_((weights @ inputs).transpose(3, 4))
        if D is not None:
            y.addcmul_(self._by_head(self.x), self._skip(D))
        return self._public(y.flatten(4), -1, self.head_dim)

    def _skip(self, D: torch.Tensor) -> torch.Tensor:
        return D.to(self.dtype).view(self.groups, 1, -1, 1)

    def gradients(self, C, D, entering, dy, dstate) -> BlockGradients:
        """Backward of the block.

        Args:
            C: ``[b, l, g, n]``.
            D: ``[h]`` or None.
            entering: ``[b, k, g, n, r·p]`` as scan_states returned it.
            dy: ``[b, l, h, p]``.
            dstate: ``[b, g, n, r·p]``, gradient of the state after the block.
        """
        C, dy = self._token_major(C), self._token_major(dy)
        x, dy_heads = self._by_head(self.x), self._by_head(dy)

        # through y = from_entry · C S
        dy_entry = (dy_heads * self.from_entry).flatten(4)
        dC = dy_entry @ entering.transpose(3, 4)
        log_entry = (self._by_head(dy_entry) * self._by_head(C @ entering)).sum(-1)
        dentering = C.transpose(3, 4) @ dy_entry

        # through the recurrence from chunk to chunk
        dleaving = torch.empty_like(dentering)
        across = self._across_states()
        for chunk in reversed(range(dentering.shape[1])):
            dleaving[:, chunk] = dstate
            dstate = torch.addcmul(dentering[:, chunk], dstate, across[:, chunk])
        log_across = (dleaving * entering).sum(3, keepdim=True).mul_(across)
        log_across = self._by_head(log_across).sum(-1)

        # through S = Σ to_end · B ⊗ dt x
        scaled = x * self.dt[..., None]
        dB = (scaled * self.to_end).flatten(4) @ dleaving.transpose(3, 4)
        dscaled = self._by_head(self.B @ dleaving).mul_(self.to_end)
        log_end = (scaled * dscaled).sum(-1)

        # through y = (L ∘ C Bᵀ) dt x inside each chunk
        dy_major, scaled_major = self._head_major(dy), self._head_major(scaled.flatten(4))
        decay = self._decay_matrix()
        scores = (C @ self.B.transpose(3, 4)).unsqueeze(3)
        dweights = (dy_major @ scaled_major.transpose(4, 5)).mul_(decay)
        dscores = dweights.sum(3)
        dC += dscores @ self.B
        dB += dscores.transpose(3, 4) @ C
        dscaled += (decay.mul_(scores).transpose(4, 5) @ dy_major).transpose(3, 4)

        dlog = self._dlog_decay(dweights.mul_(scores), log_entry, log_end, log_across)
        ddt = (x * dscaled).sum(-1) + (dlog * self.A).to(self.dtype)
        dx = dscaled.mul_(self.dt[..., None])
        dD = None
        if D is not None:
            dD = (x * dy_heads).sum((0, 1, 3, 5)).flatten()
            dx.addcmul_(dy_heads, self._skip(D))
        return BlockGradients(
            x=self._public(dx.flatten(4), -1, self.head_dim),
            dt=self._public(ddt, -1),
            B=self._public(dB, self.groups, -1),
            C=self._public(dC, self.groups, -1),
            A=(dlog * self.dt).sum((0, 1, 3)).flatten(),
            D=dD,
            state=dstate,
        )

    def _dlog_decay(self, pairs, log_entry, log_end, log_across) -> torch.Tensor:
        """Gradient of the log-decay ``dt·A`` of every token, float64 ``[b, k, g, q, r]``.

        A token's decay acts on what passes it: pairs (t, s) with s before it and t at or after it, the entering state
        on its way to later outputs, earlier inputs on their way to the chunk's end, and the entering state on its way
        to the chunk's end.

        Args:
            pairs: ``[b, k, g, r, q, q]``, gradient of the logarithm of each entry ``[t, s]`` of the chunk's matrix.
            log_entry: ``[b, k, g, q, r]``, the same for the entering state's part in output t.
            log_end: ``[b, k, g, q, r]``, the same for input s's part in the leaving state.
            log_across: ``[b, k, g, 1, r]``, the same for the entering state's part in the leaving one.
        """
        # an entry on the diagonal has no decay; left in, it would only cancel up to rounding
        pairs.diagonal(dim1=-2, dim2=-1).zero_()
        pairs = pairs.double()
        at_or_after = (pairs.sum(-1) - pairs.sum(-2)).transpose(3, 4) + log_entry
        dlog = at_or_after.flip(3).cumsum(3).flip(3) + log_across
        # without the token itself, whose undecayed part would drown the decayed parts before it
        dlog[..., 1:, :] += log_end[..., :-1, :].double().cumsum(3)
        return dlog
