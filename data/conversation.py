"""The chat format: its only writer and its only reader.

A conversation is a list of messages, {"role": "user" or "assistant", "content": text}, in turns,
the user first. As token ids it is

    <|endoftext|> <|user|> How are you? <|end|> <|assistant|> Fine, thanks. <|end|> <|user|> ...

where each `<|...|>` is a single id. A model is trained on the ids that follow `<|assistant|>`, up
to and with `<|end|>`: it learns to answer and to stop, and not to ask. What people write is always
encoded as ordinary text, so typing "<|end|>" makes harmless tokens, never the one that ends a turn.
"""
import gzip
import json
import zlib
from collections import Counter
from pathlib import Path
from reprlib import repr as short  # cuts what is long or deep

import numpy as np

from config import UserError
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


# ---- rows of anyone's files ----

# The layouts of a row. Chats have a list of messages, under one of these names ...
LISTS = ("messages", "conversations", "conversation")  # OpenAI, ShareGPT, LMSYS
# ... and in each message its role and its text.
MESSAGE = (("role", "content"), ("from", "value"))
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant",
         "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
         "system": "system", "developer": "system"}
# Others have a question, what may follow it on a new line (or be missing), and the answer.
PAIRS = (("instruction", "input", "output"),  # Alpaca
         ("instruction", "context", "response"),  # Dolly
         ("prompt", None, "completion"), ("question", None, "answer"),
         ("question", None, "response"))  # OpenOrca
# What a system message says may stand beside either.
SYSTEM = ("system", "system_prompt")

# What tells that a row is for something else.
OTHER_DATA = {"chosen": "preference data", "rejected": "preference data",
              "non_preferred_output": "preference data",
              "choices": "multiple choice", "endings": "multiple choice"}


class BadRow(UserError):
    """A row that gives no conversation; `reason` says why in a few words, to count such rows by."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


def to_messages(row, where, report=None):
    """One row of a file, in any of the layouts above, as a list of messages and its category.

    Texts of a pair lose the blanks around them; null is as good as missing. What a system message
    says goes before the first question. `category` is optional. `report`, a Counter, is told of
    system texts and of fields that were not used. `where` names the file and row in the BadRow that
    a row of another shape raises.
    """
    report = Counter() if report is None else report
    if not isinstance(row, dict):
        raise BadRow("not an object", f"{where}: expected an object with instruction, input and "
                     f"output, or with messages, found {type(row).__name__} {short(row)}")
    row = {field: value for field, value in row.items() if value is not None}
    check_use(row, where)
    systems = [check_text(row, field, where) for field in SYSTEM]
    category = row.get("category", "")
    category = category if isinstance(category, str) else short(category)
    listed = next((field for field in LISTS if field in row), None)
    fields = (listed,) if listed else find_pair(row, where)
    if listed:
        said, messages = read_messages(row[listed], f"{where}, {listed!r}", report)
        systems += said
    else:
        asked, more, answer = (check_text(row, field, where).strip() for field in fields)
        messages = [{"role": "user", "content": "\n".join(filter(None, (asked, more)))},
                    {"role": "assistant", "content": answer}]
    question = messages[0]["content"]
    systems = list(dict.fromkeys(filter(str.strip, systems)))  # some rows have it twice
    if systems and question.strip():
        messages[0]["content"] = "\n".join([*systems, question])
        report["system text before the question"] += 1
    check_characters([category, *(m["content"] for m in messages)], where)
    count_unused(row, {*fields, *SYSTEM, "category"}, "", report)
    return messages, category


def check_use(row, where):
    """Raise BadRow for a row that is not to be learned from as it stands."""
    for field, what in OTHER_DATA.items():
        if field in row:
            raise BadRow(what, f"{where}: {field!r} is a field of {what}; expected one answer to "
                         "learn from, and no other")
    if row.get("label") is False:  # KTO's
        raise BadRow("marked as a bad answer", f"{where}: 'label' is false, which marks a bad "
                     "answer; expected answers to learn from")


def check_text(row, field, where):
    """The text in a field, "" for none, or a BadRow."""
    text = row.get(field, "")
    if not isinstance(text, str):
        raise BadRow("wrong type", f"{where}: field {field!r} must be text, found "
                     f"{type(text).__name__} {short(text)}")
    return text


def find_pair(row, where):
    """The fields (question, more, answer) of the first of PAIRS that fits, or a BadRow that lists
    them all."""
    for question, more, answer in PAIRS:
        if question in row and answer in row:
            return question, more, answer
    found = ", ".join(map(short, row)) or "none"
    pairs = ", or ".join(f"{question!r} and {answer!r}" for question, _, answer in PAIRS)
    raise BadRow("unknown layout", f"{where}: found the fields {found:.200}; expected 'messages', "
                 f"or {pairs}")


def read_messages(listed, where, report):
    """([system text] or [], messages) of a row's list, or a BadRow: user and assistant in turns,
    ending with the assistant."""
    if not isinstance(listed, list) or not listed:
        raise BadRow("no messages", f"{where}: must be a list of messages, found {short(listed)}")
    names = MESSAGE[0]
    if isinstance(listed[0], dict) and MESSAGE[1][0] in listed[0]:
        names = MESSAGE[1]
    systems, messages = [], []
    for number, m in enumerate(listed, 1):
        place = f"{where}, message {number}"
        if not isinstance(m, dict) or not all(isinstance(m.get(name), str) for name in names):
            raise BadRow("wrong type", f"{place}: expected an object with the texts {names[0]!r} "
                         f"and {names[1]!r}, found {short(m)}")
        role, content = (m[name] for name in names)
        expected = ("user", "assistant")[len(messages) % 2]
        if role not in ROLES:
            raise BadRow("unknown role", f"{place}: unknown role {short(role)}; expected one of "
                         f"{', '.join(map(repr, ROLES))}")
        if ROLES[role] == "assistant" and m.get("weight") == 0:  # OpenAI's
            raise BadRow("not to be learned from", f"{place}: 'weight' is 0, so it is not to be "
                         "learned from; here every answer is")
        if ROLES[role] == "system" and number == 1:
            systems.append(content)
        elif ROLES[role] != expected:
            raise BadRow("turns do not alternate", f"{place}: the role is {role!r}, but turns "
                         f"alternate, user first; expected the {expected}'s")
        else:
            messages.append({"role": expected, "content": content})
        count_unused(m, set(names), "message's ", report)
    if len(messages) % 2 or not messages:
        raise BadRow("ends with the user", f"{where}: the conversation ends with the user; its "
                     "last message must be the assistant's")
    return systems, messages


def count_unused(row, used, whose, report):
    """Count in `report` the fields of a row that hold something and are not used."""
    for field in row.keys() - used:
        if row[field] not in (None, "", [], {}):
            report[f"not used: {whose}{short(field)}"] += 1


def check_characters(texts, where):
    """Raise BadRow for texts with what JSON can spell but UTF-8 cannot hold."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])
        raise BadRow("half a character", f"{where}: holds half of a surrogate pair ({half}), "
                     "which is no character; take it out") from error


def read_conversations(path, report=None, drop=False):
    """All rows of a file as (messages, category) pairs; see to_messages.

    Rows that give no conversation raise BadRow, which names the file, the row and what is wrong.
    drop: they are left out instead, and counted in `report`; a file of nothing else raises all the
    same. Raises what read_rows does, too.
    """
    report = Counter() if report is None else report
    conversations, first = [], None
    for number, row in enumerate(read_rows(path), 1):
        report["rows read"] += 1
        try:
            used = Counter()
            conversations.append(to_messages(row, f"{path}, row {number}", used))
            report.update(used)
        except BadRow as error:
            first = first or error
            if not drop:
                raise
            report[f"dropped: {error.reason}"] += 1
    if first and not conversations:
        raise UserError(f"{first}; no row of the file is better")
    return conversations


def read_rows(path):
    """The rows of a JSON list or a JSON-lines file, gzipped or not, as Python values of any kind.

    Raises OSError where there is no file, or ValueError naming the file and the line: empty, not
    UTF-8, not JSON, cut short.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a JSON or JSON-lines file")
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):  # as every gzip file does
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: a gzip file that is cut short or broken; "
                         "fetch it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); "
                         "save it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected a JSON list of rows")
    is_list = text.lstrip().startswith("[")
    try:
        if is_list:
            rows = json.loads(text)
        else:  # JSON lines
            rows, number = [], 0
            for line in text.split("\n"):
                number += 1
                if line.strip():
                    rows.append(json.loads(line))
    except json.JSONDecodeError as error:
        line = error.lineno if is_list else number
        if not is_list and not rows:
            raise UserError(f"{path}, line {line}: not a whole JSON object; expected a list "
                             "of rows, [{...}, ...], or an object on every line") from error
        at_end = error.pos >= len(error.doc.rstrip()) - 1 or error.msg.startswith("Unterminated")
        cut = "; the file seems cut short" if at_end else ""
        raise UserError(f"{path}, line {line}: not JSON: {error.msg}{cut}") from error
    except (RecursionError, ValueError) as error:  # brackets in brackets; digits without end
        raise UserError(f"{path}: holds more than can be read ({error}); "
                         "expected a list of rows") from error
    return rows
