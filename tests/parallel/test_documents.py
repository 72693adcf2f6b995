"""Documents of pretraining rows kept apart: the same losses under every layout, from the same weights."""

import numpy as np
import pytest

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.ranks import run_ranks
from falcon_bridge.training.callbacks import EvalReport, StepReporter
from falcon_bridge.training.dataset import check_dataset, use_dataset
from falcon_bridge.training.documents import separate_documents
from falcon_bridge.training.recipe import apply_overrides, load_recipe, use_hf_model
from falcon_bridge.training.run import preload
from falcon_bridge.verification.checkpoints import write_random_checkpoint


LAYOUTS = {
    "micro batches of 4": (1, ["train.micro_batch_size=4"]),
    # a middle stage has neither tokens nor labels, and needs the borders
    "PP 3": (3, ["train.micro_batch_size=1", "model.pipeline_model_parallel_size=3"]),
    # heads of both branches are split over the ranks, and two rows are cut as one
    "CP 2": (
        2,
        ["train.micro_batch_size=2", "model.context_parallel_size=2", "model.cp_comm_type=a2a"],
    ),
    "TP 2, SP": (
        2,
        ["train.micro_batch_size=2", "model.tensor_model_parallel_size=2", "model.sequence_parallel=true"],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint of three layers, and documents of all lengths up to twice a row."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    preload()
    import falcon_bridge.training.forward_step  # noqa: F401  before the ranks are forked

    directory = tmp_path_factory.mktemp("documents")
    hf = write_random_checkpoint(directory / "hf", "mqa_gated_norm", seed=3)
    generator = np.random.default_rng(4)
    builder = IndexedDatasetBuilder(f"{directory}/data.bin", dtype=np.uint16)
    for length in generator.permutation(np.arange(1, 65)):
        builder.add_document(generator.integers(131, size=length), [length])
    builder.finalize(f"{directory}/data.idx")
    return hf, directory / "data"


def pretrain_on_rank(cfg):
    from megatron.bridge.training.pretrain import pretrain

    from falcon_bridge.training.forward_step import forward_step

    with cpu_runtime():
        pretrain(cfg, forward_step, callbacks=[StepReporter()])


def training(files, ranks, overrides, *, apart=True):
    """The losses of two steps, and the FLOPs that the second reports: those counted in the first."""
    hf, data = files
    cfg = load_recipe("falcon_h1_tiny_cpu_pretrain_config")
    use_hf_model(cfg, hf)
    use_dataset(cfg, data)
    separate_documents(cfg, apart)
    cfg.checkpoint.save = cfg.checkpoint.load = None
    lengths = ["dataset.seq_length=32", "train.train_iters=2", "train.global_batch_size=4", "validation.eval_iters=0"]
    apply_overrides(cfg, [*lengths, "scheduler.lr_warmup_iters=0", "optimizer.lr=1e-2", *overrides])
    check_dataset(cfg)
    found = []

    def keep(rank, event):
        if not isinstance(event, EvalReport) and event.loss is not None:
            found.append((event.iteration, event.loss, event.flops))

    run_ranks(pretrain_on_rank, ranks, cfg, on_event=keep)
    found = sorted(set(found))
    return [loss for _, loss, _ in found], found[-1][2]


def test_every_layout_keeps_documents_apart(files):
    expected, flops = training(files, 1, ["train.micro_batch_size=1"])
    streams, flops_of_streams = training(files, 1, ["train.micro_batch_size=1"], apart=False)
    assert len(expected) == 2
    assert abs(expected[0] - streams[0]) > 1e-3 and flops < flops_of_streams
    for name, (ranks, overrides) in LAYOUTS.items():
        found, counted = training(files, ranks, overrides)
        assert found[:: len(found) // 2] == pytest.approx(expected, abs=2e-5), name
        # Bridge counts documents where the tokens are, which the last stage of a pipeline has not
        assert counted == (flops_of_streams if name == "PP 3" else flops), name
