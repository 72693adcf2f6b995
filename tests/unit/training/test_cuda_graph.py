"""What a run needs, and may not have, where its iterations become CUDA graphs. That they do: tests/gpu."""

import contextlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from megatron.bridge.training.pretrain import pretrain
from megatron.core import full_cuda_graph
from megatron.core.distributed import DistributedDataParallel
from megatron.core.full_cuda_graph import FullCudaGraphWrapper, StaticBufferLoader

from falcon_bridge.errors import UserError
from falcon_bridge.recipes import _common
from falcon_bridge.training import cuda_graph, run
from falcon_bridge.training.cuda_graph import GraphedIterations, settle_cuda_graph
from falcon_bridge.training.notices import notices
from falcon_bridge.training.run import check_start, configure
from falcon_bridge.training.static_documents import static_documents


RECIPE = "falcon_h1_500m_pretrain_config"
GRAPH = "model.cuda_graph_impl=full_iteration"


@pytest.fixture(autouse=True)
def no_graphs_left():
    yield
    cuda_graph.forget_graphs()
    static_documents.start()


@pytest.mark.parametrize("recipe", [RECIPE, "falcon_edge_1b_pretrain_config", "falcon_h1_500m_bitnet_pretrain_config"])
def test_one_override_is_enough(recipe):
    cfg = configure(recipe, [GRAPH])
    assert not cfg.rerun_state_machine.check_for_nan_in_loss and not cfg.rerun_state_machine.check_for_spiky_loss
    assert not cfg.ddp.check_for_nan_in_grad and not cfg.ddp.check_for_large_grads
    assert cfg.model.use_te_rng_tracker and cfg.rng.te_rng_tracker and cfg.model.cuda_graph_modules == []
    check_start(cfg)
    (line,) = [line for line in notices(cfg) if line.startswith("CUDA graph")]
    assert "captured after 3 steps" in line
    assert f"room for {32 * cfg.train.micro_batch_size} documents" in line


def test_without_it_nothing_changes():
    cfg = configure(RECIPE)
    assert cfg.model.cuda_graph_impl == _common.PRETRAIN_CUDA_GRAPH == "none"
    assert cfg.rerun_state_machine.check_for_nan_in_loss and cfg.ddp.check_for_nan_in_grad
    assert not any("CUDA graph" in line for line in notices(cfg))


def test_the_recipes_switch(monkeypatch):
    monkeypatch.setattr(_common, "PRETRAIN_CUDA_GRAPH", "full_iteration")
    for recipe in (RECIPE, "falcon_edge_1b_pretrain_config", "falcon_h1_7b_pretrain_config"):
        assert configure(recipe).model.cuda_graph_impl == "full_iteration"
    for recipe in ("falcon_h1_34b_pretrain_config", "falcon_h1_tiny_cpu_pretrain_config", "falcon_h1_500m_sft_config"):
        assert configure(recipe).model.cuda_graph_impl == "none"


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("falcon_h1_tiny_cpu_pretrain_config", None, "CUDA graphs need a GPU"),
        ("falcon_h1_500m_sft_config", None, "the borders of packed rows"),
        ("falcon_h1_500m_peft_config", None, "packed chats"),
        (RECIPE, "logger.timing_log_level=1", "set it to 0"),
        (RECIPE, "train.rampup_batch_size=[32,32,1000]", "train.rampup_batch_size"),
        (RECIPE, "train.decrease_batch_size_if_needed=true", "number of micro-batches"),
        (RECIPE, "optimizer.optimizer_cuda_graph=true", "outside of the graph"),
        (RECIPE, "ddp.use_megatron_fsdp=true", "ddp.use_megatron_fsdp"),
        (RECIPE, "optimizer.clip_grad=0", "set it above 0"),
        # by the model itself
        (RECIPE, "model.cuda_graph_warmup_steps=0", "set it to 1 or more"),
        ("falcon_h1_3b_pretrain_config", "model.pipeline_model_parallel_size=2", "size=2 is not supported with"),
        (
            "falcon_h1_500m_bitnet_pretrain_config",
            "model.bitnet_warmup_steps=10",
            "bitnet_warmup_steps=10 changes from step to step",
        ),
    ],
)
def test_refused(recipe, override, message):
    overrides = [GRAPH, *([override] if override else [])]
    with pytest.raises(UserError) as error:
        configure(recipe, overrides)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"transformer_impl": "local"}, "wait for the device"),
        ({"transformer_impl": "transformer_engine", "apply_rope_fusion": False}, "looked up on the host"),
    ],
)
def test_refused_where_there_is_a_gpu(fields, message, monkeypatch):
    cfg = configure(RECIPE)
    cfg.model.cuda_graph_impl = "full_iteration"
    for name, value in fields.items():
        setattr(cfg.model, name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=message):
        settle_cuda_graph(cfg)


def test_segments_that_can_grow_need_nccl_to_register_nothing(monkeypatch):
    cfg = configure(RECIPE)
    cfg.model.cuda_graph_impl = "full_iteration"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with pytest.raises(UserError, match="set the environment variable NCCL_GRAPH_REGISTER=0"):
        settle_cuda_graph(cfg)
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", "0")
    settle_cuda_graph(cfg)


def test_stragglers_are_not_timed_within_a_graph():
    cfg = configure(RECIPE)
    cfg.model.cuda_graph_impl, cfg.straggler = "full_iteration", SimpleNamespace(log_straggler=True)
    with pytest.raises(UserError, match=r"straggler\.log_straggler=true: it times parts"):
        settle_cuda_graph(cfg)


def step(state, norm=1.0):
    return SimpleNamespace(state=state, grad_norm=norm)


def run_state():
    return SimpleNamespace(train_state=SimpleNamespace(step=6), cfg=SimpleNamespace(dataset=SimpleNamespace()))


def forward(state, *lengths):
    """What Bridge's forward step does to the state, in Python."""
    state._flops_seqlen_sum, state._flops_requires_global_reduce = sum(lengths), True
    state._flops_seqlen_sq_sum = torch.tensor(sum(length**2 for length in lengths))


def reset(state):
    """What Bridge's loop does before a step."""
    state._flops_seqlen_sum = state._flops_seqlen_sq_sum = 0
    state._flops_requires_global_reduce = False


@pytest.mark.parametrize("overlap", [False, True])
def test_what_is_captured_gathers_the_parameters(overlap):
    """Also behind a validation, which has gathered them already: with Megatron's own bookkeeping."""
    ddp = SimpleNamespace(overlap_param_gather=overlap)
    state = SimpleNamespace(cfg=SimpleNamespace(dataset=SimpleNamespace(), ddp=ddp))
    group = SimpleNamespace(param_gather_handle=None, param_gather_dispatched=True)
    chunk = SimpleNamespace(bucket_groups=[group], expert_parallel_bucket_groups=[])
    chunk.reset_param_sync_dispatch_state = lambda: DistributedDataParallel.reset_param_sync_dispatch_state(chunk)
    context, callback = SimpleNamespace(state=state, model=[chunk]), GraphedIterations()
    callback.on_train_start(context)
    callback.on_train_step_start(context)
    assert group.param_gather_dispatched is not overlap
    FullCudaGraphWrapper.cuda_graph["training"] = object()
    group.param_gather_dispatched = True
    callback.on_train_step_start(context)
    assert group.param_gather_dispatched  # a replay gathers whatever Python says


def test_flops_of_replayed_steps_are_counted():
    callback, state = GraphedIterations(), run_state()
    callback.on_train_start(step(state))
    reset(state)
    forward(state, 3, 4)
    callback.on_train_step_end(step(state))
    assert state._flops_seqlen_sq_sum == 25  # an ordinary step is as it was
    FullCudaGraphWrapper.cuda_graph["training"] = object()
    reset(state)
    forward(state, 5, 2)
    on_the_device = state._flops_seqlen_sq_sum
    callback.on_train_step_end(step(state))
    for squares in (29, 25, 49):
        reset(state)
        on_the_device.fill_(squares)  # by the replay
        callback.on_train_step_end(step(state))
        assert (state._flops_seqlen_sum, int(state._flops_seqlen_sq_sum)) == (7, squares)
        assert state._flops_requires_global_reduce


@pytest.mark.parametrize("norm", [math.nan, math.inf, torch.tensor(math.nan)])
def test_a_norm_that_is_not_finite_ends_the_run(norm):
    with pytest.raises(ValueError, match=r"norm is (nan|inf) in step 7: go on from the last checkpoint"):
        GraphedIterations().on_train_step_end(step(run_state(), norm))


def test_too_many_documents_end_the_run(monkeypatch):
    def check():
        raise ValueError("too many")

    monkeypatch.setattr(static_documents, "check", check)
    callback = GraphedIterations()
    for event in (callback.on_train_step_end, callback.on_eval_end, callback.on_test_end):
        with pytest.raises(ValueError, match="too many"):
            event(step(run_state()))


def test_each_training_has_graphs_of_its_own():
    callback = GraphedIterations()
    FullCudaGraphWrapper.curr_iteration.update(training=9, validation=2)
    del FullCudaGraphWrapper.cuda_graph["training"]  # as Bridge does at the end of its loop
    StaticBufferLoader.static_buffers["training"].append({})
    callback.on_train_start(step(run_state()))
    assert FullCudaGraphWrapper.cuda_graph == {"training": None, "validation": None}
    assert FullCudaGraphWrapper.curr_iteration == {"training": 0, "validation": 0}
    assert StaticBufferLoader.static_buffers == {"training": [], "validation": []}
    FullCudaGraphWrapper.cuda_graph["validation"] = graph = object()
    callback.on_eval_end(step(run_state()))
    assert FullCudaGraphWrapper.cuda_graph["validation"] is graph  # for the next validation
    full_cuda_graph._shared_graph_pool = (0, 1)
    callback.on_train_end(step(run_state()))
    assert FullCudaGraphWrapper.cuda_graph["validation"] is None
    assert full_cuda_graph._shared_graph_pool is None  # PyTorch lets it take no graph after its last one is gone
    # the last evaluations are not captured: graphs would keep the communicators from going
    callback.on_test_end(step(run_state()))
    assert FullCudaGraphWrapper.curr_iteration["validation"] > 10**9


@pytest.mark.parametrize("end", [SystemExit(0), ValueError("too many")])
def test_a_run_that_ends_early_leaves_no_graphs(end, monkeypatch):
    """As `train.exit_interval` and signals end it: no event comes then."""

    def ended(*args, **kwargs):
        FullCudaGraphWrapper.cuda_graph["validation"] = object()
        raise end

    monkeypatch.setattr(sys.modules[pretrain.__module__], "pretrain", ended)
    cfg = configure(RECIPE, [GRAPH])
    cfg.checkpoint.save = None
    with pytest.raises(ValueError, match="too many") if isinstance(end, ValueError) else contextlib.nullcontext():
        run._pretrain(cfg)
    assert FullCudaGraphWrapper.cuda_graph["validation"] is None
