"""What the examples start from, made on the spot: real text, chats about it, a tokenizer, small checkpoints.

    python examples/_tiny.py DIR text tokenizer chats falcon-h1 falcon-edge

makes those that are named in DIR. In your own work their place is taken by your files and by released checkpoints.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from falcon_bridge.demo.text import python_reference, train_tokenizer


SEED, VOCAB_SIZE, CONTEXT = 1234, 1021, 1024
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<eos>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<eos>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>assistant\n' }}{% endif %}"
)


def write_text(directory: Path) -> None:
    """The Python language reference that ships in every CPython, a topic a line: train.jsonl and held_out.jsonl."""
    corpus = python_reference()
    for name, documents in (("train", corpus.train), ("held_out", corpus.held_out)):
        _write_lines(directory / f"{name}.jsonl", [{"text": text} for text in documents])


def write_chats(directory: Path) -> None:
    """chats.jsonl: a question about each topic of the reference, answered with the topic's first paragraph."""
    from pydoc_data.topics import topics

    rows = []
    for name in sorted(topics):
        # the first block is the title, underlined
        paragraph = next((block for block in topics[name].split("\n\n")[1:] if len(block) > 40), None)
        if paragraph is not None:
            question = f"What does Python's reference say about {name}?"
            answer = " ".join(paragraph.split())[:300]
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages})
    _write_lines(directory / "chats.jsonl", rows)


def write_tokenizer(directory: Path):
    """A byte-level BPE tokenizer with a chat template, in `directory` itself; returns it."""
    tokenizer = train_tokenizer(python_reference().train, VOCAB_SIZE, directory, CONTEXT)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(directory)
    return tokenizer


def write_falcon_h1(directory: Path) -> None:
    """A Falcon-H1 of 1M random parameters as a Hugging Face checkpoint with its tokenizer."""
    from falcon_bridge.demo.checkpoint import write_initial_checkpoint

    write_initial_checkpoint(directory, write_tokenizer(directory), SEED, CONTEXT)


def write_falcon_edge(directory: Path) -> None:
    """A Falcon-Edge of 1M random parameters in the prequantized form: the latent weights, marked as a BitNet's."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from falcon_bridge.models.falcon_edge.hf_config import hf_config_fields
    from falcon_bridge.recipes import falcon_edge_tiny_cpu_pretrain_config

    tokenizer = write_tokenizer(directory)
    provider = falcon_edge_tiny_cpu_pretrain_config().model
    provider.vocab_size, provider.max_position_embeddings = len(tokenizer), CONTEXT
    provider.bos_token_id, provider.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    provider.pad_token_id = tokenizer.pad_token_id
    fields = hf_config_fields(provider)
    quantization = fields.pop("quantization_config")  # transformers would look for its kernels
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(LlamaConfig(**fields))
    model.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2) + "\n")


PARTS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "text": (".", write_text),
    "tokenizer": ("tokenizer", write_tokenizer),
    "chats": (".", write_chats),
    "falcon-h1": ("falcon-h1", write_falcon_h1),
    "falcon-edge": ("falcon-edge", write_falcon_edge),
}


def write(directory: Path, *parts: str) -> None:
    """Make the named parts in `directory`, which is made where it is not there."""
    for part in parts:
        folder, make = PARTS[part]
        (directory / folder).mkdir(parents=True, exist_ok=True)
        make(directory / folder)


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    arguments = parser.parse_args()
    write(arguments.directory, *arguments.parts)


if __name__ == "__main__":
    main()
