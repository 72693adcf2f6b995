import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from falcon_bridge.ops.linear_cross_entropy import MAX_LOGITS_BYTES
from falcon_bridge.ranks import run_ranks
from falcon_bridge.training.activations import backward_workspace, kept_tensors, loss_workspace, saved_tensors
from falcon_bridge.training.advice import advice, fewest_gpus, peak_memory
from falcon_bridge.training.documents import check_documents
from falcon_bridge.training.memory import count_parameters, estimate_memory, usable_memory
from falcon_bridge.training.parameters import stage_parameters
from falcon_bridge.training.shapes import LayerKind, layer_kinds, padded_vocab_size, rank_shapes, stage_chunks


GIB = 2**30
RELEASED = {
    "90M": 91.1e6,
    "500M": 521e6,
    "1P5B": 1.555e9,
    "1P5BDeep": 1.555e9,
    "3B": 3.149e9,
    "7B": 7.586e9,
    "34B": 33.64e9,
}


@pytest.mark.parametrize("size", RELEASED)
def test_parameters_are_those_of_transformers_model(size):
    from transformers import FalconH1Config, FalconH1ForCausalLM

    import falcon_bridge

    provider = getattr(falcon_bridge, f"FalconH1ModelProvider{size}")()
    fields = falcon_bridge.FalconH1Bridge.megatron_to_hf_config(provider)
    # all layers are alike: two numbers of them give the count for any
    counts = []
    for layers in (1, 2):
        with torch.device("meta"):
            model = FalconH1ForCausalLM(FalconH1Config(**{**fields, "num_hidden_layers": layers}))
        counts.append(sum(parameter.numel() for parameter in model.parameters()))
    expected = counts[0] + (provider.num_layers - 1) * (counts[1] - counts[0])
    assert count_parameters(provider) == expected
    assert count_parameters(provider) == pytest.approx(RELEASED[size], rel=1e-3)


def test_patterns_and_missing_branches_count_what_they_build():
    from falcon_bridge import FalconH1ModelProvider

    def count(**fields):
        shape = {"num_layers": 4, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "vocab_size": 11}
        return count_parameters(FalconH1ModelProvider(**{**shape, **fields}))

    attention, mlp, norm = 4 * 32 * 32, 3 * 32 * 48, 32
    embeddings = 2 * 11 * 32 + 32
    assert count(layer_pattern="*-*-") == 2 * (attention + norm) + 2 * (mlp + norm) + embeddings
    mamba = count(layer_pattern="MMMM") - embeddings
    assert count(layer_pattern="M-M-") == mamba // 2 + 2 * (mlp + norm) + embeddings
    assert count(mamba_num_heads=0) == 4 * (attention + mlp + 2 * norm) + embeddings
    assert count() == mamba + 4 * (attention + mlp + norm) + embeddings


def provider(**fields):
    from falcon_bridge import FalconH1ModelProvider
    from tests.unit.models.falcon_h1.test_model import TINY

    built = FalconH1ModelProvider(**{**TINY, "layer_pattern": "PM*-", **fields})
    built.finalize()
    return built


def built_parameters(layouts):
    """Parameters of this rank's model under each layout."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from falcon_bridge.compat import cpu_runtime

    counts = []
    for fields in layouts:
        with cpu_runtime():
            config = provider(**fields)
            tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
            parallel_state.initialize_model_parallel(tp, pp, config.virtual_pipeline_model_parallel_size)
            model_parallel_cuda_manual_seed(0)
            chunks = config.provide_distributed_model(wrap_with_ddp=False)
            counts.append(sum(p.numel() for chunk in chunks for p in chunk.parameters()))
            parallel_state.destroy_model_parallel()
    return counts


LAYOUTS = [
    {"tensor_model_parallel_size": 2},
    {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 1, "pipeline_dtype": torch.float32},
    {
        "pipeline_model_parallel_size": 2,
        "virtual_pipeline_model_parallel_size": 2,
        "pipeline_dtype": torch.float32,
        "share_embeddings_and_output_weights": True,
    },
    {
        "pipeline_model_parallel_size": 2,
        "pipeline_model_parallel_layout": "Et|tttL",
        "pipeline_dtype": torch.float32,
    },
]


def test_ranks_hold_what_they_build():
    built = run_ranks(built_parameters, 2, LAYOUTS, device="cpu", timeout_seconds=120)
    for index, fields in enumerate(LAYOUTS):
        config = provider(**fields)
        stages = config.pipeline_model_parallel_size
        for rank in range(2):
            stage = rank if stages == 2 else 0
            layers = [kind for chunk in stage_chunks(config, stage) for kind in chunk]
            assert stage_parameters(config, layers, stage) == built[rank][index], (fields, rank)


def recipe(name, *overrides):
    from falcon_bridge import recipes
    from falcon_bridge.training.recipe import apply_overrides

    cfg = apply_overrides(getattr(recipes, name)(), overrides)
    cfg.model.finalize()
    return cfg


def test_state_shards_what_is_sharded():
    cfg = recipe("falcon_h1_7b_pretrain_config")
    (memory,) = estimate_memory(cfg, 16)  # TP 2, DP 8, bf16, distributed optimizer
    split = count_parameters(cfg.model) / 2
    # norms are on both ranks, and the vocabulary is padded
    padding = 2 * (padded_vocab_size(cfg.model) - cfg.model.vocab_size) * cfg.model.hidden_size / 2
    norms = (2 * cfg.model.num_layers + 1) * cfg.model.hidden_size / 2
    parameters = split + padding + norms
    assert (memory.weights, memory.gradients) == (2 * parameters, 4 * parameters)
    assert memory.optimizer == math.ceil(12 * parameters / 8)
    assert estimate_memory(cfg, 32)[0].optimizer == math.ceil(12 * parameters / 16)
    tiny = recipe("falcon_h1_tiny_cpu_pretrain_config")
    parameters = stage_parameters(tiny.model, stage_chunks(tiny.model, 0)[0], 0)
    (memory,) = estimate_memory(tiny, 2)  # fp32: no main weights, and no distributed optimizer
    assert memory.state == 16 * parameters


def test_precision_aware_optimizer_and_gradients_in_16_bits():
    plain = estimate_memory(recipe("falcon_h1_500m_pretrain_config"), 1)[0]
    cfg = recipe("falcon_h1_500m_pretrain_config", "optimizer.use_precision_aware_optimizer=true")
    cfg.optimizer.exp_avg_dtype = cfg.optimizer.exp_avg_sq_dtype = torch.bfloat16
    memory = estimate_memory(cfg, 1)[0]
    assert memory.optimizer == plain.optimizer // 2  # 2 bytes for what the weight lacks, 2 for each moment
    from megatron.bridge.training.mixed_precision import bf16_mixed

    cfg.mixed_precision = bf16_mixed()
    cfg.mixed_precision.grad_reduce_in_fp32 = False
    assert estimate_memory(cfg, 1)[0].gradients == plain.gradients // 2


def test_adapters_train_little():
    full, adapters = recipe("falcon_h1_7b_sft_config"), recipe("falcon_h1_7b_peft_config")
    (whole,), (few,) = estimate_memory(full, 2), estimate_memory(adapters, 2)
    assert few.gradients < whole.gradients / 50 and few.optimizer < whole.optimizer / 50
    assert whole.weights < few.weights < 1.05 * whole.weights
    assert few.activations > whole.activations


def test_micro_batches_in_flight():
    fields = {
        "pipeline_model_parallel_size": 4,
        "num_layers": 8,
        "layer_pattern": None,
        "pipeline_dtype": torch.float32,
    }
    cfg = recipe("falcon_h1_tiny_cpu_pretrain_config", "train.micro_batch_size=1", "train.global_batch_size=8")

    def activations(**more):
        cfg.model = provider(**{**fields, **more})
        return [stage.activations for stage in estimate_memory(cfg, 4)]

    held = activations()
    assert [bytes_ // held[-1] for bytes_ in held] == [4, 3, 2, 1]
    cfg.train.global_batch_size = 2
    assert [bytes_ // held[-1] for bytes_ in activations()] == [2, 2, 2, 1]
    cfg.train.global_batch_size = 8
    # interleaved: warm-ups of 2·(stages after) + one group, and one more, of half the layers each
    interleaved = activations(virtual_pipeline_model_parallel_size=2)
    assert [2 * bytes_ // held[-1] for bytes_ in interleaved] == [11, 9, 7, 5]


def test_context_and_sequence_parallelism_split_tokens():
    from falcon_bridge import FalconH1ModelProvider7B

    def shapes(**fields):
        model = FalconH1ModelProvider7B(seq_length=4096, **fields)
        model.finalize()
        return rank_shapes(model, 2, half=True)

    one, split = shapes(), shapes(tensor_model_parallel_size=2, sequence_parallel=True, context_parallel_size=2)
    assert (one.tokens, one.sharded_tokens, one.ssm_tokens) == (8192, 8192, 8192)
    assert (split.tokens, split.sharded_tokens, split.ssm_tokens) == (4096, 2048, 8192)
    assert (split.ssm_inner, split.ssm_channels) == (one.ssm_inner // 4, one.ssm_inner // 2)
    assert split.ssm_bc == one.ssm_bc  # one group: every rank has all of it
    assert (split.query, split.key, split.ffn) == (one.query // 2, one.key // 2, one.ffn // 2)


def test_split_heads_are_copied_where_there_are_fewer_than_ranks():
    from falcon_bridge import FalconH1ModelProvider500M

    # 8 query heads and 2 key-value heads of 64; 8 ranks with 512 tokens each, or all 4096 of one head
    def model(**fields):
        made = FalconH1ModelProvider500M(seq_length=4096, bf16=True, context_parallel_size=8, **fields)
        made.finalize()
        return made, rank_shapes(made, 1, half=True), layer_kinds(made)[0]

    def of_attention(sizes):
        return {
            name: size for name, size in sizes.items() if ".attention." in name and not name.endswith("linear_qkv")
        }

    (ring, shapes, kind), (heads, split, _) = model(), model(cp_comm_type="a2a")
    assert (shapes.core_query, shapes.core_key) == (shapes.query, shapes.key) == (512, 128)
    assert (split.core_heads, split.core_query, split.core_key) == (8, 512, 512) and split.key == 128
    core = "self_attention.attention.core_attention"
    assert of_attention(saved_tensors(shapes, kind, ring)) == {core: 512 * (2 * (512 + 512 + 2 * 128) + 4 * 8)}
    # linear_proj's input comes from other ranks
    saved = saved_tensors(split, kind, heads)
    of_projection = {"self_attention.attention.linear_proj": 512 * 2 * 512}
    assert of_attention(saved) == {f"{core}.core_attention": 4096 * (2 * (64 + 64 + 2 * 64) + 4), **of_projection}
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    heads, split, _ = model(cp_comm_type="a2a", **recompute)
    kept = of_attention(kept_tensors(saved_tensors(split, kind, heads), split, kind, heads))
    value = 128 if heads.attention_in_multiplier * heads.attention_out_multiplier != 1.0 else 512 + 2 * 128
    assert kept == {core: 512 * 2 * (512 + 128 + value), **of_projection}


@pytest.mark.parametrize(
    ("fields", "packed", "value"),
    [
        ({}, False, 128),
        ({}, True, 512 + 2 * 128),
        ({"attention_out_multiplier": 0.5}, True, 128),
        ({"tensor_model_parallel_size": 2}, False, 64),
        ({"tensor_model_parallel_size": 4}, False, 512 + 2 * 128),  # two groups: gathered from all ranks
        ({"tensor_model_parallel_size": 4, "attention_out_multiplier": 0.5}, False, 64),
        ({"apply_rope_fusion": True}, False, 128),
        ({"apply_rope_fusion": False}, False, 512 + 2 * 128),
    ],
)
def test_unscaled_values_keep_what_they_are_a_view_of(fields, packed, value):
    from falcon_bridge import FalconH1ModelProvider500M

    plain = {"attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "recompute_granularity": "selective"}
    fusion = fields.get("apply_rope_fusion")
    model = FalconH1ModelProvider500M(seq_length=4096, **{**plain, **fields, "apply_rope_fusion": False})
    model.finalize()
    if fusion is not None:  # finalized with Transformer Engine
        model.transformer_impl, model.apply_rope_fusion = "transformer_engine", fusion
    shapes, kind = rank_shapes(model, 1, half=True, packed=packed), layer_kinds(model)[0]
    kept = kept_tensors(saved_tensors(shapes, kind, model), shapes, kind, model)
    query, key = 512 // model.tensor_model_parallel_size, shapes.key
    assert kept["self_attention.attention.core_attention"] == 4096 * 2 * (2 * query + key + value)


class LiveBytes(TorchDispatchMode):
    """The most bytes that tensors which operations made have held at once, where the device is "meta"."""

    def __init__(self):
        super().__init__()
        self.most, self._live = 0, WeakIdKeyDictionary()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._live[storage] = storage.nbytes()
        self.most = max(self.most, sum(self._live.values()))
        return result


@pytest.mark.parametrize(
    ("size", "rows", "half", "fields"),
    [
        ("500M", 4, True, {}),
        ("7B", 1, True, {}),
        ("34B", 1, True, {"tensor_model_parallel_size": 2}),
        ("90M", 1, True, {"seq_length": 512}),
        ("500M", 2, False, {}),
    ],
)
def test_the_scans_backward_holds_as_much_as_the_formula_says(size, rows, half, fields, monkeypatch):
    import falcon_bridge
    from falcon_bridge.ops.launch import FastLaunch
    from falcon_bridge.ops.ssd.kernels.scan import scan_backward

    fields = {"seq_length": 4096, "ssm_backend": "triton", **fields}
    model = getattr(falcon_bridge, f"FalconH1ModelProvider{size}")(**fields)
    model.finalize()
    shapes = rank_shapes(model, rows, half=half)
    heads, groups, state = shapes.ssm_heads, shapes.ssm_bc // shapes.ssm_state, shapes.ssm_state
    monkeypatch.setattr(FastLaunch, "__call__", lambda *arguments: None)
    dtype = torch.bfloat16 if half else torch.float32
    with torch.device("meta"):
        x = torch.empty(rows, model.seq_length, heads, shapes.ssm_inner // heads, dtype=dtype)
        b = torch.empty(rows, model.seq_length, groups, state, dtype=dtype)
        raw_dt, of_heads = torch.empty(rows, model.seq_length, heads, dtype=dtype), torch.empty(heads)
        with LiveBytes() as live:
            scan_backward(
                x, None, x, b, b, raw_dt, 1.0, of_heads, of_heads, of_heads, None, shapes.ssm_chunk,
                dx=x, db=b, dc=b, draw_dt=raw_dt,
            )  # fmt: skip
    kind = LayerKind(attention=False, mamba=True, mlp=False)
    stream = shapes.tokens * shapes.hidden * (shapes.residual + 2 * shapes.element)
    conv = shapes.ssm_inner + 2 * shapes.ssm_bc
    around = shapes.tokens * (shapes.in_proj + 2 * shapes.ssm_inner + 2 * conv) * shapes.element
    estimate = backward_workspace(shapes, kind, model)["self_attention"] - stream - around
    # where the kernel makes one part of C·B's gradient, the formula has one more
    assert 0.98 * live.most < estimate < 1.1 * live.most


def test_chunks_are_those_of_the_kernels_that_scan():
    from falcon_bridge import FalconH1ModelProvider3B

    def chunk(half=True, **fields):
        model = FalconH1ModelProvider3B(seq_length=4096, chunk_size=256, **fields)
        model.finalize()
        return rank_shapes(model, 1, half=half).ssm_chunk

    assert (chunk(ssm_backend="triton"), chunk(half=False, ssm_backend="triton")) == (128, 64)
    assert (chunk(), chunk(mamba_head_dim=64)) == (256, 128)  # auto takes ours for heads of up to 64
    assert chunk(mamba_head_dim=24) == 256  # not a size that our kernels take


def test_a_chunked_loss_does_not_grow_with_the_logits():
    def workspace(rows, fused):
        overrides = [f"train.micro_batch_size={rows}", f"model.fuse_linear_cross_entropy={str(fused).lower()}"]
        cfg = recipe("falcon_h1_500m_pretrain_config", *overrides, "model.recompute_mixer=false")
        shapes = rank_shapes(cfg.model, rows, half=True)
        return loss_workspace(shapes, cfg.model), shapes

    (small, shapes), (large, more) = workspace(4, True), workspace(8, True)
    (small_plain, _), (large_plain, _) = workspace(4, False), workspace(8, False)
    assert more.tokens == 2 * shapes.tokens
    # three bf16 hidden states and three fp32 numbers a token, and at most 256 MiB of logits and their rounding
    assert abs(large - small - shapes.tokens * (3 * 2 * shapes.hidden + 12)) < 2**20 * 2
    assert (
        MAX_LOGITS_BYTES < large < MAX_LOGITS_BYTES + 2 * shapes.vocab * shapes.hidden + 7 * more.tokens * more.hidden
    )
    # logits in bf16, their softmax and its gradient in fp32
    assert large_plain - small_plain == shapes.tokens * (10 * shapes.vocab + 6 * shapes.hidden)


def test_a_cuda_graph_has_buffers_of_its_own():
    cfg = recipe("falcon_h1_500m_pretrain_config")
    (eager,) = estimate_memory(cfg, 1)
    cfg.model.cuda_graph_impl = "full_iteration"
    (graph,) = estimate_memory(cfg, 1)
    # the rows of all micro-batches, of steps and of validations, with a border for each token
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    assert graph.workspace - eager.workspace == 64 * 2**20 + 2 * 32 * tokens
    cfg.validation.eval_iters, cfg.dataset.inter_document_masking = 0, False
    (less,) = estimate_memory(cfg, 4)
    cfg.model.cuda_graph_impl = "none"
    assert less.workspace - estimate_memory(cfg, 4)[0].workspace == 64 * 2**20 + 28 * tokens // 4
    cfg.model.cuda_graph_impl = "full_iteration"
    (graph,) = estimate_memory(cfg, 1)
    assert (graph.state, graph.activations) == (eager.state, eager.activations)


def test_recomputed_gates_cost_what_they_gave(monkeypatch):
    cfg = recipe("falcon_h1_500m_pretrain_config", "train.micro_batch_size=2", "dataset.seq_length=4096")
    kept = peak_memory(cfg, 8)
    cfg.model.recompute_gates = True
    tokens, layers, d_ssm, ffn = 2 * 4096, 36, 1536, 2048
    saved = layers * tokens * (d_ssm + ffn) * 2
    assert 0.9 * saved < kept - peak_memory(cfg, 8) < 1.1 * saved


def test_advice_is_true():
    cfg = recipe("falcon_h1_7b_pretrain_config")
    limit = 75 * GIB
    assert peak_memory(cfg, 2) > limit
    found = advice(cfg, 2, limit)
    assert 1 <= len(found) <= 4 and found[0][1] == 2
    for overrides, ranks, peak in found:
        changed = recipe("falcon_h1_7b_pretrain_config", *overrides.split())
        assert peak_memory(changed, ranks) == peak <= limit, overrides
    assert peak_memory(cfg, fewest_gpus(cfg, limit)) <= limit < peak_memory(cfg, fewest_gpus(cfg, limit) // 2)
    # a limit that nothing meets
    assert advice(cfg, 2, GIB) == [] and fewest_gpus(cfg, GIB) is None


def test_advice_lowers_the_micro_batch_of_a_long_row():
    cfg = recipe("falcon_h1_500m_pretrain_config", "dataset.seq_length=16384", "train.micro_batch_size=8")
    found = advice(cfg, 1, 75 * GIB)
    assert found and any("train.micro_batch_size" in overrides for overrides, _, _ in found)
    assert all("tensor_model_parallel_size" not in overrides for overrides, _, _ in found)


def test_advised_context_parallelism_keeps_documents_apart():
    fields = ["dataset.seq_length=131072", "train.micro_batch_size=1", "train.global_batch_size=16"]
    cfg = recipe("falcon_h1_3b_pretrain_config", *fields)
    found = [one for one in advice(cfg, 8, 60 * GIB) if "context_parallel_size" in one[0]]
    assert found
    for overrides, ranks, peak in found:
        changed = recipe("falcon_h1_3b_pretrain_config", *fields, *overrides.split())
        check_documents(changed)
        assert peak_memory(changed, ranks) == peak


def test_limit_without_a_gpu_is_an_h100_less_a_reserve():
    if not torch.cuda.is_available():
        assert 70 * GIB < usable_memory() < 79 * GIB
