import json
import random
import sys
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from transformers import AutoTokenizer

from falcon_bridge.bitnet import quantization_strength
from falcon_bridge.bitnet.schedule import TwoStageSchedulerConfig, two_stage_decay
from falcon_bridge.data.prepare_chat import prepare_chat
from falcon_bridge.demo.text import python_reference, train_tokenizer, write_indexed_dataset
from falcon_bridge.ranks import emit, run_ranks
from falcon_bridge.recipes import falcon_edge
from falcon_bridge.training.dataset import check_dataset, use_dataset
from falcon_bridge.training.memory import GPU_MEMORY, RESERVE, estimate_memory
from falcon_bridge.training.recipe import use_hf_model
from falcon_bridge.training.run import preload, run_pretrain
from falcon_bridge.verification.edge_checkpoints import write_random_edge_checkpoint
from falcon_bridge.verification.reference_bitnet import load_bitnet_llama
from tests.unit.peft.conftest import TEMPLATE, Chats


RECIPES = [name for name in vars(falcon_edge) if name.endswith("_config")]
SIZES = {"1b": 1_719_764_992, "3b": 3_053_586_432}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_a_ternary_model_with_consistent_settings(name):
    function = getattr(falcon_edge, name)
    cfg = function()
    assert function.__doc__ and cfg.model is not function().model
    cfg.model.finalize()
    assert cfg.model.use_bitnet and cfg.model.bitnet_backend == "auto"
    assert cfg.model.seq_length == cfg.dataset.seq_length <= (cfg.model.max_position_embeddings or 10**9)
    assert cfg.optimizer.weight_decay == cfg.scheduler.start_weight_decay == cfg.scheduler.end_weight_decay
    assert cfg.optimizer.weight_decay == (0.0 if "sft" in name else 0.1)
    assert (cfg.optimizer.adam_beta1, cfg.optimizer.adam_beta2, cfg.optimizer.clip_grad) == (0.9, 0.95, 1.0)
    assert cfg.scheduler.lr_decay_iters == cfg.train.train_iters
    assert cfg.train.global_batch_size % cfg.train.micro_batch_size == 0
    two_stage = isinstance(cfg.scheduler, TwoStageSchedulerConfig)
    assert two_stage == ("two_stage" in name)
    assert cfg.scheduler.lr_decay_style == ("linear" if two_stage else "WSD")
    cfg.scheduler.finalize()


@pytest.mark.parametrize("size", SIZES)
def test_the_published_recipes(size):
    """BitNet's FAQ, 1.3B and 3B: learning rates, batches of 1M tokens, warm-up."""
    wsd = getattr(falcon_edge, f"falcon_edge_{size}_pretrain_config")()
    two_stage = getattr(falcon_edge, f"falcon_edge_{size}_two_stage_pretrain_config")()
    for cfg in (wsd, two_stage):
        assert cfg.optimizer.lr == 1.2e-3
        assert cfg.train.global_batch_size * cfg.model.seq_length == 2**20
        assert cfg.scheduler.lr_warmup_iters == 375
    assert two_stage.scheduler.second_stage_lr == {"1b": 8e-4, "3b": 6.4e-4}[size]
    sft = getattr(falcon_edge, f"falcon_edge_{size}_sft_config")()
    assert (sft.optimizer.lr, sft.train.global_batch_size) == (1e-4, 16)


@pytest.mark.parametrize(
    ("name", "gpus"),
    [(name, 8 if "_3b_" in name else 1) for name in RECIPES if "tiny" not in name],
)
def test_fits_80_gb_at_the_stated_number_of_gpus(name, gpus):
    cfg = getattr(falcon_edge, name)()
    cfg.model.finalize()
    assert max(stage.peak for stage in estimate_memory(cfg, gpus)) < GPU_MEMORY - RESERVE


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A directory with a tokenizer and an indexed dataset of real text."""
    directory = tmp_path_factory.mktemp("text")
    preload()
    documents = python_reference().train[:80]
    tokenizer = train_tokenizer(documents, 600, directory / "tokenizer", 1024)
    write_indexed_dataset(documents, tokenizer, directory / "train")
    return directory


def configuration(text, save, *, resume_at=None):
    """16 steps in two stages, of which the first 6 warm the quantisation up, with a checkpoint in the middle."""
    cfg = falcon_edge.falcon_edge_tiny_cpu_pretrain_config()
    two_stage_decay(cfg, 4e-3, 2e-3, warmup=2, steps=16)
    cfg.model.bitnet_warmup_steps = 6
    cfg.model.num_layers, cfg.model.vocab_size = 2, 600
    cfg.model.seq_length = cfg.dataset.seq_length = 64
    cfg.tokenizer.tokenizer_type, cfg.tokenizer.tokenizer_model = "HuggingFaceTokenizer", str(text / "tokenizer")
    cfg.tokenizer.vocab_size = None
    cfg.dataset.blend = [[str(text / "train")], None]
    cfg.dataset.path_to_cache = str(text / "cache")
    cfg.validation.eval_interval, cfg.validation.eval_iters = 4, 1
    cfg.checkpoint.save = cfg.checkpoint.load = str(save)
    cfg.checkpoint.save_interval, cfg.checkpoint.ckpt_step = (4 if resume_at is None else None), resume_at
    cfg.logger.tensorboard_dir = str(text / f"tensorboard_{resume_at}")
    return cfg


def train_on_a_rank(cfg):
    from megatron.bridge.training.callbacks import Callback
    from megatron.bridge.training.pretrain import pretrain

    from falcon_bridge.bitnet.callbacks import bitnet_callbacks
    from falcon_bridge.compat import cpu_runtime
    from falcon_bridge.training.forward_step import forward_step

    class Report(Callback):
        def on_train_step_start(self, context):
            (group, *_) = [group for group in context.optimizer.param_groups if group["wd_mult"]]
            self.values = quantization_strength(), float(group["lr"]), group["weight_decay"]

        def on_train_step_end(self, context):
            emit((context.state.train_state.step, float(context.loss_dict["lm loss"]), *self.values))

        def on_eval_step_start(self, context):
            emit(quantization_strength())

    with cpu_runtime():
        # the strength is set by the callback before it
        pretrain(cfg, forward_step, callbacks=[*bitnet_callbacks(cfg), Report()])


def train(cfg):
    """What each step reported, and the strengths of the validations."""
    steps, validations = [], []

    def on_event(rank, event):
        (steps if isinstance(event, tuple) else validations).append(event)

    run_ranks(train_on_a_rank, 1, cfg, device="cpu", on_event=on_event)
    return steps, validations


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU recipe")
def test_trains_on_real_text_and_resumes_exactly_in_the_middle_of_the_warm_up(text, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps, validations = train(configuration(text, tmp_path / "run"))
    numbers, losses, strengths, lrs, decays = zip(*steps, strict=True)
    assert list(numbers) == list(range(16))
    assert strengths == tuple(min(1.0, step / 6) for step in range(16))
    assert validations and set(validations) == {1.0}
    assert lrs == pytest.approx(
        [0, 2e-3] + [4e-3 * (16 - n) / 14 for n in range(2, 8)] + [2e-3 * (16 - n) / 14 for n in range(8, 16)]
    )
    assert decays == (0.1,) * 8 + (0.0,) * 8
    assert losses[-1] < losses[0] - 1.0
    resumed, _ = train(configuration(text, tmp_path / "run", resume_at=4))
    assert resumed == steps[4:]
    scalars = EventAccumulator(configuration(text, None).logger.tensorboard_dir).Reload()
    logged = {tag: {event.step: event.value for event in scalars.Scalars(tag)} for tag in scalars.Tags()["scalars"]}
    assert logged["bitnet/quantization_strength"][4] == 0.5
    matrices = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    names = {f"layers.{layer}.{matrix}" for layer in (0, 1) for matrix in matrices}
    assert {tag.removeprefix("bitnet/zeros/") for tag in logged if tag.startswith("bitnet/zeros/l")} == names
    for name in names:
        assert all(0.2 < share < 0.5 for share in logged[f"bitnet/zeros/{name}"].values())
        assert 0 < logged[f"bitnet/flips/{name}"][16] < 0.1
        assert 0 < logged[f"bitnet/scale/{name}"][16] < 0.2


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CPU recipe")
def test_fine_tunes_a_prequantized_checkpoint_on_packed_chats(tmp_path):
    """A step takes all rows: its loss is that of the conversations one by one, with the reference's linears."""
    hf = write_random_edge_checkpoint(tmp_path / "hf", "plain", "prequantized", seed=4)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(hf)
    roles, draw = ("user", "assistant"), random.Random(3)
    chats = [
        [{"role": role, "content": " ".join(f"w{draw.randrange(20, 60)}" for _ in range(9))} for role in roles]
        for _ in range(12)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    prepare_chat([tmp_path / "chats.jsonl"], hf, tmp_path / "data", seq_length=96, workers=1)

    cfg = falcon_edge.falcon_edge_tiny_cpu_sft_config()
    use_hf_model(cfg, hf)
    use_dataset(cfg, tmp_path / "data")
    rows = pyarrow.parquet.read_metadata(tmp_path / "data" / "training.idx.parquet").num_rows
    cfg.train.global_batch_size, cfg.train.train_iters, cfg.validation.eval_iters = rows, 6, 0
    cfg.optimizer.lr = 1e-2
    cfg.checkpoint.save = cfg.checkpoint.load = str(tmp_path / "run")
    check_dataset(cfg)
    losses = []
    run_pretrain(cfg, 1, on_event=lambda rank, event: losses.append(event.loss))
    expected = Chats(hf, tmp_path / "data", chats, rows).loss(load_bitnet_llama(hf, torch.float32))
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0] - 0.5


EXAMPLE = Path(__file__).parents[3] / "examples" / "bitnet_vs_dense"


def test_the_plot_of_the_documentation_is_of_its_figures(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("plot", "run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from plot import plot
    from run import configuration, plan

    figures = json.loads((EXAMPLE.parents[1] / "docs" / "images" / "bitnet_vs_dense.json").read_text())
    plot(figures, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    assert figures["resume_is_exact"] is True
    runs = plan(figures["runs"]["dense"]["steps"], figures["runs"]["dense"]["lr"])
    assert [run.name for run in runs] == list(figures["curves"])
    for run in runs:
        if run.start != "prequantized":
            cfg = configuration(run, tmp_path, runs[0].steps)
            cfg.model.finalize()
            cfg.scheduler.finalize()
            assert cfg.model.use_bitnet == run.use_bitnet
