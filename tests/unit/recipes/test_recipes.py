import subprocess
import sys

import pytest

from falcon_bridge import recipes
from falcon_bridge.errors import UserError
from falcon_bridge.training.dataset import check_dataset, use_dataset
from falcon_bridge.training.recipe import apply_overrides, load_recipe


TINY = "falcon_h1_tiny_cpu_pretrain_config"


def test_importing_the_package_is_cheap():
    code = "import sys; import falcon_bridge.recipes; sys.exit('megatron.bridge' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_names_every_recipe_of_the_modules():
    from falcon_bridge.recipes import falcon_h1, falcon_h1_tiny

    found = {
        name: module.__name__.rpartition(".")[2]
        for module in (falcon_h1, falcon_h1_tiny)
        for name in vars(module)
        if name.endswith("_config")
    }
    assert found == recipes.RECIPES
    with pytest.raises(AttributeError, match="no attribute 'falcon_h1_8b"):
        _ = recipes.falcon_h1_8b_pretrain_config


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_recipe_is_consistent(name):
    function = getattr(recipes, name)
    cfg = function()
    assert function.__doc__ and cfg.model is not function().model
    cfg.model.finalize()
    assert cfg.model.seq_length == cfg.dataset.seq_length <= (cfg.model.max_position_embeddings or 10**9)
    assert cfg.optimizer.weight_decay == cfg.scheduler.start_weight_decay == cfg.scheduler.end_weight_decay
    assert (cfg.optimizer.adam_beta1, cfg.optimizer.adam_beta2, cfg.optimizer.clip_grad) == (0.9, 0.95, 1.0)
    assert cfg.scheduler.lr_decay_style == "WSD" and cfg.scheduler.lr_wsd_decay_style == "exponential"
    assert 0 < cfg.scheduler.lr_warmup_iters < cfg.train.train_iters - cfg.scheduler.lr_wsd_decay_iters
    assert cfg.train.global_batch_size % cfg.train.micro_batch_size == 0
    assert cfg.model.sequence_parallel == (cfg.model.tensor_model_parallel_size > 1)
    assert cfg.tokenizer.vocab_size + 1 == cfg.model.vocab_size


def test_overrides_reach_their_fields():
    cfg = apply_overrides(
        load_recipe(TINY),
        [
            "train.train_iters=7",
            "optimizer.lr=1",
            "model.gated_norm=false",
            "model.num_layers=2",
            "checkpoint.save=null",
            "model.mlp_multipliers=[0.5,0.25]",
            "model.layer_pattern='P*'",
        ],
    )
    assert (cfg.train.train_iters, cfg.optimizer.lr, cfg.model.gated_norm) == (7, 1, False)
    assert cfg.checkpoint.save is None
    cfg.model.finalize()
    assert cfg.model.mlp_multipliers == (0.5, 0.25) and cfg.model.resolve_layer_pattern() == "P*"
    assert cfg.model.activation_func is load_recipe(TINY).model.activation_func


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ("train.train_iters=0", "train.train_iters must be positive, not 0"),
        ("train.train_iters=-3", "train.train_iters must be positive"),
        ("train.micro_batch_size=0", "train.micro_batch_size must be positive"),
        ("train.global_batch_size=-8", "train.global_batch_size must be positive"),
        ("model.num_layers=0", "model.num_layers must be positive"),
        ("model.hidden_size=-128", "model.hidden_size must be positive"),
        ("model.ffn_hidden_size=0", "model.ffn_hidden_size must be positive"),
        ("model.mamba_state_dim=0", "model.mamba_state_dim must be positive"),
        ("model.mamba_num_heads=-1", "model.mamba_num_heads must be 0 or more"),
        ("model.kv_channels=0", "model.kv_channels must be positive"),
        ("model.tensor_model_parallel_size=0", "model.tensor_model_parallel_size must be positive"),
        ("model.seq_length=0", "model.seq_length must be positive"),
        ("dataset.seq_length=-1", "dataset.seq_length must be positive"),
        ("optimizer.lr=0", "optimizer.lr must be positive"),
        ("optimizer.lr=-1e-3", "optimizer.lr must be positive"),
        ("optimizer.lr=nan", "optimizer.lr must be a number, not nan"),
        ("optimizer.lr=inf", "optimizer.lr must be positive, not inf"),
        ("optimizer.lr=1e-4", "optimizer.min_lr must be at most optimizer.lr=0.0001"),
        ("optimizer.adam_beta2=1.5", "optimizer.adam_beta2 must be at least 0 and below 1"),
        ("scheduler.lr_decay_iters=5", "scheduler.lr_warmup_iters must be below scheduler.lr_decay_iters=5"),
        ("validation.eval_iters=-1", "validation.eval_iters must be 0 or more"),
        ("model=5", "model is a section, not a value: set one of its keys, as in model.num_layers="),
        ("train=null", "train is a section"),
        ("peft=lora", "peft is a section that this recipe does not have"),
        ("env_vars=3", "env_vars must be a mapping"),
        ("model.mlp_multipliers=0.5", "model.mlp_multipliers must be a list of numbers"),
        ("model.ssm_multipliers=[a,b]", "model.ssm_multipliers must be a list of numbers"),
        ("model.num_layers_in_first_pipeline_stage=two", "num_layers_in_first_pipeline_stage must be an integer"),
        ("dataset.blend=foo", r"dataset.blend must be \[\[PREFIX,…\],null\] or .*, not 'foo'"),
        ("dataset.blend=[foo,null]", "dataset.blend must be"),
        ("dataset.blend=[[a,b],[0.5]]", "a weight for each prefix"),
    ],
)
def test_an_override_that_no_run_can_have_is_refused(overrides, says):
    with pytest.raises(UserError, match=says) as caught:
        apply_overrides(load_recipe(TINY), [overrides])
    assert "\n" not in str(caught.value)


def test_overrides_of_unset_and_optional_keys():
    overrides = ["dataset.blend=[[a,b],[0.5,2]]", "model.num_layers_in_first_pipeline_stage=1", "peft=null"]
    overrides += ["model.num_attention_heads=0", "model.num_query_groups=null", "optimizer.min_lr=0"]
    cfg = apply_overrides(load_recipe(TINY), overrides)
    assert [list(part) for part in cfg.dataset.blend] == [["a", "b"], [0.5, 2]]
    assert (cfg.model.num_layers_in_first_pipeline_stage, cfg.peft, cfg.optimizer.min_lr) == (1, None, 0)
    cfg = apply_overrides(load_recipe("falcon_h1_500m_pretrain_config"), ["mixed_precision=bf16_mixed"])
    assert cfg.mixed_precision == "bf16_mixed"


@pytest.mark.parametrize("key", ["model.seq_length", "dataset.seq_length"])
def test_one_sequence_length_sets_both(key):
    cfg = apply_overrides(load_recipe(TINY), [f"{key}=64"])
    assert cfg.model.seq_length == cfg.dataset.seq_length == 64


@pytest.mark.parametrize("name", ["corpus", "corpus.bin", "corpus.idx"])
def test_dataset_by_prefix_or_file(tmp_path, name):
    cfg = load_recipe(TINY)
    (tmp_path / "corpus.bin").touch()
    with pytest.raises(UserError, match=r"corpus.idx does not exist"):
        use_dataset(cfg, tmp_path / name)
    (tmp_path / "corpus.idx").touch()
    use_dataset(cfg, tmp_path / name)
    assert cfg.dataset.blend == [[str(tmp_path / "corpus")], None]


def _indexed(prefix, documents):
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin")
    for _ in range(documents):
        builder.add_item(torch.arange(50))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


@pytest.mark.parametrize(
    ("documents", "split", "eval_iters", "empty"),
    [
        (12, "90,5,5", 2, "validation"),
        (12, "90,10,0", 2, None),
        (12, "90,5,5", 0, None),
        (4, "99,1,0", 2, "validation"),
        (30, "80,10,10", 2, None),
    ],
)
def test_an_empty_split_is_refused(tmp_path, documents, split, eval_iters, empty):
    cfg = load_recipe(TINY)
    _indexed(tmp_path / "corpus", documents)
    use_dataset(cfg, tmp_path / "corpus")
    cfg.dataset.split, cfg.validation.eval_iters = split, eval_iters
    if empty is None:
        check_dataset(cfg)
        return
    with pytest.raises(UserError, match=f"has {documents} documents.*gives none to {empty}"):
        check_dataset(cfg)


def test_a_damaged_index_is_named(tmp_path):
    cfg = load_recipe(TINY)
    for suffix in ("bin", "idx"):
        (tmp_path / f"corpus.{suffix}").write_bytes(b"MMI")
    use_dataset(cfg, tmp_path / "corpus")
    with pytest.raises(UserError, match=r"corpus\.idx is not the index"):
        check_dataset(cfg)
