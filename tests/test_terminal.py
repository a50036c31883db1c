"""runtime/terminal.py: commands, lines, colors and errors; and chat.py in a real pseudo-terminal."""
import builtins
import copy
import dataclasses
import io
import os
import re
import select
import subprocess
import sys

import pytest

import chat
import train
from config import UserError
from data.conversation import read_conversations
from runtime import terminal
from tests import test_chat as lib
from tests.test_chat import GREEDY, SEEDED, ask, new_session, scripted_session
from tests.toy_runs import WORDS, prepare_chats


def command(session, line, cfg=GREEDY):
    return terminal.run_command(session, cfg, line, chat.print_reply)


def texts(session):
    """Return all messages, user and model alternating."""
    return [session.enc.decode(ids) for turn in session.history for ids in turn]


def type_lines(session, lines, monkeypatch):
    """Type lines in a terminal, then Ctrl-D; an exception among them is raised while typing."""
    typed = iter(lines)

    def typing(_):
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line
    monkeypatch.setattr(builtins, "input", typing)
    for stream in (sys.stdin, sys.stdout):
        monkeypatch.setattr(stream, "isatty", lambda: True, raising=False)
    chat.chat(session, GREEDY)


# Commands

def test_help_lists_every_command(capsys):
    assert command(new_session(), "/help") == GREEDY
    listed = re.findall(r"^(/\w+)", capsys.readouterr().err, re.MULTILINE)
    assert listed == "/help /reset /undo /retry /set /save /load /tokens /look /quit".split()


def test_reset_and_undo_remove_turns():
    session = new_session()
    first, second = ask(session, "Hm?"), ask(session, "and more")
    command(session, "/undo")
    assert len(session.history) == 1 and ask(session, "and more") == second
    command(session, "/reset")
    assert session.history == [] and ask(session, "Hm?") == first


@pytest.mark.parametrize("turns", [50, 0])
def test_retry_gives_another_reply_to_the_same_message(turns):
    session = new_session(turns=turns)
    ask(session, "Hm?", SEEDED)
    replies = {tuple(ask(session, "and more", SEEDED))}
    for _ in range(3):
        command(session, "/retry", SEEDED)
        *before, (question, answer) = session.history
        assert (question, len(before)) == ([*b"and more"], 1 if turns else 0)
        replies.add(tuple(answer))
    assert len(replies) > 2, "the seed is not reused"


def test_set_changes_settings_and_shows_all_that_can_be_changed(capsys):
    cfg = command(new_session(), "/set temperature=0.7 --top_k=1e2  seed=5 turns=2")
    assert cfg == dataclasses.replace(GREEDY, temperature=0.7, top_k=100, seed=5, turns=2)
    assert dict(pair.split("=") for pair in capsys.readouterr().err.split()) == {
        "temperature": "0.7", "top_k": "100", "top_p": "1.0", "repetition_penalty": "1.0",
        "max_new_tokens": "12", "seed": "5", "turns": "2"}
    assert command(new_session(), "/set", cfg) == cfg and command(new_session(), "/set seed=None", cfg).seed is None


@lib.TOKENIZERS
def test_a_saved_chat_is_read_as_instruction_data_and_continues_the_same(enc, tmp_path):
    session, other, path = new_session(enc=enc), new_session(enc=enc), tmp_path / "deep" / "chat.jsonl"
    said = ["hé\n🙂\u2028<|end|>", '"a"\\', "the aaa", ""]
    session.history = [tuple(map(enc.encode_ordinary, said[:2])), tuple(map(enc.encode_ordinary, said[2:]))]
    command(session, f"/save  {path} ")
    [(messages, _)] = read_conversations(path)
    assert [m["content"] for m in messages] == said and path.read_bytes().count(b"\n") == 1
    ask(other, "something else")
    assert command(other, f"/load {path}") == GREEDY and other.history == session.history
    assert ask(other, "So?") == ask(session, "So?")


def test_save_only_replaces_an_earlier_state_of_the_same_chat_and_load_reads_any_layout(tmp_path):
    session, other, path, rows = new_session(), new_session(seed=5), tmp_path / "chat.jsonl", tmp_path / "rows.json"
    for text in ("one", "two"):
        ask(session, text)
        command(session, f"/save {path}")
    rows.write_text('[{"instruction": "first", "output": "x"}, {"conversations": [{"from": "human", '
                    '"value": "a"}, {"from": "gpt", "value": "b"}]}]', encoding="utf-8")
    before = path.read_bytes(), rows.read_bytes()
    ask(other, "one")
    command(session, "/undo")
    for changed, name in ((other, path), (session, path), (other, rows)):  # a different chat, fewer turns
        with pytest.raises(UserError, match="exists and is not an earlier state"):
            command(changed, f"/save {name}")
    command(session, f"/load {rows}")
    assert texts(session) == ["a", "b"] and (path.read_bytes(), rows.read_bytes()) == before
    with pytest.raises(UserError, match="base model has no turns"):
        command(new_session(turns=0), f"/load {rows}")


@lib.TOKENIZERS
@pytest.mark.parametrize("block_size, turns", [(200, 2), (64, 50)])
def test_tokens_shows_the_ids_that_were_read_and_generated(block_size, turns, enc, capsys):
    def shown():
        capsys.readouterr()
        command(session, "/tokens")
        out, err = capsys.readouterr()
        assert out == "" and all(role in err for role in lib.ROLES)
        return [int(i) for i in re.findall(r"\[(\d+)\] ", err)]

    session = new_session(block_size, turns, enc=enc)
    for text in ("the aaa", "🙂", "last", "and on", "x" * 70):
        said = ask(session, text)
        prompt = lib.prompt_by_hand(lib.flat(session.history, enc)[:-1], enc, turns, block_size, 12)
        assert shown() == [*prompt, *said, lib.special(enc)[3]]
    command(session, "/undo")  # the message that displaced all earlier turns
    assert shown() == lib.framed(lib.flat(session.history[-turns:], enc), enc)[:-1]


@pytest.mark.parametrize("tty, term, variables", [
    (True, "xterm", {}), (True, "xterm", {"NO_COLOR": "1"}), (True, "dumb", {}), (False, "xterm", {})])
def test_tokens_are_colored_by_role_and_control_characters_visible(tty, term, variables, monkeypatch, capsys):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": term, **variables}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: tty)
    session = new_session()
    session.history = [([*b"\x1ba"], [*b"\x07b"])]
    command(session, "/tokens")
    err = capsys.readouterr().err
    colored = tty and term == "xterm" and not variables
    assert re.findall(r"\x1b\[(\d\d)m", err) == colored * "35 90 35 90 36 90 36 90 35 90 35 90 32 90 32 90 35 90".split()
    assert re.sub(r"\x1b\[\d+m", "", err) == (
        "<|endoftext|>[256] \n<|user|>[257] ␛[27] a[97] <|end|>[259] \n<|assistant|>[258] ␇[7] b[98] <|end|>[259] \n")


MISTAKES = [
    ("/undo", "conversation is empty"), ("/retry", "conversation is empty"), ("/tokens", "conversation is empty"),
    ("/look", "conversation is empty"), ("/save x.jsonl", "conversation is empty"), ("/sav x", "/sav: no such command; /help"),
    *((name, "no such command") for name in ("/frobnicate", "/", "/HELP")),
    ("/set json=True", "json: cannot be set here"), ("/set temperature=0.3 top_k=-1", "top_k=-1: must be at least 0"),
    ("/set temperature=hot", "not float"), ("/set temperature", "temperature"), ("/set =1", "cannot be set"),
    ("/set --help", "help: cannot be set"), ("/set config/x.py", "cannot be set"), ("/save", "name a file"),
    ("/load", "name a file"), ("/load FOLDER/no.jsonl", "no.jsonl"), ("/load FOLDER", "folder"),
    ("/save FOLDER", "folder"), ("/load FOLDER/notes.txt", "notes.txt"), ("/save FOLDER/notes.txt", "notes.txt"),
    ("/load FOLDER/no_rows.json", "contains no chat"), ("/load ~no_such_user/x", "no_such_user"),
    ("/save FOLDER/notes.txt/x", "x"), ("/save FOLDER/" + "x" * 5000, "x")]


@pytest.mark.parametrize("line, message", MISTAKES, ids=[line[:40] for line, _ in MISTAKES])
def test_a_mistake_in_a_command_gives_a_one_line_error_and_changes_nothing(line, message, tmp_path):
    (tmp_path / "notes.txt").write_text("my notes", encoding="utf-8")
    (tmp_path / "no_rows.json").write_text("[]", encoding="utf-8")
    session = new_session()
    if "empty" not in message:
        ask(session, "Hm?")
    before = copy.deepcopy(session.history)
    with pytest.raises((UserError, OSError), match=message) as error:
        command(session, line.replace("FOLDER", str(tmp_path)))
    assert str(error.value) and "\n" not in str(error.value) and session.history == before
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "my notes" and len(list(tmp_path.iterdir())) == 2


# Typing

def test_only_a_slash_and_a_known_word_is_a_command_and_quit_ends_the_chat(monkeypatch, capsys):
    session, _ = scripted_session(b"yes", 500)
    lines = ["/etc/passwd is what?", "/help", " ", "a /reset", "//", "/usr/bin", "/quit now", "never read"]
    type_lines(session, lines, monkeypatch)
    assert texts(session)[::2] == [lines[0], lines[3], lines[4], lines[5]] and "this list" in capsys.readouterr().err


def test_ctrl_c_stops_the_reply_and_keeps_its_text(monkeypatch, capsys):
    session, _ = scripted_session([*b"Well, ", KeyboardInterrupt()])
    type_lines(session, ["Hm?", KeyboardInterrupt(), "So?"], monkeypatch)
    assert texts(session) == ["Hm?", "Well, ", "So?", "Well, "]
    assert re.fullmatch(r" \(stopped\)\n\n\(.* exits\)\n \(stopped\)\n", capsys.readouterr().err)


@pytest.mark.parametrize("error, tty", [(KeyboardInterrupt(), False), (ValueError("a reader's own edit"), True)])
def test_ctrl_c_in_a_pipe_and_unexpected_errors_end_the_chat(error, tty, monkeypatch):
    session, _ = scripted_session([*b"Well, ", error])
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hm?\nSo?"))
    with pytest.raises(type(error)):
        type_lines(session, ["Hm?", "So?"], monkeypatch) if tty else chat.chat(session, GREEDY)
    assert texts(session) == ["Hm?", "Well, "]


class PseudoTerminal:
    """chat.py in a pseudo-terminal: `output` is all that it printed."""

    def __init__(self, *flags, **variables):
        pty = pytest.importorskip("pty")
        self.end, inside = pty.openpty()
        # Make it the controlling terminal, for Ctrl-C. preexec_fn would do that, but is unsafe with threads.
        take = ("import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
                "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])")
        self.program = subprocess.Popen([sys.executable, "-S", "-c", take, str(lib.REPO / "chat.py"), *flags],
                                        stdin=inside, stdout=inside, stderr=inside, env={**os.environ, **variables})
        os.close(inside)
        self.output, self.at = b"", 0

    def read(self, seconds):
        """Read what was printed; return whether there was more."""
        ready, _, _ = select.select([self.end], [], [], seconds)
        try:
            said = os.read(self.end, 4096) if ready else b""
        except OSError:  # how the output ends on Linux
            said = b""
        self.output += said
        return bool(said)

    def wait_for(self, text, key=b"", seconds=60):
        """key: typed again if nothing is printed, since Python misses a Ctrl-C just before it waits for a key."""
        while text not in self.output[self.at:]:
            if not self.read(1):
                seconds -= 1
                assert seconds, f"no {text!r} in {self.output[self.at:]!r}"
                os.write(self.end, key)
        self.at = self.output.index(text, self.at) + len(text)


def test_ten_messages_in_a_pseudo_terminal_get_the_replies_that_were_learned(tmp_path):
    learned = dict(zip(WORDS, "red blue green pink gray white black brown teal gold".split()))
    rows = [{"instruction": f"Which color is {word}?", "output": f"It is {color}."} for word, color in learned.items()]
    prepare_chats(tmp_path / "data", rows, f"--extra={tmp_path / 'data' / 'rows.json'}")
    train.main([f"--data_dir={tmp_path / 'data'}", f"--out_dir={tmp_path}", "--n_layer=1", "--n_head=2", "--n_embd=64",
                "--block_size=64", "--batch_size=8", "--max_iters=150", "--best_by=train", "--eval_interval=150",
                "--sample_interval=0", "--device=cpu"])
    terminal = PseudoTerminal(f"--checkpoint={tmp_path / 'best.pt'}", "--device=cpu", "--turns=1", "--temperature=0", TERM="xterm")
    try:
        for word, color in learned.items():
            terminal.wait_for(b"> ")
            os.write(terminal.end, f"Which color is {word}?\n".encode())
            terminal.wait_for(f"\rIt is {color}.\r\n".encode())  # the reply and nothing else
    finally:
        terminal.program.kill()
        terminal.program.wait()
        os.close(terminal.end)


def test_a_conversation_in_a_pseudo_terminal(tmp_path):
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("libedit, as on a Mac, keeps pasted lines apart")
    path = lib.endless(tmp_path / "best.pt")
    terminal = PseudoTerminal(f"--checkpoint={path}", "--device=cpu", "--max_new_tokens=5", TERM="xterm")
    try:
        for part in ("best.pt", "parameters", "cpu, float32", "at most 9 of your messages", "/help", "Ctrl-D"):
            terminal.wait_for(part.encode())
        for typed, answer in [
                ("Hi\n", "\rxxxxx\r\n"), ("/resett\n", "no such command"), ("half a", "half a"),
                ("\x03", "(Ctrl-D exits)"),  # Ctrl-C while typing
                ("/set max_new_tokens=90000\n", "max_new_tokens=90000"), ("Continue\n", "xxxxx"),
                ("\x03", "(stopped)"), ("/undo\n", "so far: 2"), ("/set max_new_tokens=3\n", "=3"),
                ("/retry\n", "\rxxx\r\n"),
                ("\x1b[200~Name a\nfruit.\x1b[201~\n", "\rxxx\r\n"),  # pasted: one message
                (f"/save {tmp_path / 'chat.jsonl'}\n", "chat.jsonl: saved"), ("\x04", "\r\n")]:
            if typed != "\x03":
                terminal.wait_for(b"> ")
            os.write(terminal.end, typed.encode())
            terminal.wait_for(answer.encode(), b"\x03" * (typed == "\x03"))
        while terminal.read(60):
            pass
        assert terminal.program.wait(60) == 0
    finally:
        terminal.program.kill()
        terminal.program.wait()
        os.close(terminal.end)
    assert b"Traceback" not in terminal.output
    assert b"\x1b[?2004h" in terminal.output, "it enables bracketed paste"
    [(messages, _)] = read_conversations(tmp_path / "chat.jsonl")
    assert [m["content"] for m in messages] == ["Hi", "xxx", "Name a\nfruit.", "xxx"]
