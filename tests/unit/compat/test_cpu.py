import contextlib
import logging
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from falcon_bridge.compat import cpu, cpu_random, cpu_runtime

from .conftest import clean_process_state
from .tiny_gpt import pretrain_config, provider


pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="cpu_runtime does nothing where CUDA is available")


@contextlib.contextmanager
def world_of_one():
    """One gloo rank with Megatron's process groups; yields them."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield ProcessGroupCollection.use_mpu_process_groups()


def seed_streams(seed=1234, **ranks):
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed, random

    model_parallel_cuda_manual_seed(seed, **{"tp_rank": 0, "ep_rank": 0, "etp_rank": 0, **ranks})
    return random.get_cuda_rng_tracker()


def draws(tracker, stream, n=4):
    with tracker.fork(stream):
        return torch.rand(n)


def expected(seed, n=4):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def data_is_broadcast_to_tensor_parallel_ranks():
    from megatron.core.tensor_parallel import broadcast_data

    tokens = torch.arange(6).reshape(2, 3)
    with world_of_one():
        assert torch.equal(broadcast_data(["tokens"], {"tokens": tokens}, torch.int64)["tokens"], tokens)


def rotary_embedding_is_split_over_context_parallel_ranks():
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    group = SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    assert get_pos_emb_on_this_cp_rank(torch.arange(8), 0, group).tolist() == [2, 3, 4, 5]


def module_moves_to_the_device():
    module = nn.Linear(3, 2).to("cuda:0", torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("cpu", torch.bfloat16)}
    assert torch.ones(2).to(torch.float64).dtype == torch.float64


def parameters_are_pinned_when_offloaded():
    tensor = torch.randn(3)
    assert torch.equal(tensor.cpu().pin_memory(), tensor)


def gradients_are_clipped():
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    clip_grad_by_total_norm_fp32([parameter], max_norm=1.0, total_norm=5.0)
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8]))
    assert parameter.type(torch.float64).dtype == torch.float64


def timers_synchronize():
    from megatron.core.timers import Timers

    timer = Timers(log_level=2, log_option="max")("step", log_level=0)
    timer.start()
    timer.stop()
    assert timer.elapsed() >= 0


def provider_makes_its_own_process_group_and_wraps_the_model_in_ddp():
    from megatron.core.distributed import DistributedDataParallelConfig

    torch.manual_seed(0)
    model = provider(num_layers=1)
    model.finalize()
    (ddp,) = model.provide_distributed_model(ddp_config=DistributedDataParallelConfig())
    assert torch.distributed.get_backend() == "gloo"
    tokens = torch.arange(8).reshape(1, 8)
    loss = ddp(tokens, tokens, None, labels=tokens).mean()
    loss.backward()
    assert loss.isfinite()
    assert all(p.main_grad.abs().sum() > 0 for p in ddp.parameters())


def megatron_initializes_without_a_gpu():
    from megatron.bridge.training import setup

    config = pretrain_config(iterations=1)
    config.validate()
    assert setup.initialize_megatron(config).tp.size() == 1


def rng_state_of_a_checkpoint_is_restored():
    from megatron.bridge.training.checkpointing import get_rng_state

    with world_of_one() as groups:
        seed_streams()
        saved = get_rng_state(False, pg_collection=groups).data[0]
        first = torch.rand(3)
        torch.cuda.set_rng_state(saved["cuda_rng_state"])
        assert torch.equal(torch.rand(3), first)


def cuda_seed_seeds_the_default_stream():
    with world_of_one():
        torch.manual_seed(7)
        seed_streams(1234)
        assert torch.equal(torch.rand(4), expected(1234))


def fork_plays_each_stream_and_returns_to_the_default_one():
    with world_of_one():
        tracker = seed_streams(1234)
        torch.manual_seed(99)
        assert torch.equal(draws(tracker, "model-parallel-rng"), expected(1234 + 2718))
        assert torch.equal(draws(tracker, "data-parallel-rng"), expected(1234))
        assert torch.equal(torch.rand(4), expected(99))


def fork_is_silent():
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addHandler(handler)
    try:
        with world_of_one():
            draws(seed_streams(), "model-parallel-rng")
        logger.warning("anything else")
    finally:
        logger.removeHandler(handler)
    assert messages == ["anything else"]


def bridge_seeds_the_streams():
    from megatron.bridge.training import initialize
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    with world_of_one() as groups:
        initialize._set_random_seed(4321, pg_collection=groups)
        assert torch.equal(draws(get_cuda_rng_tracker(), "model-parallel-rng"), expected(4321 + 2718))


def conversion_seeds_the_streams_and_keeps_the_callers():
    from megatron.bridge.training import model_load_save
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    torch.manual_seed(5)
    with model_load_save.temporary_distributed_context():
        assert torch.equal(draws(get_cuda_rng_tracker(), "model-parallel-rng"), expected(2718))
        assert torch.equal(torch.rand(4), expected(5))


def a_data_loader_leaves_the_models_stream_alone():
    torch.manual_seed(21)
    loader = torch.utils.data.DataLoader([1, 2])
    seeds = [iter(loader)._base_seed for _ in range(3)]
    assert torch.equal(torch.rand(4), expected(21))
    assert len(set(seeds)) == 3


def compiled_fusions_run_eagerly():
    def never_compile(graph, inputs):
        raise AssertionError("a fusion was compiled")

    assert torch.compile(lambda x: x + 1, backend=never_compile)(torch.zeros(1)).item() == 1


SCENARIOS = {
    "device=": data_is_broadcast_to_tensor_parallel_ranks,
    "pin_memory=": rotary_embedding_is_split_over_context_parallel_ranks,
    "Tensor.to": module_moves_to_the_device,
    "Tensor.cuda": data_is_broadcast_to_tensor_parallel_ranks,
    "Tensor.pin_memory": parameters_are_pinned_when_offloaded,
    "Tensor.type": gradients_are_clipped,
    "current_device": provider_makes_its_own_process_group_and_wraps_the_model_in_ddp,
    "set_device": provider_makes_its_own_process_group_and_wraps_the_model_in_ddp,
    "synchronize": timers_synchronize,
    "Stream": provider_makes_its_own_process_group_and_wraps_the_model_in_ddp,
    "current_stream": provider_makes_its_own_process_group_and_wraps_the_model_in_ddp,
    "init_process_group": provider_makes_its_own_process_group_and_wraps_the_model_in_ddp,
    "initialize_megatron": megatron_initializes_without_a_gpu,
    "get_rng_state": rng_state_of_a_checkpoint_is_restored,
    "set_rng_state": rng_state_of_a_checkpoint_is_restored,
    "manual_seed": cuda_seed_seeds_the_default_stream,
    "_get_cuda_rng_state": fork_plays_each_stream_and_returns_to_the_default_one,
    "_set_cuda_rng_state": fork_plays_each_stream_and_returns_to_the_default_one,
    "fork_warning": fork_is_silent,
    "_set_random_seed": bridge_seeds_the_streams,
    "temporary_distributed_context": conversion_seeds_the_streams_and_keeps_the_callers,
    "DataLoader": a_data_loader_leaves_the_models_stream_alone,
    "eager": compiled_fusions_run_eagerly,
}


@pytest.mark.parametrize("name", cpu.ENTRIES)
def test_each_entry_is_needed(name):
    scenario = SCENARIOS[name]
    with clean_process_state(), cpu_runtime():
        scenario()
    torch.compiler.reset()
    with clean_process_state(), cpu_runtime(without=(name,)), pytest.raises(Exception) as failure:
        scenario()
    print(f"{name}: {failure.type.__name__}: {str(failure.value)[:100]}")


def attributes():
    """What every replacement of the table finds at its place now."""
    paths = [entry.what.path for entry in cpu.ENTRIES.values() if isinstance(entry.what, cpu.Replacement)]
    return {path: pkgutil.resolve_name(path) for path in paths}


def is_undone(before):
    now = attributes()
    assert [path for path in before if now[path] is not before[path]] == []
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert not cpu._is_active


def test_everything_is_undone_on_exit_and_after_an_exception():
    before = attributes()
    filters = list(logging.getLogger("megatron.core.tensor_parallel.random").filters)
    with cpu_runtime():
        assert [path for path, value in attributes().items() if value is before[path]] == []
    is_undone(before)
    with pytest.raises(KeyboardInterrupt), cpu_runtime():
        raise KeyboardInterrupt
    is_undone(before)
    assert logging.getLogger("megatron.core.tensor_parallel.random").filters == filters


def test_a_failure_while_opening_is_undone(monkeypatch):
    before = attributes()

    @contextlib.contextmanager
    def fails():
        raise OSError("no")
        yield

    monkeypatch.setitem(cpu.ENTRIES, "eager", cpu.Entry("fails", cpu.Context(fails)))
    with pytest.raises(OSError, match="no"), cpu_runtime():
        pass
    is_undone(before)


def test_nesting_opens_once_and_the_inner_exit_closes_nothing():
    before = attributes()
    with cpu_runtime():
        opened = attributes()
        with cpu_runtime():
            assert attributes() == opened
        assert attributes() == opened
        assert torch.ones(1, device="cuda").device.type == "cpu"
    is_undone(before)


def test_unknown_and_ineffective_names_are_refused():
    with pytest.raises(ValueError, match=r"no entry bogus; there are device="), cpu_runtime(without=("bogus",)):
        pass
    with cpu_runtime(), pytest.raises(ValueError, match="inside an open"), cpu_runtime(without=("eager",)):
        pass


def test_nothing_happens_where_cuda_is_available(monkeypatch):
    before = attributes()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with cpu_runtime():
        assert attributes() == before
        assert torch.overrides._get_current_function_mode_stack() == []


def test_streams_differ_between_tensor_parallel_ranks_as_upstream_seeds_them(clean_state):
    with cpu_runtime(), world_of_one():
        of_rank = []
        for tp_rank in range(4):
            tracker = seed_streams(77, tp_rank=tp_rank)
            of_rank.append({name: draws(tracker, name) for name in tracker.get_states()})
    for tp_rank, streams in enumerate(of_rank):
        assert torch.equal(streams["model-parallel-rng"], expected(77 + 2718 + tp_rank))
        assert torch.equal(streams["data-parallel-rng"], expected(77))


def test_streams_continue_nest_and_restore_exactly(clean_state):
    with cpu_runtime(), world_of_one():
        tracker = seed_streams(3)
        first = draws(tracker, "model-parallel-rng", 5)
        saved = {name: state.clone() for name, state in tracker.get_states().items()}
        with tracker.fork("model-parallel-rng"):
            before = torch.rand(2)
            inner = draws(tracker, "data-parallel-rng", 3)
            after = torch.rand(2)
        whole = expected(3 + 2718, 9)
        assert torch.equal(torch.cat([first, before, after]), whole)
        assert torch.equal(inner, expected(3, 3))

        tracker.set_states(saved)
        assert torch.equal(draws(tracker, "model-parallel-rng", 4), whole[5:])
        assert torch.equal(draws(tracker, "data-parallel-rng", 3), inner)


def test_recomputed_activations_see_the_same_dropout(clean_state):
    from megatron.core.tensor_parallel import random

    with cpu_runtime(), world_of_one():
        weight = torch.randn(6, 6)

        def block(x):
            with random.get_cuda_rng_tracker().fork():
                x = nn.functional.dropout(x @ weight, 0.5)
            return nn.functional.dropout(x, 0.3)

        results = []
        for recompute in (False, True):
            seed_streams(11)
            x = torch.linspace(-1, 2, 24).reshape(4, 6).requires_grad_()
            y = random.checkpoint(block, False, x) if recompute else block(x)
            y.square().sum().backward()
            results.append((y.detach(), x.grad, torch.rand(2)))
        for plain, recomputed in zip(*results, strict=True):
            assert torch.equal(plain, recomputed)


def test_callers_generator_is_kept_by_a_conversion(clean_state):
    with cpu_runtime():
        conversion_seeds_the_streams_and_keeps_the_callers()


def test_generator_functions_take_upstreams_arguments():
    state = cpu_random.get_rng_state(device="cuda", clone=True, graph_safe=False)
    first = torch.rand(2)
    cpu_random.set_rng_state(state, -1, graph_safe=False)
    assert torch.equal(torch.rand(2), first)
    cpu_random.set_rng_state(state, device="cuda")
    assert torch.equal(torch.rand(2), first)
