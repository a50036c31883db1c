"""Rows of other people's files -> conversations.

A file is a JSON list, JSON lines, a JSON object that contains one list of rows, or a CSV file with
a header, gzipped or not. A row has a list of messages, or a question and an answer. FIELDS has the
names that these go by.
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

# Names of fields, in any case. Of several names for one thing the first counts.
FIELDS = {"messages": ("messages", "conversations", "conversation", "dialog", "dialogue"),
          "question": ("instruction", "question", "prompt", "query"),
          "context": ("input", "context"),  # joins the question, or is the question
          "answer": ("output", "response", "answer", "completion")}
SYSTEM = ("system", "system_prompt")  # put before the first question
ROLE, CONTENT = ("role", "from", "speaker"), ("content", "value", "text")  # of a message
ROLES = {"user": "user", "human": "user", "prompter": "user", "system": "system",
         "developer": "system", **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard",
                                                 "bot", "chatbot", "model", "ai"), "assistant")}
# Fields of rows that are made for something else.
OTHER_DATA = {"chosen": "preference data", "rejected": "preference data",
              "non_preferred_output": "preference data",
              "choices": "multiple choice", "endings": "multiple choice"}
MAGIC = {b"PAR1": "a Parquet", b"PK\x03\x04": "a zip or Excel", b"%PDF": "a PDF"}  # first bytes


class BadRow(UserError):
    """A row that does not make a conversation. `reason` is a short text to count such rows by."""

    def __init__(self, reason, message):
        super().__init__(message)
        self.reason = reason


def to_messages(row, where, report=None):
    """Return (messages, category) of one row of a file. Raises BadRow, which names `where`.

    Messages alternate, the user's first: several by one side are joined by newlines, as are a
    question and its context. A first message by the assistant and a last one by the user are left
    out. System texts are put before the first question. `report`, a Counter, counts these, and
    fields that are not used.
    """
    report = Counter() if report is None else report
    if not isinstance(row, dict):
        raise BadRow("not an object", f"{where}: expected an object with a question and an answer, "
                     f"or with messages, found {type(row).__name__} {short(row)}")
    row = without_nulls(row)
    for name, what in OTHER_DATA.items():
        if name in row:
            raise BadRow(what, f"{where}: {name!r} is a field of {what}; expected one answer to "
                         "learn from")
    if row.get("label") is False:  # KTO's
        raise BadRow("marked as a bad answer", f"{where}: 'label' is false, which marks a bad "
                     "answer; expected answers to learn from")
    found, used = find_messages(row, where)
    systems, messages = [strip(check_text(row, name, where)) for name in SYSTEM], []
    for number, message in enumerate(found, 1):
        role, text = read_message(message, f"{where}, message {number}", report)
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
        raise BadRow("no answer to a question", f"{where}: expected a message by the user and one "
                     "by the assistant after it")
    systems = list(dict.fromkeys(filter(None, systems)))  # some rows repeat it
    if systems and messages[0]["content"]:
        messages[0]["content"] = "\n".join([*systems, messages[0]["content"]])
        report["system text before the question"] += 1
    category = row.get("category", "")
    category = category if isinstance(category, str) else short(category)
    check_characters([category, *(m["content"] for m in messages)], where)
    count_unused(row, {*used, *SYSTEM, "category"}, "", report)
    return messages, category


def find_messages(row, where):
    """Return the messages of a row as the file has them, and the names of the fields used."""
    used = {kind: next((name for name in names if name in row), None)
            for kind, names in FIELDS.items()}
    if name := used["messages"]:
        if not isinstance(row[name], list):
            raise BadRow("wrong type", f"{where}: {name!r} must be a list of messages, found "
                         f"{short(row[name])}")
        return row[name], [name]
    if not used["answer"] or not (used["question"] or used["context"]):
        found = ", ".join(map(short, row)) or "none"
        raise BadRow("unknown layout", f"{where}: found the fields {found:.200}; expected "
                     f"'messages', or a question ({', '.join(FIELDS['question'])}, input) and an "
                     f"answer ({', '.join(FIELDS['answer'])})")
    messages, history = [], row.get("history", [])  # [["earlier question", "answer"], ...]
    if not isinstance(history, list) or not all(isinstance(pair, list) for pair in history):
        raise BadRow("wrong type", f"{where}: 'history' must be a list of pairs, found "
                     f"{short(history)}")
    for pair in history:
        messages += [{"role": role, "content": text} for role, text in zip(("user", "bot"), pair)]
    for kind, role in (("question", "user"), ("context", "user"), ("answer", "assistant")):
        name = used[kind]
        if name and isinstance(row[name], list):  # of messages
            messages += row[name]
        elif name:
            messages.append({"role": role, "content": check_text(row, name, where)})
    return messages, ["history", *used.values()]


def read_message(message, place, report):
    """Return (role, text) of one message. Raises BadRow."""
    if not isinstance(message, dict):
        raise BadRow("wrong type", f"{place}: expected an object, found {short(message)}")
    message = without_nulls(message)
    role_field, text_field = (next((name for name in names if name in message), names[0])
                              for names in (ROLE, CONTENT))
    role, text = message.get(role_field), message.get(text_field)
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("unknown role", f"{place}: unknown {role_field} {short(role)}; expected one "
                     f"of {', '.join(ROLES)}")
    role = ROLES[role.lower()]
    if role == "assistant" and (message.get("train") is False or message.get("weight") == 0):
        raise BadRow("not to be learned from", f"{place}: its 'train' or 'weight' excludes it from "
                     "training; here every answer is trained on")
    if isinstance(text, list) and all(isinstance(part, dict) and part.get("type") == "text"
                                      and isinstance(part.get("text"), str) for part in text):
        text = "\n".join(part["text"] for part in text)
    if not isinstance(text, str):
        raise BadRow("wrong type", f"{place}: {text_field!r} must be text, found {short(text)}")
    count_unused(message, {role_field, text_field}, "message's ", report)
    return role, strip(text)


def without_nulls(row):
    """Return a row with field names in lower case, without null and NaN."""
    return {name.lower(): value for name, value in row.items()
            if value is not None and value == value}


def check_text(row, name, where):
    """Return the text in a field, "" for none. Raises BadRow."""
    text = row.get(name, "")
    if not isinstance(text, str):
        raise BadRow("wrong type", f"{where}: field {name!r} must be text, found "
                     f"{type(text).__name__} {short(text)}")
    return text


def check_characters(texts, where):
    """Raise BadRow for texts that contain half of a surrogate pair: UTF-8 has no code for it."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("half a character", f"{where}: contains half of a surrogate pair "
                     f"({ascii(error.object[error.start])}); remove it") from error


def count_unused(row, used, whose, report):
    """Count in `report` the fields of a row that contain something and are not used."""
    for name in row.keys() - used:
        if row[name] not in ("", [], {}):
            report[f"not used: {whose}{short(name)}"] += 1


def strip(text):
    """Remove blanks at both ends, U+200B (zero-width space) and U+FEFF (BOM) included."""
    while (shorter := text.strip().strip("\u200b\ufeff")) != text:
        text = shorter
    return text


def read_conversations(path, report=None, drop=False):
    """Return all rows of a file as (messages, category) pairs (see to_messages).

    drop: leave bad rows out and count them in `report`, instead of raising BadRow. A file of
    nothing else raises UserError all the same. Raises what read_rows does, too.
    """
    report = Counter() if report is None else report
    conversations, first = [], None
    for number, row in enumerate(read_rows(path), 1):
        report["rows read"] += 1
        try:
            counts = Counter()
            conversations.append(to_messages(row, f"{path}, row {number}", counts))
            report.update(counts)
        except BadRow as error:
            first = first or error
            if not drop:
                raise
            report[f"dropped: {error.reason}"] += 1
    if first and not conversations:
        raise UserError(f"{first}; no row of the file is better")
    return conversations


def read_rows(path):
    """Return the rows of a JSON, JSON-lines or CSV file, gzipped or not, as Python values of any
    type. Raises OSError where there is no file, or UserError naming the file and the line."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file in it")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; name a JSON, JSON-lines or CSV file")
    text = read_text(path)
    if not text.strip():
        raise UserError(f"{path}: the file is empty; expected rows")
    try:
        if ".csv" in path.suffixes:
            return list(csv.DictReader(io.StringIO(text), restkey="(no name)", strict=True))
        return parse_json(text)
    except json.JSONDecodeError as error:
        before, at = text[:error.pos].rstrip(), text[error.pos:error.pos + 2]
        hint = ""
        if before.endswith(",") and at[:1] in ("]", "}"):
            hint = f"; remove the comma before {at[0]!r}"
        elif len(at) < 2 or error.msg.startswith("Unterminated"):
            hint = "; the file seems cut short"
        raise UserError(f"{path}, line {error.lineno}: not JSON: {error.msg}{hint}") from error
    except csv.Error as error:
        raise UserError(f"{path}: not CSV: {error}") from error
    except (RecursionError, ValueError) as error:  # nested too deep; a number of too many digits
        raise UserError(f"{path}: contains more than can be read ({error})") from error


def read_text(path):
    """Return the text of a UTF-8 file, gzipped or not. Raises UserError."""
    content = path.read_bytes()
    for magic, name in MAGIC.items():
        if content.startswith(magic):
            raise UserError(f"{path}: is {name} file; export it as JSON, JSON lines or CSV")
    try:
        if content.startswith(b"\x1f\x8b"):  # gzip
            content = gzip.decompress(content)
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: a gzip file that is cut short or broken; "
                        "download it again") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); "
                        "save it as UTF-8") from error


def parse_json(text):
    """Return the rows of a JSON list, of an object that contains one list of rows, or of JSON
    lines. Raises json.JSONDecodeError."""
    values, blanks = [], re.compile(r"\s*")
    at = blanks.match(text).end()
    while at < len(text):
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
