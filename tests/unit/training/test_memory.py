import pytest
import torch

from falcon_bridge.training.memory import count_parameters, state_memory


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


def test_state_memory_shards_what_is_sharded():
    from falcon_bridge.recipes import falcon_h1_7b_pretrain_config, falcon_h1_tiny_cpu_pretrain_config

    cfg = falcon_h1_7b_pretrain_config()
    memory = state_memory(cfg, 16)  # TP 2, DP 8, bf16, distributed optimizer
    parameters = count_parameters(cfg.model) / 2
    assert (memory.weights, memory.gradients) == (int(2 * parameters), int(4 * parameters))
    assert memory.optimizer == int(12 * parameters / 8)
    tiny = falcon_h1_tiny_cpu_pretrain_config()
    assert state_memory(tiny, 2).total == 16 * count_parameters(tiny.model)
