"""The chat format: its only writer and its only reader.

A conversation is a list of messages, {"role": "user" or "assistant", "content": text}, in turns,
the user first. As token ids it is

    <|endoftext|> <|user|> How are you? <|end|> <|assistant|> Fine, thanks. <|end|> <|user|> ...

where each `<|...|>` is a single id. A model is trained on the ids that follow `<|assistant|>`, up
to and with `<|end|>`: it learns to answer and to stop, and not to ask. What people write is always
encoded as ordinary text, so typing "<|end|>" makes harmless tokens, never the one that ends a turn.
"""
import json
from pathlib import Path

import numpy as np

from data.tokenizer import END_OF_TEXT, ROLE_TOKENS

USER, ASSISTANT, END = ROLE_TOKENS


def chat_template(turns=None):
    """The same format in Jinja, for tools that render chats by template. (They turn a typed
    "<|end|>" into the token; encode_conversation does not.)

    turns: of how many questions the model sees the newest; None: of all; 0: it knows no turns and
    goes on with the newest text. What a system message says goes before the first question.
    """
    if turns == 0:
        return "{{ messages[-1]['content'] or '" + END_OF_TEXT + "' }}"
    newest = f"[-{2 * turns - 1}:]" if turns else ""
    # llama.cpp's older way without Jinja takes a template that holds <|assistant|> for Phi-3's,
    # which has line ends between the messages: here it is in two halves.
    return ("{% set system = '' %}{% set chat = messages %}"
            "{% if messages[0]['role'] == 'system' %}"
            "{% set system = messages[0]['content'] + '\n' %}{% set chat = messages[1:] %}"
            "{% endif %}" + END_OF_TEXT + "{% for m in chat" + newest + " %}"
            "{{ '<|' + m['role'] + '|>' }}{% if loop.first %}{{ system }}{% endif %}"
            "{{ m['content'] + '" + END + "' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assist' + 'ant|>' }}{% endif %}")


def special_ids(enc):
    """The ids of <|endoftext|>, <|user|>, <|assistant|> and <|end|> in a tokenizer."""
    return tuple(enc.encode_single_token(token) for token in (END_OF_TEXT, *ROLE_TOKENS))


def encode_conversation(messages, enc):
    """Messages -> ids: <|endoftext|>, then of each message its role, its text and <|end|>."""
    return encode_conversations([messages], enc)[0]


def encode_conversations(conversations, enc):
    """Many conversations -> a list of id lists; one batch is several times faster than one by
    one."""
    texts = iter(enc.encode_ordinary_batch(
        [m["content"] for messages in conversations for m in messages]))
    return [assemble([(m["role"], next(texts)) for m in messages], enc)
            for messages in conversations]


def assemble(messages, enc):
    """The ids of a conversation from (role, ids of the text) pairs."""
    end_of_text, user, assistant, end = special_ids(enc)
    ids = [end_of_text]
    for role, text in messages:
        ids += [user if role == "user" else assistant, *text, end]
    return ids


def encode_prompt(messages, enc):
    """Messages that end with the user's -> ids that end with <|assistant|>: the model's turn."""
    return encode_conversation(messages, enc) + [special_ids(enc)[2]]


def supervised(ids, enc):
    """Which of `ids` the model is to predict, as booleans: the assistant's text and its <|end|>.

    A pure function of the ids, (n,) -> (n,): a token is supervised if the marker it stands behind,
    the nearest of <|endoftext|>, <|user|> and <|assistant|>, is <|assistant|>.
    """
    ids = np.asarray(ids)  # <|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello <|end|>
    end_of_text, user, assistant, _ = special_ids(enc)
    is_marker = np.isin(ids, (end_of_text, user, assistant))  # 1 1 0 0 1 0 0
    places = np.where(is_marker, np.arange(len(ids)), 0)  # 0 1 0 0 4 0 0: where each marker stands
    nearest = np.maximum.accumulate(places)  # 0 1 1 1 4 4 4: the last marker so far
    return (ids[nearest] == assistant) & ~is_marker  # Hello and its <|end|>


def decode_conversation(ids, enc):
    """Ids -> messages, the way back from encode_conversation."""
    end_of_text, user, assistant, end = special_ids(enc)
    messages, text = [], []
    for i in list(ids):
        if i in (user, assistant):
            messages.append({"role": "user" if i == user else "assistant", "content": ""})
            text = []
        elif i == end:
            messages[-1]["content"] = enc.decode(text)
        elif i != end_of_text:
            text.append(i)
    return messages


def to_text(messages):
    """Messages as a person reads them, role tokens spelled out. For eyes only: nothing reads this
    back."""
    return "\n".join(f"<|{m['role']}|>{m['content']}{END}" for m in messages)


def to_messages(row, where):
    """One row of a file as a list of messages and its category.

    A row is {"instruction", "input", "output"} (`input` may be missing, null or empty, and follows
    the instruction on a new line) or {"messages": [...]}; `category` is optional in both. `where`
    names the file and row in the ValueError that a row of another shape raises.
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with instruction, input and output, found "
                         f"{type(row).__name__}")
    row = {**row, "input": ""} if row.get("input", "") is None else row
    category = row.get("category", "")
    if "messages" in row:
        return check_messages(row["messages"], where), str(category)
    for field in ("instruction", "output"):
        if field not in row:
            raise ValueError(f"{where}: no field {field!r}; found "
                             f"{', '.join(map(repr, row)) or 'none'}, expected 'instruction', "
                             "'input', 'output' (or 'messages')")
    for field in ("instruction", "input", "output", "category"):
        if not isinstance(row.get(field, ""), str):
            raise ValueError(f"{where}: field {field!r} must be text, found "
                             f"{type(row[field]).__name__} {str(row[field])[:40]!r}")
    asked = "\n".join(filter(None, (row["instruction"].strip(), row.get("input", "").strip())))
    return [{"role": "user", "content": asked},
            {"role": "assistant", "content": row["output"].strip()}], category


def check_messages(messages, where):
    """The messages themselves, or a ValueError: user and assistant in turns, ending with the
    assistant."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of messages")
    for i, m in enumerate(messages):
        if not isinstance(m, dict) or not all(isinstance(m.get(field), str)
                                              for field in ("role", "content")):
            raise ValueError(f"{where}, message {i + 1}: expected an object with the texts "
                             "'role' and 'content'")
        if m["role"] not in ("user", "assistant"):
            raise ValueError(f"{where}, message {i + 1}: unknown role {m['role']!r}; use 'user' or "
                             "'assistant'")
        if m["role"] != ("user", "assistant")[i % 2]:
            raise ValueError(f"{where}, message {i + 1}: the role is {m['role']!r}, "
                             "but turns alternate, user first")
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: the conversation ends with the user; its last message "
                         "must be the assistant's")
    return [{"role": m["role"], "content": m["content"]} for m in messages]


def read_conversations(path):
    """All rows of a JSON list or a JSON-lines file, as (messages, category) pairs; see to_messages.

    Raises FileNotFoundError, or ValueError naming the file and the row: empty, not UTF-8, not JSON,
    cut short, or a row of another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a JSON or JSON-lines file of chats")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start}); "
                         "save it as UTF-8") from error
    if not text.strip():
        raise ValueError(f"{path}: the file is empty; expected a JSON list of rows")
    is_list = text.lstrip().startswith("[")
    try:
        if is_list:
            rows = json.loads(text)
        else:  # JSON lines
            rows, number = [], 0
            for line in text.split("\n"):
                number += 1
                rows += [json.loads(line)] if line.strip() else []
    except RecursionError as error:
        raise ValueError(f"{path}: brackets within brackets too deep; "
                         "expected a list of rows") from error
    except json.JSONDecodeError as error:
        line = error.lineno if is_list else number
        if not is_list and not rows:
            raise ValueError(f"{path}, line {line}: not a whole JSON object; expected a list "
                             "of rows, [{...}, ...], or an object on every line") from error
        cut = "; the file seems cut short" if error.pos >= len(error.doc.rstrip()) - 1 or \
            error.msg.startswith("Unterminated") else ""
        raise ValueError(f"{path}, line {line}: not JSON: {error.msg}{cut}") from error
    conversations = [to_messages(row, f"{path}, row {number}")
                     for number, row in enumerate(rows, 1)]
    for number, (messages, _) in enumerate(conversations, 1):
        try:
            "".join(m["content"] for m in messages).encode("utf-8")
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise ValueError(f"{path}, row {number}: holds half of a surrogate pair ({half}), "
                             "which is no character; take it out") from error
    return conversations
