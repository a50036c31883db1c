"""Rows from other people's files -> conversations.

A file is a JSON list, JSON lines, a JSON object that contains one list of rows, or a CSV file with
a header, gzipped or not. A row has a list of messages, or a question and an answer. FIELDS lists
their names.
"""
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from pathlib import Path
from reprlib import repr as short  # abbreviates what is long or deep

from config import UserError
from data.download import fetch

# Field names, case-insensitive. If several fit, the first one listed is used.
FIELDS = {"messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
          "question": ("instruction", "question", "prompt", "query"),
          "context": ("input", "context"),  # appended to the question, or used as the question
          "answer": ("output", "response", "answer", "completion")}
SYSTEM = ("system", "system_prompt")  # put before the first question
KNOWN = {*SYSTEM, "history", "category", *(name for names in FIELDS.values() for name in names)}
ROLE, CONTENT = ("role", "from", "speaker"), ("content", "value", "text")  # of a message
WEIGHT = ("train", "weight", "loss_weight")  # of a message: 0 or False excludes it from training
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system",
         "developer": "system", **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard",
                                                 "bot", "chatbot", "model", "ai"), "assistant")}
# Fields that show that a data set has a different purpose: no text, or no single answer to learn.
OTHER_DATA = ("image", "images", "audio", "audios", "video", "videos", "choices", "endings",
              "chosen", "rejected", "non_preferred_output")
# White space, the zero-width space and the byte-order mark: removed at both ends of a text.
BLANKS = "".join(filter(str.isspace, map(chr, range(2**16)))) + "\u200b\ufeff"


class BadRow(UserError):
    """A row that cannot become a conversation. `reason` is a short label to count such rows by."""

    def __init__(self, reason, where, wanted, found):
        super().__init__(f"{where}: {wanted}, found {short(found)}")
        self.reason = reason


def to_messages(row, where, report):
    """Return (messages, category) of one row of a file. Messages alternate, the user's first:
    consecutive ones by one role are joined by newlines, as are a question and its context. A first
    message by the assistant and a last one by the user are left out. System texts are put before
    the first question. `report`, a Counter, counts these, and unused fields. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("not an object", where, "must have a question and an answer", row)
    row = without_nulls(row)
    for name in OTHER_DATA:
        if row.get(name):
            raise BadRow(f"has {name!r}", where, "must have a question and an answer in text", name)
    if row.get("label") is False:  # KTO's, for a bad answer
        raise BadRow("label is false", where, "must have a good answer", {"label": False})
    found = find_messages(row, where)
    systems, messages = [check_text(row, name, where).strip(BLANKS) for name in SYSTEM], []
    for number, message in enumerate(found, 1):
        role, text = read_message(message, f"{where}, message {number}")
        if role == "system":
            systems.append(text)
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] = "\n".join(filter(None, (messages[-1]["content"], text)))
        else:
            messages.append({"role": role, "content": text})
    for end, role, which in ((0, "assistant", "first"), (-1, "user", "last")):
        if messages and messages[end]["role"] == role:
            report[f"left out: a {which} message by the {role}"] += 1
            del messages[end]
    if not messages:
        raise BadRow("no answer to a question", where, "must have a user's message and an answer",
                     found)
    systems = list(dict.fromkeys(filter(None, systems)))  # some rows repeat it
    if systems and messages[0]["content"]:
        messages[0]["content"] = "\n".join([*systems, messages[0]["content"]])
        report["system text before the question"] += 1
    category = str(row.get("category", ""))
    check_characters([category, *(m["content"] for m in messages)], where)
    report.update(f"not used: {short(name)}" for name in row.keys() - KNOWN
                  if row[name] not in ("", [], {}))
    return messages, category


def find_messages(row, where):
    """Return the messages of a row as the file has them. Raises BadRow."""
    used = {kind: next((name for name in names if name in row), None)
            for kind, names in FIELDS.items()}
    if name := used["messages"]:
        if not isinstance(row[name], list):
            raise BadRow("wrong type", where, f"{name!r} must be a list of messages", row[name])
        return row[name]
    if not used["answer"] or not (used["question"] or used["context"]):
        raise BadRow("unknown layout", where, "must have 'messages', or a question "
                     f"{FIELDS['question']} and an answer {FIELDS['answer']} (plain text is "
                     "for python -m data.text)", [*row])
    messages, history = [], row.get("history", [])  # [["earlier question", "answer"], ...]
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise BadRow("wrong type", where, "'history' must be a list of pairs", history)
    for pair in history:
        messages += [{"role": role, "content": text} for role, text in zip(("user", "bot"), pair)]
    for kind, role in (("question", "user"), ("context", "user"), ("answer", "assistant")):
        name = used[kind]
        if name and isinstance(row[name], list):  # of messages
            messages += row[name]
        elif name:
            messages.append({"role": role, "content": check_text(row, name, where)})
    return messages


def read_message(message, where):
    """Return (role, text) of one message. Raises BadRow."""
    if not isinstance(message, dict):
        raise BadRow("wrong type", where, "must be an object", message)
    message = without_nulls(message)
    role_field, text_field = first_of(ROLE, message), first_of(CONTENT, message)
    role, text = message.get(role_field), message.get(text_field)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("unknown role", where, f"{role_field!r} must be one of {', '.join(ROLES)}",
                     role)
    role = ROLES[role.lower()]
    if role == "assistant" and any(message.get(name) == 0 for name in WEIGHT):  # or False
        raise BadRow("excluded from training", where, "must not be excluded from training", message)
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                      for part in text):
        text = "\n".join(check_text(part, first_of(CONTENT, part), where) for part in text)
    return role, check_text({text_field: text}, text_field, where).strip(BLANKS)


def first_of(names, fields):
    """Return the first of the names that is a field, or else the first one."""
    return next((name for name in names if name in fields), names[0])


def without_nulls(row):
    """Return a row with field names in lower case, without null and NaN."""
    return {name.lower(): value for name, value in row.items()
            if value is not None and value == value}


def check_text(row, name, where):
    """Return the text in a field, "" for none. Raises BadRow."""
    if not isinstance(row.get(name, ""), str):
        raise BadRow("wrong type", where, f"{name!r} must be text", row[name])
    return row.get(name, "")


def check_characters(texts, where):
    """Raise BadRow for texts that contain a lone surrogate, which UTF-8 cannot encode."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("lone surrogate", where, "must not contain a lone surrogate",
                     error.object[error.start]) from error


def read_sources(sources, folder, drop, report):
    """Return (conversations, paths) of comma-separated files or URLs. A URL is downloaded
    into `folder` first. For drop and report see read_conversations. Raises UserError or OSError."""
    paths = [fetch(name.strip(), folder) for name in sources.split(",")]
    if len(set(paths)) < len(paths):
        raise UserError(f"source={sources}: two sources have the same file name; list each "
                        "file once, or rename one")
    conversations = []
    for path in paths:
        try:
            found = read_conversations(path, report, drop)
        except BadRow as error:
            raise UserError(f"{error} (--bad_rows=drop leaves such rows out)") from error
        if not found:
            raise UserError(f"{path}: contains no rows that can become a chat: {dict(report)}")
        conversations += found
    return conversations, paths


def read_conversations(path, report=None, drop=False):
    """Return all rows of a file as (messages, category) pairs (see to_messages). drop: leave bad
    rows out and count them in `report`, instead of raising BadRow. Raises as read_rows does."""
    report, conversations = Counter() if report is None else report, []
    for number, row in enumerate(read_rows(path), 1):
        report["rows read"] += 1
        counts = Counter()
        try:
            conversations.append(to_messages(row, f"{path}, row {number}", counts))
            report.update(counts)
        except BadRow as error:
            if not drop:
                raise
            report[f"dropped: {error.reason}"] += 1
    return conversations


def read_rows(path):
    """Return the rows of a JSON, JSON-lines or CSV file, gzipped or not, as Python values of any
    type. Raises UserError, or OSError if there is no file."""
    path = Path(path)
    if path.is_dir():  # "" is one: /save and /load without a name
        raise IsADirectoryError(f"{path}: is a folder; name a file in it")
    content = path.read_bytes()
    try:
        if content.startswith(b"\x1f\x8b"):
            content = gzip.decompress(content)
        text = content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        if ".csv" in path.suffixes:
            return list(csv.DictReader(io.StringIO(text), restkey="(no name)", strict=True))
        return parse_json(text)
    except (ValueError, csv.Error, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: cannot be read: {error}; expected JSON, JSON lines or CSV in "
                        "UTF-8, gzipped or not (plain text is for python -m data.text)") from error


def parse_json(text):
    """Return the rows of a JSON list, of an object that contains one list of rows, or of JSON
    lines. Raises json.JSONDecodeError."""
    values, blanks = [], re.compile(r"\s*")
    at = blanks.match(text).end()
    while not values or at < len(text):
        value, at = json.JSONDecoder().raw_decode(text, at)
        values.append(value)
        at = blanks.match(text, at).end()
    if len(values) > 1 or not isinstance(values[0], (list, dict)):
        return values
    if isinstance(values[0], list):
        return values[0]
    # One object: {"data": [{...}, ...]}, or the only row of a file, with messages or an answer.
    lists = [v for v in values[0].values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    is_row = len(lists) != 1 or not lists[0][0].keys().isdisjoint(ROLE) or (
        not values[0].keys().isdisjoint(FIELDS["answer"]))
    return values if is_row else lists[0]
