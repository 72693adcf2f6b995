"""Building Megatron models for conversion on the ranks of a layout."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from falcon_bridge.compat import cpu_runtime
from falcon_bridge.errors import UserError, message_of


if TYPE_CHECKING:
    from falcon_bridge.verification.layout import ParallelLayout

# safetensors' names
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def preload() -> None:
    """Import what ranks need, so that forked ranks find it there (12–30 s, once)."""
    import megatron.bridge.training.model_load_save  # noqa: F401
    import transformers

    # transformers loads them on first use
    _ = transformers.AutoTokenizer, transformers.AutoModelForCausalLM
    _ = transformers.FalconH1ForCausalLM, transformers.LlamaForCausalLM


@contextlib.contextmanager
def conversion_rank() -> Iterator[torch.device]:
    """The surroundings of a conversion on one rank; yields the device of its model."""
    with cpu_runtime(), torch.no_grad():
        yield torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_provider(bridge: Any, layout: "ParallelLayout", dtype: torch.dtype, *, load_weights: bool) -> Any:
    """The bridge's provider under `layout`, finalized, with the process groups and RNG streams that it needs.

    Raises:
        UserError: the bridge or the provider refuses the config or the layout.
    """
    try:
        provider = bridge.to_megatron_provider(load_weights=load_weights)
        provider.apply_overrides_and_finalize(
            dtype=dtype, overrides={**layout.provider_fields(), "pipeline_dtype": dtype}
        )
    except (ValueError, NotImplementedError, AssertionError) as error:
        raise UserError(message_of(error)) from error
    provider.initialize_model_parallel(seed=0)
    return provider
