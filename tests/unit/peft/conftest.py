"""A random checkpoint, chats packed for it, and runs of the tiny recipes on them."""

import dataclasses
import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import falcon_bridge  # noqa: F401  before Megatron Bridge
from falcon_bridge.training.run import configure, run_pretrain
from falcon_bridge.verification.checkpoints import write_random_checkpoint


CHATS, ROW = 23, 96
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}w3 {% generation %}{{ m['content'] }} w11 "
    "{% endgeneration %}{% else %}w2 {{ m['content'] }} {% endif %}{% endfor %}"
)


@dataclasses.dataclass
class Chats:
    """Where the checkpoint, the conversations and the packed rows are."""

    hf: Path
    data: Path
    conversations: list[list[dict[str, str]]]
    rows: int

    def run(self, recipe: str, out: Path, steps: int, *overrides: str, **options) -> list[float]:
        """Losses of the steps that a run adds; each step takes all rows, so each row counts in each."""
        cfg = configure(
            recipe,
            [
                f"train.train_iters={steps}",
                f"train.global_batch_size={self.rows}",
                "validation.eval_iters=0",
                "scheduler.lr_decay_iters=40",
                "scheduler.lr_wsd_decay_iters=10",
                "optimizer.lr=2e-2",
                f"checkpoint.save={out}",
                f"checkpoint.load={out}",
                *overrides,
            ],
            dataset=self.data,
            hf_path=str(self.hf),
            **options,
        )
        losses = []
        run_pretrain(cfg, 1, on_event=lambda rank, event: losses.append(event.loss))
        return losses

    def loss(self, model) -> float:
        """Mean over all answers' tokens of transformers' loss, one conversation at a time, never packed."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.hf)
        total, count = 0.0, 0
        for messages in self.conversations:
            encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            ids, answer = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
            with torch.no_grad():
                logits = model(ids[None]).logits[0]
            losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
            total, count = total + losses[answer[1:]].sum().item(), count + int(answer[1:].sum())
        return total / count


@pytest.fixture(scope="session")
def chats(tmp_path_factory) -> Chats:
    import pyarrow.parquet
    from transformers import AutoTokenizer

    from falcon_bridge.data.prepare_chat import prepare_chat

    directory = tmp_path_factory.mktemp("chats")
    hf = write_random_checkpoint(directory / "hf", "groups2_gated_norm", seed=8, num_hidden_layers=2)
    tokenizer = AutoTokenizer.from_pretrained(hf)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(hf)
    draw = random.Random(1)
    words = lambda least, most: " ".join(f"w{draw.randrange(20, 60)}" for _ in range(draw.randint(least, most)))  # noqa: E731
    conversations = [
        [{"role": role, "content": words(1, 12)} for _ in range(draw.randint(1, 2)) for role in ("user", "assistant")]
        for _ in range(CHATS)
    ]
    lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
    (directory / "chats.jsonl").write_text("".join(lines))
    info = prepare_chat([directory / "chats.jsonl"], hf, directory / "data", seq_length=ROW, workers=1)
    assert info.documents == CHATS and not info.bad_rows
    rows = pyarrow.parquet.read_metadata(directory / "data" / "training.idx.parquet").num_rows
    return Chats(hf, directory / "data", conversations, rows)
