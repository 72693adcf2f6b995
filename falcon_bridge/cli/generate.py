"""The verb ``generate``."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from falcon_bridge.cli.session import DebugOption, JsonOption, Session, session


if TYPE_CHECKING:
    from falcon_bridge.inference.text import Generation, GenerationRequest


def generate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MEGATRON_OR_HF", help="Megatron or Hugging Face checkpoint directory, or a hub id of the latter."
        ),
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above it, sampling.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample among the k most likely tokens; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely tokens that sum to this.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size.")] = 1,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Tokenizer, where the checkpoint has none.")
    ] = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue a text with the Megatron model of a checkpoint.

    Every step computes the whole text again: exact, simple, and slow on long texts. Stops at the eos token.

    [bold]Examples[/bold]

    falcon-bridge generate ./my-falcon-h1 "The lambda expression"

    falcon-bridge generate ./my-megatron-checkpoint "def f(" --temperature 0.7 --top-p 0.9 --seed 1
    """
    with session(json, debug) as current:
        from rich.text import Text

        from falcon_bridge.inference.sampling import Sampling
        from falcon_bridge.inference.text import GenerationRequest

        sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
        request = GenerationRequest(model, prompt, max_new_tokens, sampling, tp, tokenizer)
        generation = _run(current, request)
        current.show(Text(prompt, style="dim"), Text(generation.text))
        current.finish({"ok": True, "prompt": prompt, **asdict(generation)})


def _run(current: Session, request: "GenerationRequest") -> "Generation":
    from falcon_bridge.inference.text import generate_text

    with current.progress() as progress:
        task = progress.add_task("generate", total=request.max_new_tokens, note="loading")
        generation = generate_text(request, on_token=lambda token: progress.update(task, advance=1, note="tokens"))
        progress.update(task, total=len(generation.tokens), note=f"ended by {generation.finish_reason}")
    return generation
