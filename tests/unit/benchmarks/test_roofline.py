"""The roofline's counts against the model's, and its reading of a profile."""

import json

import pytest

from benchmarks import roofline
from benchmarks.training_step import BATCH, SHAPES
from falcon_bridge.ops.ssd.backend import default_chunk


def provider(size):
    from falcon_bridge import FalconH1ModelProvider

    config = FalconH1ModelProvider(
        **SHAPES[size], mamba_num_groups=1, gated_norm=False, seq_length=roofline.SEQ_LENGTH
    )
    config.finalize()
    return config


@pytest.mark.parametrize("size", SHAPES)
def test_counts_are_those_of_the_model(size):
    from falcon_bridge.training.flops import falcon_h1_flops
    from falcon_bridge.training.parameters import count_parameters
    from falcon_bridge.training.shapes import padded_vocab_size

    config = provider(size)
    config.vocab_size = padded_vocab_size(config)
    config.chunk_size = default_chunk(roofline.ELEMENT)
    assert roofline.parameters(size) == count_parameters(config)
    forward = sum(stage.layers * stage.forward.flops for stage in roofline.stages(size))
    tokens = BATCH[size] * roofline.SEQ_LENGTH
    # the model's count has the convolution's, and the whole square of a chunk's products with x, of which kernels
    # compute half
    apart = 2 * 4 * (config.d_ssm + 2 * config.mamba_state_dim) + config.d_ssm * config.chunk_size
    counted = falcon_h1_flops(config, BATCH[size]) / 3 - config.num_layers * tokens * apart
    assert forward == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("size", SHAPES)
def test_groups_of_stages_have_kernels(size):
    assert {stage.group for stage in roofline.stages(size)} <= set(roofline.GROUPS)


KERNELS = {
    "nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NNT": "GEMMs",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float": "GEMMs",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26": "attention",
    "void cudnn::fusion::convert_dq_to_16bits<true>(void const*": "attention",
    "_chunk_scan_chunk_state_bwd_dx_kernel": "SSD",
    "_bmm_chunk_fwd_kernel": "SSD",
    "_state_passing_bwd_kernel": "SSD",
    "_chunk_state_gradients_kernel": "SSD",
    "_group_gradients_kernel": "SSD",
    "void causal_conv1d_channellast_bwd_kernel<Causal_conv1d_channellast": "conv",
    "void transformer_engine::normalization::rmsnorm_bwd_tuned_kernel<": "norms",
    "void transformer_engine::fused_rope_forward_kernel<__nv_bfloat16>": "RoPE",
    "_swiglu_backward_kernel": "SwiGLU",
    "_residual_sum_kernel": "residuals",
    "triton_poi_fused_add_0": "residuals",
    "void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::BFloat16>": "residuals",
    "triton_red_fused_copy__exp_sub_sum_unsqueeze_2": "head and loss",
    "triton_red_fused__to_copy_max_0": "head and loss",
    "_row_statistics_kernel": "head and loss",
    "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::FusedOptimizer": "optimizer",
    "void at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda": "copies, casts, fills",
    "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float": "other kernels",
}


@pytest.mark.parametrize(("name", "group"), KERNELS.items())
def test_kernels_fall_into_their_groups(name, group):
    kernels = {"top": [[1.5, 3, name]], "by_category_ms_launches": {"a": [1.5, 3], "b": [0.25, 2]}}
    assert roofline.measured(kernels) == {group: (1.5, 3), "not listed": (0.25, 2)}


def test_a_profile_fills_its_block_of_a_document(tmp_path, monkeypatch):
    top = [[10.0 + index, 2, name] for index, name in enumerate(KERNELS)]
    kernels = {"top": top, "by_category_ms_launches": {"all": [sum(row[0] for row in top) + 5.5, 2 * len(top) + 10]}}
    entries = [{"size": "0.5B", "side": "transformers"}, {"size": "0.5B", "side": "falcon_bridge", "kernels": kernels}]
    (tmp_path / "steps.json").write_text(json.dumps(entries))
    document = tmp_path / "performance.md"
    blocks = "".join(f"<!-- {name} -->\nold\n<!-- end {name} -->\n" for name in ("floor 0.5B", "profile after 0.5B"))
    document.write_text(f"above\n{blocks}below\n")
    arguments = ["--size", "0.5B", "--profile", f"0.5B={tmp_path / 'steps.json'}", "--doc", str(document)]
    monkeypatch.setattr("sys.argv", ["roofline", *arguments, "--label", "after"])
    roofline.main()
    text = document.read_text()
    assert text.startswith("above\n<!-- floor 0.5B -->\n\n| stage |") and text.endswith(
        "<!-- end profile after 0.5B -->\nbelow\n"
    )
    assert "old" not in text and "| not listed | 0.0 | 5.5 | 5.5 |  | 10 |" in text
    busy = next(line for line in text.splitlines() if line.startswith("| GPU busy"))
    assert f"| {sum(row[0] for row in top) + 5.5:.1f} |" in busy
    monkeypatch.setattr("sys.argv", ["roofline", *arguments, "--label", "before"])
    with pytest.raises(SystemExit, match=r"no lines `<!-- profile before 0\.5B -->`"):
        roofline.main()
