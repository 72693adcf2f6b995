"""The floor of a training step, stage by stage, and what a profile says of each stage.

A stage cannot be faster than its FLOPs at the tensor cores' speed, nor than the bytes that our fusion plan reads and
writes at the memory's. Both speeds are measured ones. Bytes are those of the operands of each kernel in the plan, each
read or written once; what stays in the cache between kernels is not taken off. FLOPs are those that the kernels
compute, so they have what is recomputed.

    python -m benchmarks.roofline                                     # the floors
    python -m benchmarks.training_step --size 0.5B --side falcon_bridge --profile --json after.json
    python -m benchmarks.roofline --profile 0.5B=after.json --label after --doc docs/performance.md
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.training_step import BATCH, SHAPES
from falcon_bridge.ops.ssd.backend import default_chunk


BANDWIDTH = 3.0e12
"""Bytes a second that one H100's memory reads and writes."""
TENSOR_CORES = 800e12
"""Dense bf16 FLOPs a second of its fastest GEMMs (docs/benchmarks.md: 807); the step's own reach 780 on average."""
SEQ_LENGTH, ELEMENT = 4096, 2


@dataclass(frozen=True)
class Pass:
    """FLOPs and bytes of a stage in one direction, all its kernels together."""

    flops: float = 0
    bytes: float = 0

    @property
    def seconds(self) -> float:
        """The least that it can take."""
        return max(self.flops / TENSOR_CORES, self.bytes / BANDWIDTH)


@dataclass(frozen=True)
class Stage:
    """A stage of the step.

    Attributes:
        name: of the stage.
        group: the profile's row that it belongs to (`GROUPS`): kernels of different GEMMs have the same names.
        forward, backward: of one layer.
        layers: how many there are.
    """

    name: str
    group: str
    forward: Pass
    backward: Pass
    layers: int

    @property
    def milliseconds(self) -> tuple[float, float]:
        """Floors of forward and backward over all layers."""
        return 1e3 * self.layers * self.forward.seconds, 1e3 * self.layers * self.backward.seconds


GROUPS = {
    "optimizer": r"multi_tensor|adam",
    "attention": r"cudnn|flash|fmha|sdpa",
    "head and loss": r"_row_statistics|_logits_gradient|triton_red_fused_.*(exp|max)|triton_poi_fused_.*(_div_split"
    r"|_mul_unsqueeze_view|index_put_rsub)|log_softmax|nll_loss|cross_entropy",
    "GEMMs": r"gemm|nvjet|cutlass|xmma|cublas|splitKreduce",
    "SSD": r"_chunk_|state_passing|step_decay|_(step|input|group)_gradients|scan_innermost_dim|flip_kernel",
    "conv": r"conv1d",
    "gate and norm of the SSM": r"gated_norm|^_forward_kernel|^_backward_kernel|layer_norm_gated",
    "norms": r"rmsnorm|rms_norm|_layer_norm|LayerNorm",
    "RoPE": r"rope",
    "SwiGLU": r"swiglu",
    "residuals": r"_residual_sum|triton_poi_fused_add|CUDAFunctor_add<c10::BFloat16>",
    "multipliers": r"_scale_columns|AUnaryFunctor<c10::BFloat16",
    "embedding": r"embedding|index_select|compute_grad_weight|sum_and_scatter|indexSelect|_gather_",
    "copies, casts, fills": r"copy|Memcpy|Memset|Fill|CatArray",
}
"""Rows of a profile: the first pattern that a kernel's name matches, without regard to case."""


def stages(size: str) -> list[Stage]:
    """The stages of a step of `SHAPES[size]` on `BATCH[size]` rows of `SEQ_LENGTH` tokens.

    Args:
        size: a key of `SHAPES`.
    """
    shape, tokens = SHAPES[size], BATCH[size] * SEQ_LENGTH
    hidden, ffn, layers = shape["hidden_size"], shape["ffn_hidden_size"], shape["num_layers"]
    query = shape["num_attention_heads"] * shape["kv_channels"]
    key = shape["num_query_groups"] * shape["kv_channels"]
    inner, state = shape["mamba_num_heads"] * shape["mamba_head_dim"], shape["mamba_state_dim"]
    bc = 2 * state
    conv, vocab = inner + bc, -(-shape["vocab_size"] // 128) * 128

    def gemm(name: str, inputs: int, outputs: int) -> Stage:
        return Stage(name, "GEMMs", *_gemm(tokens, inputs, outputs), layers)

    def elementwise(name: str, group: str, forward: float, backward: float, times: int = layers) -> Stage:
        """A stage that is bound by memory; its elements a token."""
        return Stage(name, group, *(Pass(bytes=n * tokens * ELEMENT) for n in (forward, backward)), times)

    # backward: the gradients of its output and of the residual, which is added in the same kernel
    norm = {"forward": 2 * hidden, "backward": 4 * hidden}
    causal = 4 * tokens * SEQ_LENGTH / 2 * query
    return [
        elementwise("embedding", "embedding", 2 * hidden, 2 * hidden, 1),
        elementwise("norm before the mixer", "norms", **norm),
        gemm("qkv GEMM", hidden, query + 2 * key),
        # q and k, and v's scale
        elementwise("RoPE", "RoPE", 2 * (query + 2 * key), 2 * (query + 2 * key)),
        Stage(
            "attention, causal",
            "attention",
            Pass(causal, tokens * (2 * query + 2 * key) * ELEMENT),
            Pass(2.5 * causal, tokens * (4 * query + 4 * key) * ELEMENT),
            layers,
        ),
        gemm("attention's output GEMM", query, hidden),
        gemm("in_proj GEMM", hidden, inner + conv + shape["mamba_num_heads"]),
        # its backward computes the convolution again
        elementwise("conv, SiLU", "conv", 2 * conv, 5 * conv),
        Stage("SSD", "SSD", *_ssd(tokens, inner, state), layers),
        elementwise("gate (and norm)", "gate and norm of the SSM", 3 * inner, 5 * inner),
        gemm("out_proj GEMM", inner, hidden),
        # forward: both branches' outputs; backward: their inputs' gradients
        elementwise("residual behind the mixer", "residuals", 4 * hidden, 3 * hidden),
        elementwise("norm before the MLP", "norms", **norm),
        gemm("fc1 GEMM", hidden, 2 * ffn),
        elementwise("SwiGLU", "SwiGLU", 3 * ffn, 5 * ffn),
        gemm("fc2 GEMM", ffn, hidden),
        elementwise("residual behind the MLP", "residuals", 3 * hidden, 0),
        elementwise("final norm", "norms", **norm, times=1),
        *_head(tokens, hidden, vocab),
        Stage("AdamW", "optimizer", Pass(), Pass(bytes=14 * parameters(size)), 1),
    ]


def _gemm(tokens: int, inputs: int, outputs: int) -> tuple[Pass, Pass]:
    flops = 2 * tokens * inputs * outputs
    operands = (tokens * (inputs + outputs) + inputs * outputs) * ELEMENT
    return Pass(flops, operands), Pass(2 * flops, 2 * operands)


def _ssd(tokens: int, inner: int, state: int) -> tuple[Pass, Pass]:
    """`ops.ssd.kernels`, one group: forward, and the backward that computes states and C·B again."""
    chunk = default_chunk(ELEMENT)
    products = {
        "state": 2 * tokens * inner * state,  # of a chunk: into its state, out of it, and the gradients of both
        "local": tokens * inner * chunk,  # half a chunk's square, times x or its gradient
        "scores": 2 * tokens * state * chunk,  # C·B
    }
    forward = 2 * products["state"] + products["local"] + products["scores"]
    # states again; gradients of states, x, B and C, and what the entering states' outputs tell about decays; x's
    # products and their gradients; C·B again, and from its gradient to B and C
    backward = 6 * products["state"] + 2 * products["local"] + 3 * products["scores"]
    states = inner * state / chunk
    # elements a token: x (2 reads) and y; B (2 reads) and C; states, written and read
    read_write = 3 * inner + 3 * state + 2 * states
    # x and the gradient of y (3 reads each), and x's gradient; B and C (7 reads, 2 writes); states and their gradients
    # (2 writes, 4 reads); the fp32 gradient of C·B (a write, 2 reads)
    again = 7 * inner + 9 * state + 6 * states + 6 * chunk
    return Pass(forward, tokens * read_write * ELEMENT), Pass(backward, tokens * again * ELEMENT)


def _head(tokens: int, hidden: int, vocab: int) -> list[Stage]:
    """`ops.linear_cross_entropy`: the logits of a chunk of tokens at a time, computed again in the backward pass."""
    from falcon_bridge.ops.linear_cross_entropy import default_chunk_tokens

    forward, backward = _gemm(tokens, hidden, vocab)
    chunk = default_chunk_tokens(tokens, vocab, ELEMENT)
    # the backward pass starts with the forward's last chunk; the weight's gradient is added up in fp32
    again = (tokens - chunk) / tokens
    sums = 8 * hidden * vocab * -(-tokens // chunk)
    products = Pass(backward.flops + again * forward.flops, backward.bytes + again * forward.bytes + sums)
    logits = tokens * vocab * ELEMENT
    return [
        Stage("head GEMM", "GEMMs", forward, products, 1),
        Stage("cross entropy", "head and loss", Pass(bytes=logits), Pass(bytes=2 * logits), 1),
    ]


def parameters(size: str) -> int:
    """Parameters of a shape, its vocabulary padded to a multiple of 128; one group, no gated norm."""
    shape = SHAPES[size]
    hidden, vocab = shape["hidden_size"], -(-shape["vocab_size"] // 128) * 128
    query = shape["num_attention_heads"] * shape["kv_channels"]
    key = shape["num_query_groups"] * shape["kv_channels"]
    heads = shape["mamba_num_heads"]
    inner, bc = heads * shape["mamba_head_dim"], 2 * shape["mamba_state_dim"]
    weights = hidden * (2 * query + 2 * key + 3 * inner + bc + heads + 3 * shape["ffn_hidden_size"] + 2)
    # a convolution of 4 taps with bias; A_log, D and dt_bias
    return shape["num_layers"] * (weights + 5 * (inner + bc) + 3 * heads) + 2 * vocab * hidden + hidden


def floor_table(size: str) -> str:
    """Stages with FLOPs, bytes and floors of all layers, as Markdown."""
    lines = [
        "| stage | forward GFLOP | GB | floor ms | backward GFLOP | GB | floor ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    totals = [0.0] * 6
    for stage in stages(size):
        cells = []
        for side, floor in zip((stage.forward, stage.backward), stage.milliseconds, strict=True):
            cells += [stage.layers * side.flops / 1e9, stage.layers * side.bytes / 1e9, floor]
        totals = [total + cell for total, cell in zip(totals, cells, strict=True)]
        lines.append(f"| {stage.name} | {_cells(cells)} |")
    lines.append(f"| all | {_cells(totals)} |")
    step = totals[2] + totals[5]
    rate = BATCH[size] * SEQ_LENGTH / step * 1e3
    lines += ["", f"Floor of the step: {step:.1f} ms, {rate:,.0f} tokens/s."]
    return "\n".join(lines)


def _cells(values: list[float]) -> str:
    return " | ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" for value in values)


def measured(kernels: dict) -> dict[str, tuple[float, int]]:
    """Milliseconds and launches by group of a profile; what its list of kernels leaves out is "not listed".

    Args:
        kernels: of `training_step --profile`.
    """
    found: dict[str, tuple[float, int]] = {}
    for milliseconds, launches, name in kernels["top"]:
        group = next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.I)), "other kernels")
        total = found.get(group, (0.0, 0))
        found[group] = (total[0] + milliseconds, total[1] + launches)
    whole = [sum(column) for column in zip(*kernels["by_category_ms_launches"].values(), strict=True)]
    listed = [sum(column) for column in zip(*found.values(), strict=True)]
    found["not listed"] = (max(0.0, whole[0] - listed[0]), whole[1] - listed[1])
    return found


def profile_table(size: str, kernels: dict) -> str:
    """Floor, measured time and gap by group, largest gap first, as Markdown."""
    floors: dict[str, float] = {}
    for stage in stages(size):
        floors[stage.group] = floors.get(stage.group, 0.0) + sum(stage.milliseconds)
    found = measured(kernels)
    rows = [(group, floors.get(group, 0.0), *found.get(group, (0.0, 0))) for group in {**floors, **found}]
    lines = ["| stage | floor ms | measured ms | gap ms | of the floor | launches |", "|---|--:|--:|--:|--:|--:|"]
    for group, floor, milliseconds, launches in sorted(rows, key=lambda row: row[1] - row[2]):
        of_floor = f"{milliseconds / floor:.1f}×" if floor else ""
        cells = f"{floor:.1f} | {milliseconds:.1f} | {milliseconds - floor:.1f} | {of_floor} | {launches}"
        lines.append(f"| {group} | {cells} |")
    floor, milliseconds, launches = (sum(row[column] for row in rows) for column in (1, 2, 3))
    cells = f"{floor:.1f} | {milliseconds:.1f} | {milliseconds - floor:.1f} | {milliseconds / floor:.1f}× | {launches}"
    return "\n".join([*lines, f"| GPU busy | {cells} |"])


def read_profile(path: Path, size: str, side: str) -> dict:
    """The kernels of a side: of what ``training_step --profile --json`` writes, or of one entry's `kernels`."""
    content = json.loads(path.read_text())
    if isinstance(content, dict):
        return content
    for result in content:
        if result.get("size") == size and result.get("side") == side and "kernels" in result:
            return result["kernels"]
    raise SystemExit(f"{path} has no profile of {size}, {side}: run training_step with --profile --json")


def write_block(document: Path, name: str, text: str) -> None:
    """Replace what stands between a document's markers of that name.

    Raises:
        SystemExit: If the document has no such markers.
    """
    content = document.read_text()
    begin, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
    if begin not in content or end not in content:
        raise SystemExit(f"{document} has no lines `{begin.strip()}` and `{end}` to write between")
    before, _, rest = content.partition(begin)
    document.write_text(f"{before}{begin}\n{text}\n\n{rest[rest.index(end) :]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", choices=list(SHAPES))
    parser.add_argument("--profile", action="append", default=[], help="SIZE=JSON of training_step; repeatable")
    parser.add_argument("--side", default="falcon_bridge", help="whose profile, where the JSON has several")
    parser.add_argument("--label", default="before", help="of the profiles: names the document's block")
    parser.add_argument("--doc", type=Path, help="Markdown document whose blocks to fill")
    arguments = parser.parse_args()
    blocks = {f"floor {size}": floor_table(size) for size in arguments.size or SHAPES}
    for entry in arguments.profile:
        size, path = entry.split("=", 1)
        blocks[f"profile {arguments.label} {size}"] = profile_table(
            size, read_profile(Path(path), size, arguments.side)
        )
    for name, text in blocks.items():
        if arguments.doc:
            write_block(arguments.doc, name, text)
        else:
            print(f"\n{name}\n\n{text}")


if __name__ == "__main__":
    main()
