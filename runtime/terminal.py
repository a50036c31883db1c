"""chat.py in a terminal, except replies: notes, line editing and /commands."""
import contextlib
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import config
from config import UserError
from data import conversation as chats
from data.files import write_text
from data.tokenizer import show_spaces, token_pieces

EXIT_KEY = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"  # ends the input

HELP = f"""/help              show this list
/reset             start a new conversation
/undo              remove your last message and its reply
/retry             generate another reply to your last message
/set name=value    change one or more settings; without arguments, show them
/save FILE         write the chat as a line of JSON that prepare_alpaca.py reads
/load FILE         continue a chat from such a file
/tokens            show the token ids of the chat as the model sees them
/look [FILE]       write a page that shows the inside of the model: out/look.html or FILE
/quit              exit, like {EXIT_KEY}; Ctrl-C stops a reply"""
COMMAND_LINE = re.compile(r"/\w*(\s|$)|(exit|quit)$")  # exit and quit as in other programs

# Control characters, which a terminal would act on, as visible symbols.
CONTROL_PICTURES = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
CONTROL_PICTURES |= dict.fromkeys(range(127, 160), 0x2426)
GREEN, MAGENTA, CYAN, GRAY = 32, 35, 36, 90


def use_utf8():
    """Make the standard streams UTF-8 and, on Windows, let the console show colors."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a notebook's streams do not have it
            encoding = "utf-8-sig" if stream is sys.stdin else "utf-8"  # sig: ignore a BOM
            stream.reconfigure(encoding=encoding, errors="replace", newline="\n")
    if os.name == "nt":
        os.system("")


def colored(code, text):
    """Return text for standard error, in an ANSI color if that is a terminal that supports it."""
    plain = "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain or not sys.stderr.isatty() else f"\x1b[{code}m{text}\x1b[0m"


def note(text):
    """Print a line for the user, not for the next program: gray, on standard error."""
    print(colored(GRAY, text), file=sys.stderr, flush=True)


def show_progress(name, done, total):
    """Print "name: done of total" over the previous line, if standard error is a terminal."""
    if sys.stderr.isatty():
        print(f"\r{name}: {done} of {total}", end="" if done < total else "\n", file=sys.stderr)


def greet(session, cfg, about):
    """If messages are typed, note which model this is, what it sees, and how to exit."""
    sees = f"It sees at most {cfg.turns or session.trained_turns} of your messages at a time."
    if not session.trained_turns:
        sees = "Base model: it continues your text."
    commands = " /help lists the commands," if sys.stdout.isatty() else ""
    if sys.stdin.isatty():
        note(f"{about}\n{sees}{commands} {EXIT_KEY} exits.")


def typed_lines():
    """Yield the lines typed in a terminal. With readline, they have line editing and history, and
    several pasted lines are one message."""
    with contextlib.suppress(ImportError):  # on Windows
        import readline
        if os.environ.get("TERM") != "dumb":  # Python's default is off
            readline.parse_and_bind("set enable-bracketed-paste on")
    while True:
        try:
            print()
            yield input("> ").strip()
        except EOFError:
            return print()
        except KeyboardInterrupt:
            note(f"\n({EXIT_KEY} exits)")


def run_command(session, cfg, line, print_reply):
    """Run a /command and return the settings to continue with, or None to quit. print_reply is
    chat.py's. If it raises UserError or OSError, nothing has changed."""
    name, _, rest = line.partition(" ")
    path = Path(os.path.expanduser(rest.strip()))
    if name in ("/undo", "/retry", "/save", "/tokens", "/look") and not session.history:
        raise UserError(f"{name}: the conversation is empty; write a message first")
    match name:
        case "/help":
            note(HELP)
        case "/quit" | "exit" | "quit":
            return None
        case "/reset":
            replace_history(session, [])
        case "/undo":
            replace_history(session, session.history[:-1])
        case "/retry":
            question, _ = session.history.pop()
            print_reply(session, question, replace(cfg, seed=None))
        case "/set":
            flags = ["--" + change.lstrip("-") for change in rest.split()]
            if fixed := {flag[2:].partition("=")[0] for flag in flags}.difference(cfg.CHANGEABLE):
                raise UserError(f"{min(fixed)}: cannot be set here; write "
                                "/set temperature=0.7; /set alone lists the settings")
            cfg = config.load(type(cfg), flags, start=cfg, typed="/set")
            note("  ".join(f"{key}={getattr(cfg, key)}" for key in cfg.CHANGEABLE))
        case "/save":
            save_chat(session, path)
        case "/load":
            load_chat(session, path)
        case "/tokens":
            show_tokens(session)
        case "/look":
            show_look(session, path if rest else Path("out/look.html"))
        case _:
            raise UserError(f"{name}: no such command; /help lists them")
    return cfg


def replace_history(session, history):
    """Replace the turns of a session."""
    session.history, session.n_dropped = history, 0
    note(f"(messages so far: {2 * len(history)})")


def save_chat(session, path):
    """Write the chat as a line of JSON. Replace only a file with an earlier state of this chat."""
    messages = [{"role": role, "content": session.enc.decode(ids)}
                for role, ids in chats.turns_to_messages(session.history)]
    beginnings = [[{"messages": messages[:n]}] for n in range(len(messages) + 1)]
    if path.exists() and chats.read_rows(path) not in beginnings:
        raise UserError(f"{path}: exists and is not an earlier state of this chat; use a new name")
    write_text(path, json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    note(f"{path}: saved")


def load_chat(session, path):
    """Continue the last chat in a file."""
    if not session.trained_turns:
        raise UserError("/load: a base model has no turns; /load needs a model trained on chats")
    conversations = chats.read_conversations(path)
    if not conversations:
        raise UserError(f"{path}: contains no chat; use a file that /save wrote")
    messages, _ = conversations[-1]
    ids = [session.enc.encode_ordinary(m["content"]) for m in messages]
    replace_history(session, list(zip(ids[0::2], ids[1::2])))  # user and assistant alternate


def seen_ids(session):
    """Return the ids that the model saw last, including its reply."""
    if not session.trained_turns:
        return session.prompt + session.history[-1][1]
    seen = session.history[-session.turns:][session.n_dropped:]
    return chats.assemble(chats.turns_to_messages(seen), session.enc)


def show_tokens(session):
    """Print the ids that the model saw: a line for each message, roles in different colors."""
    ids, enc = seen_ids(session), session.enc
    special = chats.special_ids(enc)
    for i, piece, is_answer in zip(ids, token_pieces(enc, ids), chats.supervised(ids, enc)):
        if i in special[1:3]:  # <|user|>, <|assistant|>
            print(file=sys.stderr)
        color = GREEN if is_answer else CYAN
        text = show_spaces(piece).translate(CONTROL_PICTURES)
        text = colored(MAGENTA if i in special else color, text)
        print(text + colored(GRAY, f"[{i}]"), end=" ", file=sys.stderr)
    print(file=sys.stderr, flush=True)


def show_look(session, path):
    """Write the page of runtime/look.py for the last reply, and print its attention summary."""
    from runtime.look import look, write_page
    ids, size, start = seen_ids(session), session.model.config.block_size, None
    if not session.trained_turns:
        ids = ids[-size:]
        start = max(len(ids) - len(session.history[-1][1]), 0)  # of the model's own text
    page = look(session.model, session.enc, ids[:size], start)  # ids past size were not read
    write_page(path, page)
    note("\n".join([*page["head_patterns"], f"{path}: open it in a browser"]))
