"""What ``train`` and ``launch`` both take: the recipe, and what is put on top of it."""

from typing import Annotated

import typer


RecipeOption = Annotated[str, typer.Option("--recipe", help="Name of the recipe; `falcon-bridge recipes` lists them.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Overrides of the recipe, in Hydra's syntax."),
]
DatasetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--dataset",
        metavar="PATH[:WEIGHT]",
        help="What to train on: the prefix of a .bin and .idx (`data prepare`), several of which blend; or for "
        "fine-tuning a directory of packed chats (`data prepare-chat`).",
    ),
]
HFPathOption = Annotated[
    str | None,
    typer.Option("--hf-path", metavar="HF", help="Start from this Hugging Face checkpoint, with its tokenizer."),
]
UseBitnetOption = Annotated[bool, typer.Option("--use-bitnet", help="Make the linear layers ternary (BitNet b1.58).")]
PeftSchemeOption = Annotated[
    str | None, typer.Option("--peft-scheme", help="Adapters of a peft recipe: lora, its default, or dora.")
]
