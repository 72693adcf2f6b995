import json

import pytest

from falcon_bridge.demo.text import python_reference, train_tokenizer
from tests.unit.data.chats import DIFFERENCE, MARKED


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory):
    """Directories of one real tokenizer: without a chat template, with marks in it, and with a template without."""
    base = tmp_path_factory.mktemp("tokenizers")
    tokenizer = train_tokenizer(python_reference().train[:20], 600, base / "plain", 1024)
    for name, template in (("marked", MARKED), ("difference", DIFFERENCE)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base / name)
    tokenizer.chat_template = None
    return base


@pytest.fixture(scope="session")
def tokenizer(tokenizers):
    from falcon_bridge.data.tokenizer import load_tokenizer

    return load_tokenizer(tokenizers / "plain")


@pytest.fixture
def write_jsonl(tmp_path):
    """Write rows (objects, or strings as they are) to a file."""

    def write(name, rows):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write
