"""Megatron's named RNG streams on a machine without CUDA: its own tracker, played through torch's CPU generator.

``CudaRNGStatesTracker`` stays upstream's class. It keeps a state for each stream ("model-parallel-rng", which differs
between tensor-parallel ranks, and "data-parallel-rng", which does not) and swaps it with the CUDA generator's; here
the default CPU generator takes the CUDA generator's part.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch


def get_rng_state(*args: object, **kwargs: object) -> torch.Tensor:
    """The default CPU generator's state, uint8 ``[5056]``, whatever device is asked for."""
    return torch.default_generator.get_state()


def set_rng_state(new_state: torch.Tensor, *args: object, **kwargs: object) -> None:
    """Set the default CPU generator's state, whatever device is named."""
    torch.default_generator.set_state(new_state)


def manual_seed(seed: int) -> None:
    """Seed the default CPU generator."""
    torch.default_generator.manual_seed(seed)


def beside_the_models_stream(draw: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``draw`` on a stream of its own, so that it leaves the default CPU generator where it was."""
    stream = torch.Generator().manual_seed(torch.initial_seed())

    @functools.wraps(draw)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        models_state = get_rng_state()
        set_rng_state(stream.get_state())
        try:
            return draw(*args, **kwargs)
        finally:
            stream.set_state(get_rng_state())
            set_rng_state(models_state)

    return wrapper


@contextlib.contextmanager
def without_fork_warning() -> Iterator[None]:
    """Drop ``fork()``'s warning that the CPU generator moved: in its place on a GPU that would be a mistake."""

    def keep(record: logging.LogRecord) -> bool:
        return "CPU RNG state changed within GPU RNG context" not in record.getMessage()

    logger = logging.getLogger("megatron.core.tensor_parallel.random")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def also_seed_streams(set_random_seed: Callable[..., None]) -> Callable[..., None]:
    """Bridge's ``_set_random_seed``, followed by what it does only where torch counts a GPU."""

    @functools.wraps(set_random_seed)
    def wrapper(
        seed_: int,
        data_parallel_random_init: bool = False,
        te_rng_tracker: bool = False,
        inference_rng_tracker: bool = False,
        use_cudagraphable_rng: bool = False,
        *,
        pg_collection: Any,
    ) -> None:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
        from megatron.core.utils import get_pg_rank

        set_random_seed(seed_, data_parallel_random_init, pg_collection=pg_collection)
        model_parallel_cuda_manual_seed(
            torch.initial_seed(),  # what Bridge made of seed_ and the pipeline and data-parallel ranks
            te_rng_tracker,
            inference_rng_tracker,
            tp_rank=get_pg_rank(pg_collection.tp),
            ep_rank=get_pg_rank(pg_collection.ep),
            etp_rank=get_pg_rank(pg_collection.expt_tp),
        )

    return wrapper


def also_seed_streams_of_conversion(temporary_context: Callable[..., Any]) -> Callable[..., Any]:
    """Bridge's ``temporary_distributed_context``, with the RNG streams seeded as it does where there is a GPU."""

    @functools.wraps(temporary_context)
    @contextlib.contextmanager
    def wrapper(*args: Any, **kwargs: Any) -> Iterator[None]:
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        with temporary_context(*args, **kwargs):
            callers_state = get_rng_state()
            model_parallel_cuda_manual_seed(0)
            set_rng_state(callers_state)
            yield

    return wrapper
