"""The verbs that make data, as a user runs them."""

import json

import pytest

from falcon_bridge.data.info import sft_info
from falcon_bridge.demo.text import python_reference
from tests.unit.data.chats import conversations
from tests.unit.data.conftest import tokenizers, write_jsonl  # noqa: F401  fixtures


@pytest.fixture
def chat(write_jsonl):  # noqa: F811
    return write_jsonl("chat.jsonl", [*conversations(30), {"messages": []}])


def test_prepare(run, write_jsonl, tokenizers, tmp_path):  # noqa: F811
    rows = [{"content": text} for text in python_reference().train[:8]]
    path = write_jsonl("a.jsonl", [*rows, "{"])
    command = ["data", "prepare", path, "--tokenizer", tokenizers / "plain", "--out", tmp_path / "out" / "x.bin"]
    result = run(*command, "--text-key", "content", "--json")
    assert result.exit_code == 0, result.stderr
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert found["ok"] and found["documents"] == 8 and found["bad_rows"] == 1
    assert found["first_bad_rows"][0]["line"] == 9
    assert f"{path}:9: not JSON" in result.stderr.replace("\n", "")
    assert found["out"] == str(tmp_path / "out" / "x") and json.loads((tmp_path / "out" / "x.json").read_text())
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"x.bin", "x.idx", "x.json"}

    again = run(*command, "--text-key", "content")
    assert again.exit_code == 2 and "x.bin exists" in again.stderr
    strict = run(*command, "--text-key", "content", "--force", "--max-bad-rows", 0)
    assert strict.exit_code == 1 and "more than 0 bad rows" in strict.stderr
    # what was there stands until the new one is whole
    assert (tmp_path / "out" / "x.idx").exists()
    wrong = run(*command, "--force", "--json")
    assert wrong.exit_code == 1 and "all 9 rows are bad" in json.loads(wrong.stdout)["error"]
    forced = run(*command, "--text-key", "content", "--force")
    assert forced.exit_code == 0 and "8 documents" in forced.stdout


def test_prepare_chat(run, chat, tokenizers, tmp_path):  # noqa: F811
    command = ["data", "prepare-chat", chat, "--tokenizer", tokenizers / "marked", "--out", tmp_path / "out"]
    result = run(*command, "--seq-length", 512, "--cp", 2, "--validation-share", 0.1, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["documents"], found["bad_rows"], found["pad_multiple"], found["mask"]) == (30, 1, 4, "template")
    assert found["training"]["conversations"] == 27 and found["validation"]["conversations"] == 3
    assert f"{chat}:31: the messages are not a list" in result.stderr.replace("\n", "")
    assert sft_info(tmp_path / "out").pad_multiple == 4
    again = run(*command, "--seq-length", 256)
    assert again.exit_code == 2 and "exists" in again.stderr
    shown = run(*command, "--seq-length", 512, "--force")
    assert shown.exit_code == 0 and "30 conversations" in shown.stdout and "filled" in shown.stdout


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["prepare", "none.jsonl"], "none.jsonl does not exist"),
        (["prepare", "{chat}", "--tokenizer", "./none"], "./none does not exist"),
        (["prepare", "{chat}", "--bos", "--split", "x", "--workers", "0"], "--workers"),
        (["prepare-chat", "{chat}", "--seq-length", "63", "--tp", "2", "--sequence-parallel"], "a multiple of 2"),
        (["prepare-chat", "{chat}", "--seq-length", "64"], "has no chat template"),
    ],
)
def test_bad_arguments(arguments, problem, run, chat, tokenizers, tmp_path):  # noqa: F811
    arguments = [argument.format(chat=chat) for argument in arguments]
    if "--tokenizer" not in arguments:
        arguments += ["--tokenizer", tokenizers / "plain"]
    result = run("data", *arguments, "--out", tmp_path / "out" / "x")
    assert result.exit_code == 2
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("error:") and problem in message
    assert not (tmp_path / "out").exists()
