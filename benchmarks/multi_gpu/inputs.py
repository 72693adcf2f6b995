"""Random checkpoints and batches that the parts compare on."""

from pathlib import Path

import torch.distributed as dist

from falcon_bridge.verification.batch import Batch, random_batch
from falcon_bridge.verification.checkpoints import write_random_checkpoint


# heads of 32, state and chunk of 64: the only shape that mamba-ssm's kernels compile for here
KERNEL_SHAPE = {"mamba_n_heads": 8, "mamba_d_ssm": 256, "mamba_d_state": 64, "mamba_chunk_size": 64}
CHECKPOINTS = {
    "one group": ("gated_norm", {"num_hidden_layers": 4, "intermediate_size": 96, **KERNEL_SHAPE}),
    "two groups, tied": (
        "groups2_gated_norm",
        {"num_hidden_layers": 4, "intermediate_size": 96, "tie_word_embeddings": True, **KERNEL_SHAPE},
    ),
}
# multiples of 2·cp, of which Transformer Engine cuts each; two cross a border of chunks
DOCUMENTS = (72, 4, 20, 64)
# for heads that are split over context-parallel ranks
ODD_DOCUMENTS = (73, 2, 19, 66)
ROWS = 4


def ensure_checkpoint(path: Path) -> Path:
    """Write the random checkpoint of `CHECKPOINTS` that `path` is named after, if it is not there; collective."""
    if dist.get_rank() == 0 and not path.exists():
        name, overrides = CHECKPOINTS[path.name.replace("_", " ")]
        write_random_checkpoint(path.with_suffix(".tmp"), name, seed=3, **overrides).rename(path)
    dist.barrier()
    return path


def a_batch(path: Path, documents: tuple[int, ...] | None) -> Batch:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path)
    rows = random_batch(config, batch_size=ROWS, seq_length=sum(DOCUMENTS), seed=4)
    return Batch(rows.tokens, documents)
