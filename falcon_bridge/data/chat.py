"""Conversations to tokens by the tokenizer's own chat template, with a mask of what the assistant said."""

import re
from typing import Any

import numpy as np

from falcon_bridge.data.documents import Document, is_unicode
from falcon_bridge.data.rows import BadRow
from falcon_bridge.errors import UserError, one_line


_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ASSISTANT = "assistant"


class ChatConverter:
    """A conversation by the chat template, the loss on the assistant's turns only.

    Where the template marks them with ``{% generation %}``, its marks are taken. Else a turn of the assistant is what
    the rendered conversation has up to its end beyond the rendered conversation before it with the generation prompt;
    a row where one is not the beginning of the other, or where a token lies across the border, is a bad one, since
    what is trained on there would not be what is generated.

    Args:
        tokenizer: a fast Hugging Face tokenizer with an ``eos_token`` and a chat template.
        dtype: of the tokens.
        max_tokens: longer conversations are bad rows.
        truncate: cut them there instead.

    Raises:
        UserError: the tokenizer has no chat template.
    """

    columns, text_key, masked = None, "", True

    def __init__(self, tokenizer: Any, dtype: type[np.number], max_tokens: int, truncate: bool = False) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: give that of the chat model, or add "
                "chat_template.jinja to it"
            )
        if not isinstance(tokenizer.chat_template, str):
            raise UserError(f"the tokenizer {tokenizer.name_or_path} has several chat templates: keep one")
        self.tokenizer, self.dtype, self.max_tokens, self.truncate = tokenizer, dtype, max_tokens, truncate
        added = tokenizer.added_tokens_decoder.values()
        self._special = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
        self.marked = bool(_GENERATION.search(tokenizer.chat_template))

    def convert(self, rows: list[dict[str, Any]]) -> list[Document | BadRow]:
        """A conversation, or why there is none, for each row."""
        return [self._converted(row) for row in rows]

    def _converted(self, row: dict[str, Any]) -> Document | BadRow:
        try:
            messages, tools = conversation(row), row.get("tools") or None
            try:
                tokens, mask = (self._by_marks if self.marked else self._by_difference)(messages, tools)
            except BadRow:
                raise
            except Exception as error:  # a template raises what it likes
                raise BadRow(f"the chat template refuses it ({one_line(error)})") from error
            if len(tokens) > self.max_tokens:
                if not self.truncate:
                    raise BadRow(f"{len(tokens)} tokens, more than {self.max_tokens}")
                tokens, mask = tokens[: self.max_tokens], mask[: self.max_tokens]
            if len(tokens) < 2 or not mask[1:].any():
                raise BadRow("nothing of the assistant to learn from")
        except BadRow as bad:
            return bad
        return Document(tokens.astype(self.dtype), mask)

    def _by_marks(self, messages: list[dict[str, Any]], tools: Any) -> tuple[np.ndarray, np.ndarray]:
        encoded = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(encoded["input_ids"]), np.array(encoded["assistant_masks"], dtype=np.uint8)

    def _by_difference(self, messages: list[dict[str, Any]], tools: Any) -> tuple[np.ndarray, np.ndarray]:
        whole = self._rendered(messages, tools)
        encoded = self.tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        tokens, spans = np.array(encoded["input_ids"]), np.array(encoded["offset_mapping"]).reshape(-1, 2)
        mask = np.zeros(len(tokens), dtype=np.uint8)
        for turn, message in enumerate(messages):
            if message["role"] != ASSISTANT:
                continue
            before = self._rendered(messages[:turn], tools, add_generation_prompt=True) if turn else ""
            after = self._rendered(messages[: turn + 1], tools)
            if not (after.startswith(before) and whole.startswith(after)):
                raise BadRow(
                    f"the chat template renders turn {turn + 1} otherwise within the whole conversation than alone: "
                    "give it {% generation %} marks"
                )
            if before == (self._rendered(messages[:turn], tools) if turn else ""):
                _check_no_header(after[len(before) :], message["content"])
            start, stop = len(before), _end_of_turn(after, self._special)
            if ((spans[:, 0] < start) & (spans[:, 1] > start)).any():
                raise BadRow(f"a token lies across the beginning of the assistant's turn {turn + 1}")
            mask[(spans[:, 0] >= start) & (spans[:, 1] <= stop) & (spans[:, 1] > spans[:, 0])] = 1
        return tokens, mask

    def _rendered(self, messages: list[dict[str, Any]], tools: Any, **options: Any) -> str:
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options)


def conversation(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row, each with ``role`` and ``content``.

    Args:
        row: ``{"messages": [{"role": …, "content": …}, …]}``, or ``{"conversations": [{"from": …, "value": …}, …]}``
            (ShareGPT's names), with an optional ``"system"`` text in front.

    Raises:
        BadRow: it is neither.
    """
    turns = row.get("messages") if row.get("messages") is not None else row.get("conversations")
    if turns is None:
        raise BadRow("neither 'messages' nor 'conversations'")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("the messages are not a list of objects")
    messages = [_message(turn, number) for number, turn in enumerate(turns, 1)]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    if all(message["role"] != ASSISTANT for message in messages):
        raise BadRow("no turn of the assistant")
    return messages


def _message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    role = turn.get("role") if turn.get("role") is not None else turn.get("from")
    if not isinstance(role, str) or not role:
        raise BadRow(f"turn {number} has no role")
    content = turn.get("content") if "content" in turn else turn.get("value")
    # a call of a tool may come without words
    if content is None and turn.get("tool_calls"):
        content = ""
    if not isinstance(content, str):
        raise BadRow(f"the content of turn {number} is not text")
    if not is_unicode(content):
        raise BadRow(f"the content of turn {number} has half a surrogate pair")
    # Parquet gives every message every key that any has
    rest = {key: value for key, value in turn.items() if value is not None}
    for key in ("role", "from", "content", "value"):
        rest.pop(key, None)
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": content, **rest}


def _check_no_header(answer: str, content: str) -> None:
    """Some templates have no generation prompt because nothing stands before an answer; in others it is missing."""
    if not answer.lstrip().startswith(content.strip()):
        raise BadRow(
            f"the chat template has no generation prompt, and {answer[:20]!r} would count as the answer: give it "
            "{% generation %} marks"
        )


def _end_of_turn(text: str, special_tokens: set[str]) -> int:
    """The end of the last turn: without the line break that templates put behind an end-of-turn token."""
    stripped = text.rstrip()
    return len(stripped) if stripped.endswith(tuple(special_tokens)) else len(text)
