"""What the loss counts of a conversation: the answers, each with the token that ends it, and nothing else."""

import numpy as np
import pytest

from falcon_bridge.data.chat import ChatConverter, conversation
from falcon_bridge.data.documents import Document
from falcon_bridge.data.rows import BadRow
from falcon_bridge.data.tokenizer import load_tokenizer
from falcon_bridge.errors import UserError
from tests.unit.data.chats import conversations


@pytest.fixture(params=["marked", "difference"])
def converter(request, tokenizers):
    return ChatConverter(load_tokenizer(tokenizers / request.param), np.uint16, 10_000)


def by_hand(tokenizer, messages):
    """Tokens and mask piece by piece: special tokens keep the pieces' tokens apart."""
    tokens, mask = [], []

    def add(text, target):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens.extend(ids)
        mask.extend([target] * len(ids))

    for number, message in enumerate(messages):
        add(("\n" if number else "") + "<bos>", 0)
        add(message["role"] + "\n", 0)
        add(message["content"] + "<eos>", int(message["role"] == "assistant"))
    add("\n", 0)
    return tokens, mask


def test_the_mask_is_the_answers(converter):
    rows = conversations(40)
    documents = converter.convert(rows)
    for row, document in zip(rows, documents, strict=True):
        tokens, mask = by_hand(converter.tokenizer, row["messages"])
        assert document.tokens.tolist() == tokens
        assert document.mask.tolist() == mask
        assert document.tokens.dtype == np.uint16 and document.mask.dtype == np.uint8


def test_both_styles_of_template_agree(tokenizers):
    rows = conversations(20, seed=1)
    marked, difference = (
        ChatConverter(load_tokenizer(tokenizers / name), np.uint16, 10_000) for name in ("marked", "difference")
    )
    assert marked.marked and not difference.marked
    for one, other in zip(marked.convert(rows), difference.convert(rows), strict=True):
        assert (one.tokens == other.tokens).all() and (one.mask == other.mask).all()


def test_names_of_other_formats(converter):
    messages = conversations(1)[0]["messages"][-2:]
    named = {"user": "human", "assistant": "gpt"}
    rows = [
        {"messages": messages},
        {"conversations": [{"from": named[m["role"]], "value": m["content"]} for m in messages]},
        {"messages": None, "conversations": [{**m, "tool_calls": None} for m in messages]},
    ]
    first, *others = converter.convert(rows)
    assert all((other.tokens == first.tokens).all() for other in others)
    with_system = {"system": "be brief", **rows[1]}
    assert conversation(with_system)[0] == {"role": "system", "content": "be brief"}
    assert conversation(rows[2]) == messages


USER, ANSWER = {"role": "user", "content": "def"}, {"role": "assistant", "content": "class"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": "a"}, "neither 'messages' nor 'conversations'"),
        ({"messages": []}, "the messages are not a list of objects"),
        ({"messages": ["a"]}, "the messages are not a list of objects"),
        ({"messages": [USER]}, "no turn of the assistant"),
        ({"messages": [USER, {"content": "a"}]}, "turn 2 has no role"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "the content of turn 2 is not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]},
            "the content of turn 1 is not text",
        ),
        ({"messages": [{"role": "user", "content": "\udc00"}, ANSWER]}, "the content of turn 1 has half"),
    ],
)
def test_bad_conversations(row, reason, converter):
    good, bad = converter.convert([{"messages": [USER, ANSWER]}, row])
    assert isinstance(good, Document)
    assert isinstance(bad, BadRow) and str(bad).startswith(reason)


def test_long_conversations(tokenizers, converter):
    rows = conversations(6, seed=2)
    whole = converter.convert(rows)
    limit = sorted(len(document.tokens) for document in whole)[3]
    short = ChatConverter(converter.tokenizer, np.uint16, limit)
    cut = ChatConverter(converter.tokenizer, np.uint16, limit, truncate=True)
    for document, left, truncated in zip(whole, short.convert(rows), cut.convert(rows), strict=True):
        length = len(document.tokens)
        if length > limit:
            assert str(left) == f"{length} tokens, more than {limit}"
        else:
            assert (left.tokens == document.tokens).all()
        assert (truncated.tokens == document.tokens[:limit]).all()
        assert (truncated.mask == document.mask[:limit]).all()


def with_template(tokenizers, template):
    tokenizer = load_tokenizer(tokenizers / "plain")
    tokenizer.chat_template = template
    return ChatConverter(tokenizer, np.uint16, 10_000)


TURNS = "{% for m in messages %}{{ '<bos>' + m['role'] + '\n' + m['content'] + '<eos>\n' }}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (TURNS, "the chat template has no generation prompt, and '<bos>assistant\\nclas"),
        (
            "{% for m in messages %}{{ m['content'] }}{% if loop.last %}{{ '!' }}{% endif %}{% endfor %}",
            "the chat template renders turn 2 otherwise",
        ),
        # the prompt ends in the middle of what is one token of the whole
        (
            "{% for m in messages %}{{ '<bos>' + m['role'] + ':' + m['content'] + '<eos>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<bos>assistant:cl' }}{% endif %}",
            "a token lies across the beginning of the assistant's turn 2",
        ),
        (TURNS + "{{ raise_exception('only users') }}", "the chat template refuses it"),
    ],
)
def test_templates_that_would_train_on_something_else(template, reason, tokenizers):
    # "class" is one token of this tokenizer
    (bad,) = with_template(tokenizers, template).convert([{"messages": [USER, ANSWER, USER, ANSWER]}])
    assert isinstance(bad, BadRow) and str(bad).startswith(reason)


def test_a_template_without_a_header_needs_no_generation_prompt(tokenizers):
    template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ '<bos>' + m['content'] + '<unk>' }}"
        "{% else %}{{ m['content'] + '<eos>' }}{% endif %}{% endfor %}"
    )
    converter = with_template(tokenizers, template)
    (document,) = converter.convert([{"messages": [USER, ANSWER, USER, ANSWER]}])
    targets = document.tokens[document.mask.astype(bool)]
    assert converter.tokenizer.decode(targets) == "class<eos>class<eos>"


def test_a_tokenizer_without_a_template(tokenizers):
    with pytest.raises(UserError, match="has no chat template"):
        with_template(tokenizers, None)
