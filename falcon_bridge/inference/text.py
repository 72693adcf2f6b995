"""Text from a checkpoint directory, on ranks that it starts itself."""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from falcon_bridge.errors import UserError, one_line
from falcon_bridge.inference.sampling import Sampling
from falcon_bridge.ranks import emit, run_ranks
from falcon_bridge.verification.layout import ParallelLayout


if TYPE_CHECKING:
    from megatron.core.transformer import MegatronModule


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Attributes:
        model: Hugging Face checkpoint (directory or hub id), or Megatron checkpoint directory.
        prompt: the text to continue.
        max_new_tokens: where to stop at the latest.
        sampling: how tokens are chosen.
        tp: tensor-parallel size.
        tokenizer: directory of the tokenizer; None takes the one kept with the checkpoint.
    """

    model: str | Path
    prompt: str
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    tp: int = 1
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Generation:
    """What was generated.

    Attributes:
        text: the continuation, special tokens left out.
        prompt_tokens: token ids of the prompt.
        tokens: token ids of the continuation, with the eos token if it ended on one.
        finish_reason: ``"eos"`` or ``"length"``.
        seconds: wall time of the generation, without loading.
    """

    text: str
    prompt_tokens: list[int]
    tokens: list[int]
    finish_reason: str
    seconds: float


@dataclass(frozen=True)
class _Source:
    """Where config and weights are."""

    config_dir: Path | None  # with config.json and, as a rule, a tokenizer
    iteration_dir: Path | None  # of a Megatron checkpoint


def generate_text(
    request: GenerationRequest,
    *,
    on_token: Callable[[int], None] = lambda token: None,
) -> Generation:
    """Load a model and continue the prompt.

    Starts ``request.tp`` ranks: gloo on CPU, NCCL on GPU.

    Args:
        request: what to generate.
        on_token: called with each new token.

    Raises:
        UserError: the model, the tokenizer or an option cannot be used.
        JobError: a rank failed.
    """
    from falcon_bridge.conversion.runtime import preload

    if request.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens must be at least 1, not {request.max_new_tokens}")
    source = _find(request.model)
    tokenizer = _load_tokenizer(request, source)
    prompt = tokenizer(request.prompt).input_ids
    if not prompt:
        raise UserError("the prompt has no token: give at least one word")
    if source.config_dir is not None:
        _check_layout(source.config_dir, request.tp)
    if not torch.cuda.is_available():
        preload()  # once, here: the ranks are forked
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    tokens, reason, seconds = run_ranks(
        _generate_rank,
        request.tp,
        source,
        replace(request, tokenizer=None),
        prompt,
        eos,
        on_event=lambda rank, token: on_token(token),
    )[0]
    return Generation(tokenizer.decode(tokens, skip_special_tokens=True), prompt, tokens, reason, seconds)


def _find(model: str | Path) -> _Source:
    from falcon_bridge.conversion.hf_checkpoint import check_checkpoint
    from falcon_bridge.conversion.megatron_checkpoint import find_megatron_checkpoint, is_megatron_checkpoint

    if is_megatron_checkpoint(model) or Path(model).name.startswith("iter_"):
        checkpoint = find_megatron_checkpoint(model)
        return _Source(checkpoint.hf_source, checkpoint.iteration_dir)
    return _Source(check_checkpoint(model).path, None)


def _load_tokenizer(request: GenerationRequest, source: _Source):
    from transformers import AutoTokenizer

    directory = request.tokenizer or source.config_dir
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if directory is None or not any((directory / name).is_file() for name in names):
        where = directory or request.model
        raise UserError(f"{where} has no tokenizer: give the directory of one with --tokenizer")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"the tokenizer in {directory} cannot be loaded ({one_line(error)})") from error


def _check_layout(config_dir: Path, tp: int) -> None:
    from transformers import AutoConfig

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.from_pretrained(config_dir, trust_remote_code=False)
    ParallelLayout(tp=tp).check(config, seq_length=1, batch_size=1, device=device)


def _generate_rank(
    source: _Source, request: GenerationRequest, prompt: list[int], tokenizer_eos: list[int]
) -> tuple[list[int], str, float]:
    """The work of one rank: new tokens, why it stopped, seconds."""
    from falcon_bridge.conversion.runtime import conversion_rank
    from falcon_bridge.inference.generation import generate

    with conversion_rank() as device:
        model, vocab_size, eos = _load_model(source, ParallelLayout(tp=request.tp), device)
        largest = max(prompt)
        if largest >= vocab_size:
            raise UserError(
                f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size}: it belongs to "
                "another model, give the right one with --tokenizer"
            )
        start, first = time.perf_counter(), torch.distributed.get_rank() == 0
        eos = {*eos, *tokenizer_eos}
        tokens = generate(
            model,
            prompt,
            max_new_tokens=request.max_new_tokens,
            vocab_size=vocab_size,
            eos_token_ids=eos,
            sampling=request.sampling,
            on_token=emit if first else None,
        )
    return tokens, "eos" if tokens[-1] in eos else "length", time.perf_counter() - start


def _load_model(
    source: _Source, layout: ParallelLayout, device: torch.device
) -> "tuple[MegatronModule, int, Collection[int]]":
    """The model in the dtype it is stored in, its vocabulary size and its eos tokens."""
    from megatron.bridge import AutoBridge
    from megatron.bridge.training.model_load_save import load_model_config

    from falcon_bridge.conversion.runtime import prepare_provider

    if source.iteration_dir is None:
        bridge = AutoBridge.from_hf_pretrained(source.config_dir)
        dtype = bridge.hf_pretrained.config.dtype or torch.float32
        provider = prepare_provider(bridge, layout, dtype, load_weights=True)
        chunks = provider.provide_distributed_model(
            wrap_with_ddp=False, use_cpu_initialization=device.type == "cpu", data_parallel_random_init=False
        )
    else:
        from megatron.bridge.training.model_load_save import load_megatron_model

        provider, _ = load_model_config(str(source.iteration_dir))
        chunks = load_megatron_model(
            str(source.iteration_dir),
            use_cpu_init=device.type == "cpu",
            skip_temp_dist_context=True,
            mp_overrides={"tensor_model_parallel_size": layout.tp},
        )
    eos = provider.eos_token_id
    eos = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    return (chunks[0] if isinstance(chunks, list) else chunks), provider.vocab_size, eos
