"""A recipe with what the user asked for on top: overrides, a model from Hugging Face."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from falcon_bridge.errors import UserError, message_of, one_line, suggestion
from falcon_bridge.training.limits import check_limits, check_type
from falcon_bridge.training.sft_dataset import pad_multiple


def load_recipe(name: str) -> Any:
    """The ``ConfigContainer`` of the recipe `name` of `falcon_bridge.recipes`.

    Raises:
        UserError: there is no such recipe; the message has the closest one.
    """
    from falcon_bridge import recipes

    known = list(recipes.RECIPES)
    if name not in known:
        # the suffix is the same for all and would make any name look close
        short = {key.removesuffix("_config"): key for key in known}
        hint = suggestion(name.removesuffix("_config"), short)
        for abbreviated, full in short.items():
            hint = hint.replace(f"'{abbreviated}'", f"'{full}'")
        raise UserError(f"unknown recipe '{name}'{hint or ': `falcon-bridge recipes` lists them'}")
    return getattr(recipes, name)()


def apply_overrides(cfg: Any, overrides: Iterable[str]) -> Any:
    """Apply ``key.sub=value`` overrides in Hydra's syntax to a recipe.

    Args:
        cfg: a ``ConfigContainer``; changed in place.
        overrides: as on the command line; ``model.num_layers=8``, ``~key`` and ``+key=value`` as in Hydra.

    Returns:
        `cfg`.

    Raises:
        UserError: not ``key=value``, an unknown key (with the closest one), a whole section, a value of the wrong
            type, or one that no run can have.
    """
    from megatron.bridge.training.utils.omegaconf_utils import OverridesError, process_config_with_overrides

    overrides = list(overrides)
    before = {}
    for override in overrides:
        key, separator, text = override.lstrip("+~").partition("=")
        if not separator and not override.startswith("~"):
            raise UserError(f"'{override}' is not an override: write key.sub=value, as in train.train_iters=100")
        before[key] = _lookup(cfg, key)
        _check_section(key, before[key], text)
    adapters = [override for override in overrides if override.lstrip("+~").startswith("peft.")]
    try:
        cfg = process_config_with_overrides(cfg, cli_overrides=[text for text in overrides if text not in adapters])
        _override_adapters(cfg.peft, adapters)
    except OverridesError as error:
        raise UserError(f"the overrides cannot be applied ({one_line(error)}): check {' '.join(overrides)}") from error
    for key, old in before.items():
        check_type(key, old, _lookup(cfg, key), _annotation(cfg, key))
    check_limits(cfg)
    _sync_sequence_parallel(cfg, before)
    _sync_seq_length(cfg, before)
    _sync_packing(cfg, before)
    _sync_precision(cfg)
    return cfg


def _override_adapters(peft: Any, overrides: list[str]) -> None:
    """Apply overrides to the adapters, which Megatron Bridge leaves out of its overrides: they can be called."""
    from megatron.bridge.training.utils.omegaconf_utils import parse_hydra_overrides
    from omegaconf import OmegaConf

    if not overrides:
        return
    names = [field.name for field in dataclasses.fields(peft) if field.init and field.name != "canonical_mapping"]
    values = OmegaConf.create({"peft": {name: getattr(peft, name) for name in names}})
    values = OmegaConf.to_container(parse_hydra_overrides(values, overrides))["peft"]
    for name, value in values.items():
        setattr(peft, name, value)


def _lookup(cfg: Any, key: str) -> Any:
    """The value at a dotted key of nested dataclasses and dictionaries."""
    value, path = cfg, []
    for part in key.split("."):
        known = _keys(value)
        if part not in known:
            hint = suggestion(part, known)
            if hint:
                closest = hint.split("'")[1]
                hint = f": did you mean '{'.'.join([*path, closest])}'?"
            where = f"; {'.'.join(path)} has {', '.join(sorted(known)[:8])} …" if path and known else ""
            top = f": the top-level keys are {', '.join(sorted(known))}" if not path else where
            raise UserError(f"unknown override key '{key}'{hint or top}")
        value = value[part] if isinstance(value, dict) else getattr(value, part)
        path.append(part)
    return value


def _keys(value: Any) -> list[str]:
    if dataclasses.is_dataclass(value):
        return [field.name for field in dataclasses.fields(value) if not field.name.startswith("_")]
    return [str(key) for key in value] if isinstance(value, dict) else []


def _check_section(key: str, value: Any, text: str) -> None:
    """Refuse to put a value in the place of a whole section; ``mixed_precision`` may be a name."""
    optional = value is None and "." not in key
    if key == "mixed_precision" or (optional and text == "null"):
        return
    if dataclasses.is_dataclass(value):
        number = next((name for name in ("num_layers", "train_iters", "lr") if name in _keys(value)), _keys(value)[0])
        raise UserError(f"{key} is a section, not a value: set one of its keys, as in {key}.{number}=…")
    if optional:
        raise UserError(f"{key} is a section that this recipe does not have: leave it unset, or set it in a recipe")


def _annotation(cfg: Any, key: str) -> Any:
    """The declared type of a dataclass field; None for an entry of a dictionary."""
    parent, _, name = key.rpartition(".")
    owner = _lookup(cfg, parent) if parent else cfg
    if not dataclasses.is_dataclass(owner):
        return None
    return next((field.type for field in dataclasses.fields(owner) if field.name == name), None)


def _sync_seq_length(cfg: Any, overridden: Iterable[str]) -> None:
    """Model and data have a sequence length each; whoever sets one means both."""
    if "model.seq_length" in overridden and "dataset.seq_length" not in overridden:
        cfg.dataset.seq_length = cfg.model.seq_length
    cfg.model.seq_length = cfg.model.seq_length if cfg.dataset is None else cfg.dataset.seq_length


def _sync_sequence_parallel(cfg: Any, overridden: Iterable[str]) -> None:
    """Sequence parallelism comes with tensor parallelism, as in the recipes, and goes with it."""
    overridden = set(overridden)
    if "model.tensor_model_parallel_size" in overridden and "model.sequence_parallel" not in overridden:
        cfg.model.sequence_parallel = (cfg.model.tensor_model_parallel_size or 1) > 1


def _sync_packing(cfg: Any, overridden: Iterable[str]) -> None:
    """Rows that Megatron Bridge packs itself are as long as a row, of pieces that the layout can cut.

    Rows that are packed already are left alone: `sft_dataset.check_sft_dataset` compares them with the layout.
    """
    specs = getattr(cfg.dataset, "offline_packing_specs", None)
    if specs is None or specs.packed_train_data_path is not None:
        return
    section, model = "dataset.offline_packing_specs", cfg.model
    if f"{section}.packed_sequence_size" not in overridden:
        specs.packed_sequence_size = cfg.dataset.seq_length
    if f"{section}.pad_seq_to_mult" not in overridden:
        specs.pad_seq_to_mult = pad_multiple(
            model.tensor_model_parallel_size or 1, model.context_parallel_size or 1, model.sequence_parallel
        )
    if (model.context_parallel_size or 1) > 1:
        # a rank may have no answer in its share of a row
        model.calculate_per_token_loss, cfg.ddp.average_in_collective = True, False


def _sync_precision(cfg: Any) -> None:
    """Give the model the dtypes of ``mixed_precision``, as Megatron Bridge will: it is checked with them."""
    from megatron.bridge.training.mixed_precision import get_mixed_precision_config

    if cfg.mixed_precision is None:
        return
    try:
        precision = get_mixed_precision_config(cfg.mixed_precision)
    except ValueError as error:
        raise UserError(f"mixed_precision={cfg.mixed_precision!r} is not known ({one_line(error)})") from error
    precision.finalize()
    precision.setup(cfg.model, cfg.optimizer, cfg.ddp)


def use_hf_model(cfg: Any, hf: str | Path, *, pretrained: str | Path | None = None) -> None:
    """Train the model of a Hugging Face checkpoint, from its weights and with its tokenizer.

    The recipe's layout, recomputation, sequence length, precision and loss stay, and its ternary layers.

    Args:
        cfg: a ``ConfigContainer``; changed in place.
        hf: the checkpoint's directory.
        pretrained: where the weights come from: a Megatron checkpoint, or `hf` itself where None.

    Raises:
        UserError: the model is not supported.
    """
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf)
    try:
        model = bridge.to_megatron_provider(load_weights=False)
    except (ValueError, NotImplementedError) as error:
        raise UserError(message_of(error)) from error
    recipe = cfg.model
    kept = (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "cp_comm_type",
        "sequence_parallel",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
        "pipeline_model_parallel_layout",
        "seq_length",
        "make_vocab_size_divisible_by",
        "recompute_granularity",
        "recompute_method",
        "recompute_num_layers",
        "recompute_modules",
        "calculate_per_token_loss",
        "fp32_residual_connection",
        "cuda_graph_impl",
        "cuda_graph_warmup_steps",
    )
    for name in kept:
        setattr(model, name, getattr(recipe, name))
    for name in ("recompute_mixer", "recompute_gates"):
        if getattr(recipe, name, False) and hasattr(model, name):
            setattr(model, name, True)
    if getattr(recipe, "use_bitnet", False) and hasattr(model, "use_bitnet"):
        model.use_bitnet = True
        model.bitnet_backend, model.bitnet_warmup_steps = recipe.bitnet_backend, recipe.bitnet_warmup_steps
    cfg.model = model
    cfg.checkpoint.pretrained_checkpoint = str(pretrained or hf)
    cfg.tokenizer.tokenizer_type = "HuggingFaceTokenizer"
    cfg.tokenizer.tokenizer_model = str(hf)
    cfg.tokenizer.vocab_size = None
