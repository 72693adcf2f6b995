"""Adapters as a Hugging Face PEFT directory."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_bridge.conversion.adapters import AdapterCheckpoint, find_adapters, load_shards, prepare_provider
from falcon_bridge.conversion.atomic import atomic_directory, check_target, is_inside
from falcon_bridge.conversion.megatron_checkpoint import find_megatron_checkpoint, is_megatron_checkpoint
from falcon_bridge.errors import UserError
from falcon_bridge.ranks import run_ranks


if TYPE_CHECKING:
    from torch import Tensor

    from falcon_bridge.peft.lora import LoRALinear

_WEIGHTS_NAME = "adapter_model.safetensors"
# stock PEFT refuses to adapt it: Mamba's kernels read this layer's weight instead of calling the layer
_WHOLE = "out_proj"


def export_adapter(
    megatron: str | Path, target: str | Path, *, base: str | Path | None = None, force: bool = False
) -> Path:
    """Write the adapters of a PEFT run as a directory that ``peft.PeftModel.from_pretrained`` loads.

    Fused layers come apart as they are in transformers: q, k, v and gate, up share an A and have a B each. Stock PEFT
    refuses to adapt Falcon-H1's ``out_proj``; where it was adapted, its merged weights are written whole
    (``modules_to_save``), which makes the directory larger by them.

    Args:
        megatron: the run's checkpoint directory, or one ``iter_*`` of it.
        target: the directory to make; it appears whole or not at all.
        base: the model's checkpoint, where it is no longer where the run found it.
        force: replace `target`.

    Returns:
        `target`.

    Raises:
        UserError: the checkpoint or the target cannot be used.
        JobError: the conversion failed.
    """
    from falcon_bridge.conversion.runtime import preload

    check_target(target, force=force)
    preload()
    adapters = find_adapters(megatron, base)
    if is_inside(target, adapters.checkpoint.iteration_dir):
        raise UserError(f"{target} is inside the checkpoint {adapters.checkpoint.root}: choose another directory")
    with atomic_directory(target, force=force) as partial:
        # one rank, on the CPU: nothing but the adapters is loaded
        run_ranks(_export_on_rank, 1, megatron, base, partial, device="cpu")
    return Path(target)


def _export_on_rank(megatron: Path, base: Path | None, target: Path) -> None:
    from safetensors.torch import save_file

    from falcon_bridge.conversion.runtime import conversion_rank

    with conversion_rank():
        adapters = find_adapters(megatron, base)
        layers = _load_layers(adapters)
        tensors = {}
        for name, layer in layers.items():
            tensors |= {f"base_model.model.{key}": tensor.clone() for key, tensor in _hf_tensors(name, layer)}
        save_file(tensors, target / _WEIGHTS_NAME, metadata={"format": "pt"})
        _lora_config(adapters, layers).save_pretrained(target)


def _load_layers(adapters: AdapterCheckpoint) -> "dict[str, LoRALinear]":
    """The adapted layers by their path; the model is on the meta device but for what is exported."""
    import torch
    from megatron.core.utils import unwrap_model

    from falcon_bridge.models.falcon_h1.bridge import FalconH1Bridge
    from falcon_bridge.peft.lora import LoRALinear
    from falcon_bridge.verification.layout import ParallelLayout

    try:
        FalconH1Bridge.megatron_to_hf_config(adapters.provider)
    except ValueError as error:
        raise UserError(str(error)) from error
    prepare_provider(adapters.provider, ParallelLayout(), transformer_impl="local", use_cpu_initialization=True)
    (model,) = unwrap_model(
        adapters.provider.provide_distributed_model(wrap_with_ddp=False, init_model_with_meta_device=True)
    )
    with torch.device("meta"):
        adapters.peft(model, training=False)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    whole = [name for name in layers if _last(name) == _WHOLE]
    for layer in layers.values():
        layer.adapter.to_empty(device="cpu")
    load_shards([model], adapters.checkpoint.iteration_dir, lambda name: ".adapter." in name)
    for name in whole:
        layers[name].to_wrap.to_empty(device="cpu")
    _load_weights(model, adapters.base, {name: layers[name].weight for name in whole})
    return layers


def _load_weights(model: Any, base: Path, weights: "dict[str, Tensor]") -> None:
    """Fill the weights of layers, by path, from the checkpoint of the model."""
    from safetensors import safe_open

    from falcon_bridge.conversion.safetensors_files import read_headers

    if not weights:
        return
    if is_megatron_checkpoint(base):
        names = {f"{name}.weight" for name in weights}
        load_shards([model], find_megatron_checkpoint(base).iteration_dir, names.__contains__)
        return
    headers = read_headers(base)
    for name, weight in weights.items():
        (hf_name,) = _hf_names(name)
        if hf_name not in headers:
            raise UserError(f"{base} has no {hf_name}: it is not the checkpoint that was adapted")
        with safe_open(headers[hf_name].file, "pt") as file:
            weight.copy_(file.get_tensor(hf_name))


def _hf_names(name: str) -> list[str]:
    """The Hugging Face tensors that a linear layer's weight is made of: q, k, v; gate, up; or one."""
    from falcon_bridge.models.falcon_h1.bridge import FalconH1Bridge

    hf_param = FalconH1Bridge().mapping_registry().megatron_to_hf_lookup(f"{name}.weight").hf_param
    if isinstance(hf_param, str):
        return [hf_param]
    return [hf_param[part] for part in (("q", "k", "v") if "q" in hf_param else ("gate", "up"))]


def _hf_tensors(name: str, layer: "LoRALinear") -> "Iterator[tuple[str, Tensor]]":
    """The tensors of an adapted layer, as PEFT names them under the model."""
    hf_names, adapter = _hf_names(name), layer.adapter
    if _last(name) == _WHOLE:
        yield hf_names[0], layer.merged_weight().to(layer.weight.dtype)
        return
    for number, hf_name in enumerate(hf_names):
        path = hf_name.removesuffix(".weight")
        yield f"{path}.lora_A.weight", adapter.linear_in.weight.data
        yield f"{path}.lora_B.weight", _rows(layer, adapter.linear_out.weight.data, number, len(hf_names))
        if hasattr(adapter, "weight_magnitude"):
            yield f"{path}.lora_magnitude_vector", _rows(layer, adapter.weight_magnitude.data, number, len(hf_names))


def _rows(layer: "LoRALinear", tensor: "Tensor", number: int, parts: int) -> "Tensor":
    """The rows of a fused layer's part: q, k and v lie side by side in each group of heads, gate before up."""
    import torch

    if parts < 3:
        return tensor.chunk(parts)[number]
    config = layer.to_wrap.config
    head_dim = config.kv_channels or config.hidden_size // config.num_attention_heads
    groups = config.num_query_groups
    queries = config.num_attention_heads // groups
    grouped = tensor.unflatten(0, (groups, queries + 2, head_dim))
    return torch.split(grouped, [queries, 1, 1], dim=1)[number].flatten(0, 2)


def _lora_config(adapters: AdapterCheckpoint, layers: "dict[str, LoRALinear]") -> Any:
    from peft import LoraConfig

    modules = {path.removesuffix(".weight") for name in layers if _last(name) != _WHOLE for path in _hf_names(name)}
    whole = [_hf_names(name)[0].removesuffix(".weight") for name in layers if _last(name) == _WHOLE]
    scheme, source = adapters.peft, adapters.checkpoint.hf_source
    base = adapters.base if (adapters.base / "config.json").is_file() else source
    return LoraConfig(
        base_model_name_or_path=str(base or ""),
        task_type="CAUSAL_LM",
        r=scheme.dim,
        lora_alpha=scheme.alpha,
        lora_dropout=scheme.dropout,
        use_dora=any(hasattr(layer.adapter, "weight_magnitude") for layer in layers.values()),
        target_modules=_shortest(modules, adapters.provider.num_layers),
        modules_to_save=_shortest(whole, adapters.provider.num_layers) or None,
        inference_mode=True,
    )


def _shortest(paths: Any, num_layers: int) -> list[str]:
    """Modules by their last name where all layers have them in common, by their whole path otherwise."""
    by_name: dict[str, list[str]] = {}
    for path in paths:
        by_name.setdefault(_last(path), []).append(path)
    short = [[name] if len(found) == num_layers else found for name, found in by_name.items()]
    return sorted(name for names in short for name in names)


def _last(path: str) -> str:
    return path.rpartition(".")[2]
