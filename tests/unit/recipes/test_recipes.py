import subprocess
import sys
from importlib import import_module
from itertools import pairwise

import pytest

from falcon_bridge import recipes
from falcon_bridge.errors import UserError
from falcon_bridge.peft import DoRA, LoRA
from falcon_bridge.recipes.schedule import lr_for_batch, warmup_stable_decay
from falcon_bridge.training.documents import check_documents
from falcon_bridge.training.limits import check_limits
from falcon_bridge.training.memory import GPU_MEMORY, RESERVE, estimate_memory
from falcon_bridge.training.recipe import apply_overrides, load_recipe, use_hf_model
from falcon_bridge.training.run import check_layout, layout_size
from falcon_bridge.training.sft_dataset import pad_multiple
from falcon_bridge.verification.checkpoints import write_random_checkpoint
from tests.unit.models.falcon_h1.conftest import one_rank, process_groups  # noqa: F401


TINY = "falcon_h1_tiny_cpu_pretrain_config"


def test_importing_the_package_is_cheap():
    code = "import sys; import falcon_bridge.recipes; sys.exit('megatron.bridge' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_table_names_every_recipe_of_the_modules():
    found = {
        name: module
        for module in sorted({*recipes.RECIPES.values()} | {"falcon_h1_tiny"})
        for name in vars(import_module(f"falcon_bridge.recipes.{module}"))
        if name.endswith("_config")
    }
    assert found == recipes.RECIPES
    assert recipes.GPUS.keys() == {name for name in recipes.RECIPES if "_cpu_" not in name}
    with pytest.raises(AttributeError, match="no attribute 'falcon_h1_8b"):
        _ = recipes.falcon_h1_8b_pretrain_config


def test_the_contract_s_recipes_are_there():
    sizes = ("tiny_cpu", "90m", "500m", "1p5b", "1p5b_deep", "3b", "7b", "34b")
    names = {f"falcon_h1_{size}_{task}_config" for size in sizes for task in ("pretrain", "sft", "peft")}
    names |= {f"falcon_h1_{size}_128k_pretrain_config" for size in ("90m", "1p5b", "1p5b_deep", "3b", "7b", "34b")}
    names |= {f"falcon_h1_{size}_256k_pretrain_config" for size in ("90m", "7b", "34b")}
    assert names | {"falcon_h1_500m_bitnet_pretrain_config"} <= recipes.RECIPES.keys()


FALCON_H1 = [name for name in recipes.RECIPES if name.startswith("falcon_h1_")]


@pytest.mark.parametrize("name", FALCON_H1)
def test_every_recipe_is_consistent(name):
    function = getattr(recipes, name)
    cfg = function()
    assert function.__doc__ and cfg.model is not function().model
    cfg.model.finalize()
    check_limits(cfg)
    model, scheduler = cfg.model, cfg.scheduler
    assert model.seq_length == cfg.dataset.seq_length <= (model.max_position_embeddings or 10**9)
    assert model.is_hybrid_model and model.use_bitnet == ("bitnet" in name)
    assert cfg.optimizer.weight_decay == scheduler.start_weight_decay == scheduler.end_weight_decay
    assert (cfg.optimizer.adam_beta1, cfg.optimizer.adam_beta2, cfg.optimizer.clip_grad) == (0.9, 0.95, 1.0)
    assert scheduler.lr_decay_style == "WSD" and scheduler.lr_wsd_decay_style == "exponential"
    assert 0 < scheduler.lr_warmup_iters < cfg.train.train_iters - scheduler.lr_wsd_decay_iters
    assert scheduler.lr_decay_iters == cfg.train.train_iters and cfg.optimizer.min_lr == cfg.optimizer.lr / 8
    assert model.sequence_parallel == (model.tensor_model_parallel_size > 1)
    assert cfg.checkpoint.dist_ckpt_optim_fully_reshardable
    assert cfg.ddp.use_distributed_optimizer == cfg.optimizer.use_distributed_optimizer == ("_cpu_" not in name)
    if model.context_parallel_size > 1:
        assert model.calculate_per_token_loss and not cfg.ddp.average_in_collective
        assert model.seq_length % (2 * model.context_parallel_size * model.tensor_model_parallel_size) == 0
    # the stated GPUs hold the layout and share the batch; a pipeline is kept busy
    gpus = recipes.GPUS.get(name, 1)
    check_layout(cfg, gpus)
    replicas = gpus // layout_size(cfg)
    microbatches = cfg.train.global_batch_size // (cfg.train.micro_batch_size * replicas)
    assert microbatches >= 2 * model.pipeline_model_parallel_size or model.pipeline_model_parallel_size == 1


@pytest.mark.parametrize("name", [name for name in FALCON_H1 if name in recipes.GPUS])
def test_every_recipe_fits_its_gpus(name):
    cfg = apply_overrides(getattr(recipes, name)(), ["model.transformer_impl=transformer_engine"])
    cfg.model.finalize()
    assert cfg.model.bf16
    largest = max(stage.peak for stage in estimate_memory(cfg, recipes.GPUS[name]))
    assert largest <= GPU_MEMORY - RESERVE


@pytest.mark.parametrize("name", [name for name in FALCON_H1 if name.endswith("_pretrain_config")])
def test_pretraining_keeps_documents_apart(name):
    cfg = getattr(recipes, name)()
    assert cfg.tokenizer.vocab_size + 1 == cfg.model.vocab_size and cfg.peft is None
    assert cfg.dataset.inter_document_masking
    check_documents(cfg)
    long = "k_pretrain" in name
    tokens = cfg.train.global_batch_size * cfg.model.seq_length
    if "_cpu_" not in name:
        assert tokens == 2**21 and cfg.optimizer.weight_decay == 0.1
        assert cfg.optimizer.lr == (128e-5 / 8 if long else 128e-5)
    assert not long or cfg.model.seq_length == int(name.split("k_pretrain")[0].rpartition("_")[2]) * 1024


@pytest.mark.parametrize("name", [name for name in FALCON_H1 if name.endswith(("_sft_config", "_peft_config"))])
def test_fine_tuning_packs_chats(name):
    cfg = getattr(recipes, name)()
    model, specs = cfg.model, cfg.dataset.offline_packing_specs
    assert cfg.train.micro_batch_size == 1 and specs.packed_sequence_size == model.seq_length
    assert specs.pad_seq_to_mult == pad_multiple(
        model.tensor_model_parallel_size, model.context_parallel_size, model.sequence_parallel
    )
    assert model.calculate_per_token_loss and not cfg.ddp.average_in_collective
    assert cfg.optimizer.weight_decay == 0 and cfg.dataset.preprocessing.loss_mode == "assistant"
    assert (cfg.peft is None) == name.endswith("_sft_config")
    if name.endswith("_sft_config") and "_cpu_" not in name:
        # TII: 50M tokens of warm-up, 1.5G stable, 1.5G decay; 128e-6 at 1M tokens
        tokens = cfg.train.global_batch_size * model.seq_length
        assert cfg.optimizer.lr == pytest.approx(128e-6 * (tokens / 1e6) ** 0.5)
        assert model.seq_length == 16384
        decay = cfg.scheduler.lr_wsd_decay_iters
        stable = cfg.train.train_iters - cfg.scheduler.lr_warmup_iters - decay
        phases = [steps * tokens / 1e9 for steps in (cfg.scheduler.lr_warmup_iters, stable, decay)]
        assert phases == pytest.approx([0.05, 1.5, 1.5], rel=0.02)


def test_peft_schemes():
    lora, dora = recipes.falcon_h1_7b_peft_config(), recipes.falcon_h1_7b_peft_config(peft_scheme="dora")
    assert (type(lora.peft), type(dora.peft)) == (LoRA, DoRA)
    targets = {"linear_qkv", "linear_proj", "in_proj", "out_proj", "linear_fc1", "linear_fc2"}
    assert {*lora.peft.target_modules} == {*dora.peft.target_modules} == targets
    with pytest.raises(ValueError, match="peft_scheme='lorra' is not known: use 'lora' or 'dora'"):
        recipes.falcon_h1_7b_peft_config(peft_scheme="lorra")


def test_the_learning_rate_grows_with_the_root_of_the_batch():
    assert lr_for_batch(128e-6, batch_tokens=4_000_000, reference_tokens=1_000_000) == pytest.approx(256e-6)
    with pytest.raises(ValueError, match="must be positive"):
        lr_for_batch(1e-3, batch_tokens=0, reference_tokens=1)


def test_weight_decay_and_learning_rate_reach_the_optimizer(one_rank):  # noqa: F811
    """What Megatron builds from a recipe: no weight decay on what has one dimension, the learning rates as it runs."""
    from megatron.bridge.training.optim import setup_optimizer

    cfg = load_recipe(TINY)
    cfg.model.num_layers = 1
    warmup, decay, last = 10, 20, 100
    warmup_stable_decay(cfg, 1e-2, warmup=warmup, stable=last - warmup - decay, decay=decay)
    cfg.scheduler.lr_warmup_steps, cfg.scheduler.lr_decay_steps = warmup, last
    cfg.scheduler.wsd_decay_steps = cfg.scheduler.wd_incr_steps = decay
    cfg.model.finalize()
    (model,) = cfg.model.provide_distributed_model(ddp_config=cfg.ddp, data_parallel_random_init=False)
    optimizer, scheduler = setup_optimizer(cfg.optimizer, cfg.scheduler, [model])
    names = {parameter: name for name, parameter in model.named_parameters()}
    rates = []
    for step in range(1, last + 1):
        scheduler.step(1)
        rates.append(optimizer.param_groups[0]["lr"])
        decayed = {names[p] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}, step
    one_dimensional = {name for name, parameter in model.named_parameters() if parameter.ndim == 1}
    assert decayed == set(names.values()) - one_dimensional
    assert {name.rpartition(".")[2] for name in one_dimensional} == {"A_log", "D", "dt_bias", "conv1d_bias", "weight"}
    assert rates[warmup - 1 : last - decay] == pytest.approx([1e-2] * (last - decay - warmup + 1))
    assert rates[-1] == pytest.approx(1e-2 / 8) and rates[0] == pytest.approx(1e-3)
    assert all(later < earlier for earlier, later in pairwise(rates[last - decay - 1 :]))


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


def test_the_layout_s_companions_follow_it():
    cfg = apply_overrides(load_recipe("falcon_h1_7b_sft_config"), ["model.tensor_model_parallel_size=1"])
    assert not cfg.model.sequence_parallel and cfg.dataset.offline_packing_specs.pad_seq_to_mult == 1
    overrides = ["model.tensor_model_parallel_size=4", "model.context_parallel_size=3", "model.seq_length=1536"]
    cfg = apply_overrides(load_recipe("falcon_h1_7b_sft_config"), overrides)
    specs = cfg.dataset.offline_packing_specs
    assert cfg.model.sequence_parallel and (specs.packed_sequence_size, specs.pad_seq_to_mult) == (1536, 12)
    cfg.model.finalize()
    cfg = apply_overrides(load_recipe("falcon_h1_7b_sft_config"), [*overrides, "model.sequence_parallel=false"])
    assert not cfg.model.sequence_parallel and cfg.dataset.offline_packing_specs.pad_seq_to_mult == 6


def test_overrides_reach_the_adapters():
    overrides = ["peft.dim=6", "peft.target_modules=[in_proj,'*.layers.0.*.linear_fc1']", "train.train_iters=50"]
    cfg = apply_overrides(load_recipe("falcon_h1_tiny_cpu_peft_config"), overrides)
    assert (cfg.peft.dim, cfg.peft.target_modules) == (6, ["in_proj", "*.layers.0.*.linear_fc1"])
    assert (cfg.peft.alpha, cfg.train.train_iters) == (16, 50)
    with pytest.raises(UserError, match=r"unknown override key 'peft.dimm': did you mean 'peft.dim'\?"):
        apply_overrides(load_recipe("falcon_h1_tiny_cpu_peft_config"), ["peft.dimm=6"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("peft.dim=0", "peft.dim must be positive"),
        ("peft.dim=7", "peft.dim=7 must be a multiple of model.tensor_model_parallel_size=2"),
        ("peft.dropout=1.5", r"peft.dropout=1.5 in \[0, 1\)"),
        ("peft.target_modules=[in_proj,conv1d]", r"peft.target_modules must name some of .*, not \['conv1d'\]"),
        ("peft.target_modules=[]", "peft.target_modules must name some of"),
        ("model.use_bitnet=true", "adapters on a BitNet model are not supported.*an sft recipe"),
    ],
)
def test_adapters_that_cannot_be_are_refused(override, says):
    with pytest.raises(UserError, match=says) as caught:
        apply_overrides(load_recipe("falcon_h1_7b_peft_config"), [override])
    assert "\n" not in str(caught.value)


def test_dropout_with_dora_and_megatron_bridge_s_own_schemes_are_refused():
    from megatron.bridge.peft.lora import LoRA as BridgeLoRA

    cfg = recipes.falcon_h1_7b_peft_config(peft_scheme="dora")
    with pytest.raises(UserError, match=r"peft\.dropout=0.1 is not supported with DoRA"):
        apply_overrides(cfg, ["peft.dropout=0.1"])
    cfg.peft = BridgeLoRA()
    with pytest.raises(UserError, match=r"Megatron Bridge's own LoRA.*use falcon_bridge.peft.LoRA"):
        check_limits(cfg)


def test_a_model_from_hugging_face_keeps_what_the_recipe_says_of_the_run(tmp_path):
    hf = write_random_checkpoint(tmp_path / "hf", "plain")
    cfg = load_recipe("falcon_h1_3b_sft_config")
    cfg.model.use_bitnet = True
    use_hf_model(cfg, hf)
    model = cfg.model
    assert model.hidden_size == 48 and model.calculate_per_token_loss and model.use_bitnet
    assert model.recompute_mixer and model.recompute_modules == ["mlp"] and model.seq_length == 16384
    # a long stage, which starts from a checkpoint, keeps documents apart by split heads
    cfg = load_recipe("falcon_h1_1p5b_128k_pretrain_config")
    use_hf_model(cfg, hf)
    assert (cfg.model.context_parallel_size, cfg.model.cp_comm_type) == (8, "a2a")
    check_documents(cfg)


@pytest.mark.parametrize(
    ("recipe", "backend", "longest"),
    [
        ("500m", "mamba_ssm", 2**31 // (1536 + 2 * 128)),  # the convolution's output is the largest
        ("3b", "mamba_ssm", 2**31 // (4096 * 256) * 128),  # the states of chunks of 128 are
        ("34b", "mamba_ssm", 4 * 2**31 // (4096 * 4 // 4 * 256) * 128),  # TP 4
        ("500m", "auto", 2**32 // (2 * 1536 + 2 * 128 + 24)),  # our kernels: causal-conv1d's views of in_proj's output
    ],
)
def test_rows_beyond_the_kernels_offsets_are_refused(recipe, backend, longest):
    name = f"falcon_h1_{recipe}_pretrain_config"
    within, beyond = (longest // 4096 * 4096, longest // 4096 * 4096 + 4096)
    overrides = ["train.micro_batch_size=1", "model.max_position_embeddings=2000000", f"model.ssm_backend={backend}"]
    apply_overrides(load_recipe(name), [*overrides, f"dataset.seq_length={within}", f"model.seq_length={within}"])
    with pytest.raises(UserError, match=rf"dataset.seq_length={beyond} tokens are too long for the SSM's kernels"):
        apply_overrides(load_recipe(name), [*overrides, f"dataset.seq_length={beyond}", f"model.seq_length={beyond}"])
    # split over ranks, or without those kernels, it is not too long
    more = [f"dataset.seq_length={beyond}", f"model.seq_length={beyond}"]
    apply_overrides(load_recipe(name), [*overrides, *more, "model.context_parallel_size=2"])
    apply_overrides(load_recipe(name), [*overrides, *more, "model.ssm_backend=torch"])
