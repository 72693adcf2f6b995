"""`use_bitnet`: which modules become ternary, and what is refused with it; tests/parallel/test_bitnet.py computes."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
from megatron.bridge.models.conversion.param_mapping import AutoMapping
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from falcon_bridge import FalconH1ModelProvider7B
from falcon_bridge.bitnet import TERNARY_MODULES, BitNetColumnParallelLinear, BitNetRowParallelLinear
from falcon_bridge.models.falcon_h1.layer_specs import backend_for
from tests.unit.models.falcon_h1.test_provider import assert_refused, fields_of, saved_and_loaded, tiny


BITNET = {"column": BitNetColumnParallelLinear, "row": BitNetRowParallelLinear}
DENSE = {"column": ColumnParallelLinear, "row": RowParallelLinear}


def linears(one_rank, **fields):
    """Name -> module, of all tensor-parallel linears of a model."""
    provider = tiny(**fields)
    provider.finalize()
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False)
    return {name: module for name, module in model.named_modules() if isinstance(module, tuple(DENSE.values()))}


def test_the_table_says_which_modules_are_ternary(one_rank):
    table = {module.megatron: module for module in TERNARY_MODULES}
    found = linears(one_rank, use_bitnet=True, layer_pattern="PM*-")
    assert type(found.pop("output_layer")) is ColumnParallelLinear
    assert {name.rpartition(".")[2] for name in found} == set(table) and len(found) == 6 + 2 + 2 + 2
    for name, linear in found.items():
        entry = table[name.rpartition(".")[2]]
        assert type(linear) is BITNET[entry.parallelism], name
        matrices = 1 if linear.row_segments is None else len(linear.row_segments.unique())
        assert matrices == len(entry.hugging_face) and (entry.matrices is None) == (matrices == 1), name


def test_without_it_all_are_dense(one_rank):
    assert all(type(linear) in DENSE.values() for linear in linears(one_rank).values())


@pytest.mark.parametrize("fields", [{}, {"use_bitnet": False}, {"use_bitnet": True}])
def test_transformer_engines_attention_and_norms_stay(fields, monkeypatch):
    class TESpecProvider:
        def __getattr__(self, name):
            return lambda **options: f"TE's {name}" + (f" with {options}" if options else "")

    stand_in = ModuleType("stand_in")
    stand_in.TESpecProvider = TESpecProvider
    monkeypatch.setitem(sys.modules, "megatron.core.extensions.transformer_engine_spec_provider", stand_in)
    backend = backend_for(SimpleNamespace(transformer_impl="transformer_engine", **fields))
    assert (backend.norm, backend.core_attention) == ("TE's layer_norm", "TE's core_attention")
    assert backend.residual_norm == "TE's layer_norm with {'has_residual': True}"
    if fields.get("use_bitnet"):
        assert backend.column_parallel_linear is BitNetColumnParallelLinear
        assert backend.row_parallel_linear is BitNetRowParallelLinear
        for fused, matrices in ((backend.qkv_linear, "qkv"), (backend.gate_up_linear, "gate_up")):
            assert fused.func is BitNetColumnParallelLinear and fused.keywords == {"matrices": matrices}
    else:
        columns = {backend.column_parallel_linear, backend.qkv_linear, backend.gate_up_linear}
        assert columns == {"TE's column_parallel_linear"}
        assert backend.row_parallel_linear == "TE's row_parallel_linear"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_moe_experts": 4}, "num_moe_experts=4 is not supported"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True is not supported"),
        ({"fp8": "hybrid"}, "^fp8='hybrid' is not supported with use_bitnet=True: FP8 cannot hold .*; unset one of"),
        ({"fp4": "e2m1"}, "^fp4='e2m1' is not supported with use_bitnet=True"),
        (
            {"defer_embedding_wgrad_compute": True},
            "^defer_embedding_wgrad_compute=True is not supported with use_bitn",
        ),
        (
            {"bitnet_backend": "tritn"},
            "^bitnet_backend='tritn' is not one of 'auto', 'reference', 'onebitllms', 'fuse",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused(fields, message):
    assert_refused(message, use_bitnet=True, **fields)


def test_a_backend_without_it_would_do_nothing():
    assert_refused("^bitnet_backend='fused' would do nothing: set use_bitnet=True", bitnet_backend="fused")


def test_a_gpu_backend_may_be_configured_on_a_login_node():
    for backend in ("fused", "onebitllms", "auto", "reference"):
        tiny(use_bitnet=True, bitnet_backend=backend).finalize()
    FalconH1ModelProvider7B(vocab_size=131, seq_length=64, use_bitnet=True).finalize()


@pytest.mark.parametrize("finalized", [False, True])
def test_saved_configs_keep_it(finalized, tmp_path):
    provider = tiny(use_bitnet=True, bitnet_backend="reference")
    if finalized:
        provider.finalize()
    saved, loaded = saved_and_loaded(provider, tmp_path)
    assert "use_bitnet: true" in saved and "bitnet_backend: reference" in saved
    assert fields_of(loaded)["use_bitnet"] is True and loaded.bitnet_backend == "reference"
    assert type(loaded) is type(provider)


def test_megatron_bridge_knows_how_they_are_split():
    registry = AutoMapping._MODULE_TYPE_REGISTRY
    assert "BitNetColumnParallelLinear" in registry["column"] and "BitNetRowParallelLinear" in registry["row"]
