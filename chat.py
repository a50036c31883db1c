"""Talk to a model that train.py or finetune.py made.

    python chat.py                                         # out/chat/best.pt; /help lists commands
    python chat.py --prompt="What is the plural of box?"   # one reply, and done
    python chat.py < questions.txt                         # a message a line, a reply each
    python chat.py --json=True < questions.txt             # a JSON line for each reply
    python chat.py --score=data/instruction                # how many answers are right, by category
    python chat.py --init_from=gpt2 --score=data/hellaswag/hellaswag_val.jsonl   # multiple choice
    python chat.py --look=out/look.html --prompt="What is the plural of box?"   # see inside it
    python chat.py --init_from=gpt2 --prompt="Once upon a time"    # GPT-2 itself goes on with text

Only replies go to standard output; all else goes to standard error. A model trained on plain text
has no turns: it goes on writing what you began.
"""
import codecs
import contextlib
import difflib
import json
import math
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

import config
import model as gpt
from config import UserError
from data import conversation as chats
from data.conversation import special_ids
from data.datasets import folder_tokenizer, open_dataset, read_meta, row_categories
from data.files import write_atomically, write_json
from data.tokenizer import GPT2_VOCAB_SIZE, get_tokenizer, token_pieces
from data.weights import GPT2_NAMES
from runtime.checkpoint import load_checkpoint, max_turns
from runtime.checkpoint import load_model as load_checkpoint_model
from runtime.devices import pick_device
from runtime.look import look, write_page
from runtime.multiple_choice import read_choices


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # the model to talk to
    init_from: str | None = None  # instead: gpt2, gpt2-medium, ... or a folder of such weights
    prompt: str | None = None  # one message: print the reply and leave
    look: Path | None = None  # with prompt: the file for a page of all that the model did
    json: bool = False  # each reply as a JSON line: text, tokens, seconds, stop, ...
    turns: int = 0  # how many of your newest messages it sees; 0: as trained
    max_new_tokens: int = 200  # longest reply, in tokens
    temperature: float = 0.5  # 0: always the likeliest token; 1: as the model learned
    top_k: int = 50  # choose among this many of the likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest of this probability; 1: all
    repetition_penalty: float = 1.0  # 1 to 10; above 1 what was said already becomes less likely
    seed: int | None = None  # the same seed, the same replies; None: new ones each time
    score: Path | None = None  # count right answers: a prepared folder, or a file of rows
    score_rows: int = 0  # of each group; 0: all of a file, or as many as are held out
    score_file: Path | None = None  # where all answers go; None: score.json, in the run's folder
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32, bfloat16, or int8 (8-bit weights, CPU only)


SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")  # what model.py's `sample` takes


class Talk:
    """A conversation with a model, and the KV cache that spares computing it again."""

    def __init__(self, model, enc, turns):
        self.model, self.enc, self.cache = model, enc, gpt.KVCache(model)
        self.trained_turns = turns  # of the longest chat it learned from; 0: it learned plain text
        self.turns = turns  # how many of the person's messages it sees; 0: it knows no chats
        self.history = []  # the turns so far: [(the person's ids, the model's ids), ...]
        self.left_out = 0  # of the turns that it may see, how many did not fit into the context
        self.last = None  # what came of the newest reply, see `reply`


def chat(talk, s):
    """Answer messages from standard input until it ends or /quit; in a terminal, obey commands."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    for line in read_messages(tty):
        with mistakes_are_told(tty):
            if tty and looks_like_command(line):
                s = command(talk, s, line)
                if s is None:  # /quit
                    return
            else:
                say(talk, talk.enc.encode_ordinary(line), s, tty)  # a typed <|end|> is only text


def say(talk, question, s, tty):
    """Answer a message, given as ids, on standard output: as it comes, or as a JSON line."""
    # closing: after Ctrl-C too, reply's `finally` must note what was said so far.
    with contextlib.closing(reply(talk, question, s)) as pieces, ctrl_c_stops_only_this(tty):
        for piece in pieces:
            if not s.json:
                print(visible(piece) if sys.stdout.isatty() else piece, end="", flush=True)
    print(json.dumps(talk.last, ensure_ascii=False) if s.json else "", flush=True)
    if not talk.last["tokens"]:
        note("(the reply is empty)")


def reply(talk, question, s):
    """Answer a message, given as ids: yields the reply piece by piece, as text, never half a
    character, never a role token. It ends with <|end|>, after max_new_tokens, or where the context
    is full. Then, or when it is closed before, talk.history has both messages, and talk.last says
    what came of it."""
    began, prompt, answer = time.perf_counter(), [], []
    stop = "interrupted"  # unless the reply comes to its end
    # A character may be spread over several tokens: the decoder waits until it is whole.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    sampling = {name: getattr(s, name) for name in SAMPLING}
    try:
        limit = s.max_new_tokens
        if talk.turns:  # a model of chats
            prompt, question = make_prompt(talk, question, s)
            # One more than fits: the last one is never read, so it needs no position.
            limit = min(limit, talk.model.config.block_size - len(prompt) + 1)
        else:  # a model of plain text goes on with the message itself
            talk.history = []  # each message stands alone
            prompt = question or special_ids(talk.enc)[:1]  # an empty one: from <|endoftext|>
        # `generate` stops before it yields <|end|> or another special id, so none is ever printed.
        for token in talk.model.generate(prompt, limit, stop_ids=special_ids(talk.enc),
                                         seed=s.seed, cache=talk.cache, **sampling):
            answer.append(token)
            if text := decoder.decode(talk.enc.decode_single_token_bytes(token)):
                yield text
        if len(answer) < limit:
            stop = "end"
        else:
            stop = "max_new_tokens" if limit == s.max_new_tokens else "context"
        if text := decoder.decode(b"", final=True):
            yield text
    finally:
        talk.history.append((question, answer))
        seconds = time.perf_counter() - began
        talk.last = {"text": talk.enc.decode(answer), "tokens": len(answer),
                     "seconds": round(seconds, 4),
                     "tokens_per_second": round(len(answer) / max(seconds, 1e-6), 2),
                     "prompt_tokens": len(prompt), "stop": stop}


def make_prompt(talk, question, s):
    """What the model reads before it answers: (ids, the question, clipped if it is too long). Says
    what it does not see."""
    block_size = talk.model.config.block_size
    room = min(s.max_new_tokens, block_size // 4)  # kept free for the reply
    wanted = talk.history[-(talk.turns - 1):] if talk.turns > 1 else []  # [-0:] would be all
    earlier, kept = trim(wanted, question, block_size - room)
    left_out = len(wanted) - len(earlier)
    if len(kept) < len(question):
        note(f"(the message is too long for this model: only its last {len(kept)} tokens are read)")
    elif left_out > talk.left_out:
        note("(the context is full: the oldest turns are left out)")
    talk.left_out = left_out
    _, _, assistant, _ = special_ids(talk.enc)
    turns = messages([*earlier, (kept, None)])
    return [*chats.assemble(turns, talk.enc), assistant], kept


def trim(earlier, question, limit):
    """The newest turns that fit, whole, into a prompt of at most `limit` ids together with the
    question: (turns, question). A question too long by itself loses its beginning."""
    lengths = [len(asked) + len(said) + 4 for asked, said in earlier]  # two roles, two <|end|>
    # The prompt has <|endoftext|> too, <|user|> and <|end|> around the question, and <|assistant|>.
    too_many = 1 + sum(lengths) + len(question) + 3 - limit
    oldest = 0
    while oldest < len(earlier) and too_many > 0:
        too_many -= lengths[oldest]
        oldest += 1
    return earlier[oldest:], question[max(too_many, 0):]  # still too many: no turn is left


def messages(turns):
    """Turns as data/conversation.py's `assemble` takes them: [(role, ids), ...]. The last turn may
    have None for its answer, still to come."""
    flat = []
    for asked, said in turns:
        flat.append(("user", asked))
        if said is not None:
            flat.append(("assistant", said))
    return flat


# ==================================================================================================
# The idea ends here. Below: commands, reading lines, scores, what is shown, starting.
# ==================================================================================================

# ---- what a terminal shows ----

LEAVES = "Ctrl-Z and Enter" if os.name == "nt" else "Ctrl-D"  # the end of what is typed

# What a terminal would obey instead of showing: control characters as pictures of themselves.
VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
VISIBLE |= {c: 0x2426 for c in range(127, 160)}
GREEN, MAGENTA, CYAN, GREY = 32, 35, 36, 90


def visible(text):
    """A text without what a terminal would obey."""
    return text.translate(VISIBLE)


def coloured(code, text):
    """A text in a colour (ANSI's code for it), if standard error is a terminal that shall have
    any."""
    plain = not sys.stderr.isatty() or "NO_COLOR" in os.environ
    return text if plain else f"\x1b[{code}m{text}\x1b[0m"


def note(text):
    """A line for the person, not for the next program: grey, on standard error."""
    print(coloured(GREY, text), file=sys.stderr, flush=True)


@contextlib.contextmanager
def ctrl_c_stops_only_this(tty):
    """Within it, Ctrl-C in a terminal ends the block, not the chat."""
    try:
        yield
    except KeyboardInterrupt:
        if not tty:
            raise
        note(" (stopped)")


@contextlib.contextmanager
def mistakes_are_told(tty):
    """Within it, a mistake in a terminal is told in a line, and the chat goes on."""
    with ctrl_c_stops_only_this(tty):
        try:
            yield
        except (UserError, OSError) as error:
            if not tty:
                raise
            note(error)


# ---- reading messages ----

def read_messages(tty):
    """Yield what is typed, or piped in, a message a line, until it ends; empty lines are none."""
    if not tty:
        yield from filter(None, map(str.strip, sys.stdin))
        return
    use_readline()
    while True:
        try:
            print()
            if line := input("> ").strip():
                yield line
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            note(f"\n({LEAVES} leaves)")


def use_readline():
    """Line editing, history, Tab for commands, and pasted lines kept together, where Python has
    readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text, state):
        setting = readline.get_line_buffer().startswith("/set ")
        words = [f"{name}=" for name in CHANGEABLE] if setting else COMMANDS
        matches = [word for word in words if word.startswith(text)]
        return matches[state] if state < len(matches) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    is_libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
    if os.environ.get("TERM") != "dumb":  # Python turns it off everywhere
        readline.parse_and_bind("set enable-bracketed-paste on")


# ---- commands ----

HELP = f"""/help              this list
/reset             forget what was said
/undo              take your last message and its reply back
/retry             another reply to your last message
/set name=value    change settings, several at once; alone it shows them
/save FILE         write the chat as a JSON line that prepare_alpaca.py reads
/load FILE         go on with a chat from such a file
/tokens            the ids of the chat as the model sees them
/look [FILE]       a page of all that the model did, out/look.html or FILE
/quit              leave, as {LEAVES} does; Ctrl-C stops a reply"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)
CHANGEABLE = (*SAMPLING, "max_new_tokens", "seed", "turns")  # what /set changes


def looks_like_command(line):
    """Whether a line is for the program, not for the model: /word, or "exit" and "quit", by which
    one leaves other programs."""
    return re.match(r"/\w*(\s|$)", line) or line in ("exit", "quit")


def command(talk, s, line):
    """Carry out a /command: returns the settings to go on with, or None to leave. Raises ValueError
    or OSError, and has then changed nothing."""
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    path = Path(os.path.expanduser(rest or "out/look.html"))  # /look's usual one
    needs_history = ("/undo", "/retry", "/save", "/tokens", "/look")
    if name in needs_history and not talk.history:
        raise UserError("nothing was said yet")
    if name in ("/save", "/load") and not rest:
        raise UserError(f"{name} needs a file: {name} chat.jsonl")
    match name:
        case "/help":
            note(HELP)
        case "/quit":
            return None
        case "exit" | "quit":
            note("(/quit leaves)")
        case "/reset":
            go_on_from(talk, [])
        case "/undo":
            go_on_from(talk, talk.history[:-1])
        case "/retry":
            question, _ = talk.history.pop()
            say(talk, question, replace(s, seed=None), True)
        case "/set":
            s = change(s, rest.split())
            note("  ".join(f"{field}={getattr(s, field)}" for field in CHANGEABLE))
            set_turns(talk, s.turns)
        case "/save":
            save(talk, path)
        case "/load":
            load(talk, path)
        case "/tokens":
            show_tokens(talk)
        case "/look":
            show_look(talk, path)
        case _:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            advice = f"did you mean {close[0]}?" if close else "/help lists the commands"
            raise UserError(f"there is no {name}; {advice}")
    return s


def go_on_from(talk, history):
    """Put other turns in the place of those so far."""
    talk.history, talk.left_out = history, 0
    note(f"(messages so far: {2 * len(history)})")


def set_turns(talk, turns):
    """Let the model see so many messages; 0: as many as it was trained on. One of text has no
    turns."""
    if talk.trained_turns:
        talk.turns = turns or talk.trained_turns
    talk.left_out = 0


def change(s, flags):
    """The settings with name=value changes of those that may change while talking. Raises
    ValueError."""
    flags = ["--" + flag.lstrip("-") for flag in flags]
    for flag in flags:
        name = flag[2:].partition("=")[0]
        if name not in CHANGEABLE:
            raise UserError(f"{name}: cannot be set here; {', '.join(CHANGEABLE)} can")
    changed = config.load(Settings, flags, start=s, typed="/set")
    check_settings(changed)
    return changed


def save(talk, path):
    """Write the chat as a JSON line; a file that holds anything else stays."""
    said = [{"role": role, "content": talk.enc.decode(ids)} for role, ids in messages(talk.history)]
    if path.exists():
        mine = [[{"messages": said[:n]}] for n in range(len(said) + 1)]  # nothing but this chat
        if chats.read_rows(path) not in mine:
            raise UserError(f"{path}: is there already, and holds something else than this chat; "
                             "use another name")
    text = json.dumps({"messages": said}, ensure_ascii=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))
    note(f"{path}: saved")


def load(talk, path):
    """Take over the chat in a file, the last one if it has several."""
    if not talk.turns:
        raise UserError("this model knows no turns")
    conversations = chats.read_conversations(path)
    if not conversations:
        raise UserError(f"{path}: holds no chat")
    said, _ = conversations[-1]
    ids = [talk.enc.encode_ordinary(m["content"]) for m in said]
    go_on_from(talk, list(zip(ids[0::2], ids[1::2])))  # they alternate


def seen_ids(talk):
    """The ids of a talk that the model saw last, its own reply among them."""
    if talk.turns:
        seen = talk.history[-talk.turns:][talk.left_out:]
        return chats.assemble(messages(seen), talk.enc)
    return [i for asked, said in talk.history for i in [*asked, *said]]


def show_tokens(talk):
    """The ids of the chat as the model sees them, special ones and roles in colours of their own,
    on standard error, a line for each message."""
    ids, special = seen_ids(talk), special_ids(talk.enc)
    _, user, assistant, _ = special
    colours, colour = {user: CYAN, assistant: GREEN}, GREY
    for piece, i in zip(token_pieces(talk.enc, ids), ids):
        if i in colours:
            colour = colours[i]
            print(file=sys.stderr)
        shown = visible(piece.replace(" ", "·").replace("\n", "↵"))
        shown = coloured(MAGENTA if i in special else colour, shown)
        print(shown + coloured(GREY, f"[{i}]"), end=" ", file=sys.stderr)
    print(file=sys.stderr, flush=True)


def show_look(talk, path):
    """Write a page of all that the model did with what it saw last; say which heads have which
    habit."""
    ids, block_size = seen_ids(talk), talk.model.config.block_size
    if talk.turns:
        # The last token of a full context is never read.
        page = look(talk.model, talk.enc, ids[:block_size])
    else:  # a text: its newest part, which ends with the model's own words
        _, answer = talk.history[-1]
        ids = ids[-block_size:]
        page = look(talk.model, talk.enc, ids, max(len(ids) - len(answer), 0))
    for line in page["habits"]:
        note(line)
    write_page(path, page)
    note(f"{path}: open it in a browser")


# ---- scores ----

def score(model, enc, s):
    """Answer rows of a prepared folder or an instruction file greedily; print what is right, by
    category (and by what stands before a category's "/"), and write every answer to a JSON file."""
    path, answers = score_path(s), []
    groups = rows_to_score(s.score, s.score_rows)
    for name, rows in groups.items():
        for n, (messages, category) in enumerate(rows, 1):
            if scored := score_row(model, enc, messages):
                answers.append({"rows": name, "category": category, **scored})
            show_progress(name, n, len(rows))
    check_lengths(sum(map(len, groups.values())), len(answers), s)
    cells = defaultdict(list)
    for r in answers:
        for key in {r["category"], r["category"].partition("/")[0], "all"} - {""}:
            cells[key, r["rows"]].append(r)
    table = {key: summary(rows) for key, rows in cells.items()}
    print_scores(table, list(groups))
    note("right: the same words; F1: the share of words in common; loss: of the expected answer")
    flat = [{"category": name, "rows": group, **t} for (name, group), t in table.items()]
    write_scores(path, s, flat, answers)


def score_path(s):
    """The file for all answers. Raises ValueError for a folder."""
    folder = s.checkpoint.parent
    if s.init_from:
        folder = config.repo_folder() / "out" / Path(s.init_from).name
    path = s.score_file or folder / "score.json"
    if path.is_dir():
        raise UserError(f"score_file={path}: is a folder; name a file")
    return path


def show_progress(name, done, total):
    """A line on a terminal's standard error that counts."""
    if sys.stderr.isatty():
        print(f"\r{name}: {done} of {total}", end="" if done < total else "\n", file=sys.stderr)


def check_lengths(rows, short_enough, s):
    """Say how many rows the model's context cannot hold. Raises ValueError for all of them."""
    if rows > short_enough:
        note(f"{rows - short_enough} rows are longer than this model's context and were left out")
    if not short_enough:
        raise UserError(f"score={s.score}: no row is short enough for this model's context")


def write_scores(path, s, summary, answers):
    """Write a score to a JSON file; say where it is."""
    write_json(path, {"model": s.init_from or str(s.checkpoint), "scored": str(s.score),
                      "summary": summary, "answers": answers})
    note(f"every answer: {path}")


def spread(rows, wanted):
    """So many of the rows, evenly spread over them; all, where there are no more."""
    count = min(wanted, len(rows))
    return [rows[n * len(rows) // count] for n in range(count)]


def rows_to_score(source, wanted):
    """{"held out": rows, "trained on": rows} of a prepared folder, or {"rows": rows} of an
    instruction file; rows are (messages, category) pairs, `wanted` of them, spread evenly. 0: all
    of a file or all that were held out, and as many that were trained on. Raises ValueError or
    OSError."""
    if not source.is_dir():
        rows = chats.read_conversations(source)
        if not rows:
            raise UserError(f"score={source}: holds no row")
        return {"rows": spread(rows, wanted or len(rows))}
    if read_meta(source)["kind"] != "chat":
        raise UserError(f"score={source}: holds plain text; score a folder of chats or a file of "
                         "them")
    dataset, enc = open_dataset(source, 2**20, 1), get_tokenizer(folder_tokenizer(source))
    groups = {}
    for split, name in (("val", "held out"), ("train", "trained on")):
        rows = dataset.conversations(split)
        wanted = wanted or len(rows)
        rows = spread(list(zip(rows, row_categories(source, split, len(rows)))), wanted)
        groups[name] = [(chats.decode_conversation(ids, enc), category) for ids, category in rows]
    return groups


def token_f1(answer, expected):
    """How far two texts have the same words, from 0 to 1: the harmonic mean of the share of the
    answer's words that are expected, and of expected ones that are there (as for SQuAD, Rajpurkar
    et al. 2016)."""
    answer, expected = Counter(answer.split()), Counter(expected.split())
    common = (answer & expected).total()
    if not common:
        return float(answer == expected)  # 1 for no words where none are expected
    return 2 * common / (answer.total() + expected.total())


@torch.no_grad()
def score_row(model, enc, messages):
    """The model's greedy answer to the last question of a conversation, against the expected one: a
    dict, or None for a conversation longer than the context. `loss` is the mean of the expected
    tokens', in nats."""
    ids = chats.encode_conversation(messages, enc)
    start = len(chats.encode_prompt(messages[:-1], enc))  # of the last answer
    if len(ids) > model.config.block_size + 1:
        return None
    device = model.wte.weight.device
    where, targets = torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])
    idx = torch.tensor([ids[:-1]], device=device)
    loss = model(idx, targets.to(device), where.to(device)).item()
    room = model.config.block_size - start + 1
    answer = list(model.generate(ids[:start], room, stop_ids=special_ids(enc), temperature=0))
    answer = enc.decode(answer)
    expected = messages[-1]["content"]
    return {"question": messages[-2]["content"], "expected": expected, "answer": answer,
            "right": answer.split() == expected.split(), "f1": token_f1(answer, expected),
            "loss": loss / len(targets), "tokens": len(targets)}


def summary(rows):
    """What a list of score_row's dicts comes to; the loss is the mean over all their tokens."""
    tokens = sum(r["tokens"] for r in rows)
    return {"n": len(rows), "right": sum(r["right"] for r in rows),
            "f1": sum(r["f1"] for r in rows) / len(rows),
            "loss": sum(r["loss"] * r["tokens"] for r in rows) / tokens}


def print_scores(table, groups):
    """The table of {(category, group): summary}: a line for each category, beside one another the
    groups."""
    print((" " * 22 + "".join(f"{name:^36}" for name in groups)).rstrip())
    print(" " * 22 + f"{'right':>16}{'F1':>12}{'loss':>8}" * len(groups))

    def order(name):  # "a/b", "a/c", then "a" of both; "all" at the end
        return name == "all", name.partition("/")[0], "/" not in name, name

    for name in sorted({name for name, _ in table}, key=order):
        line = f"{'  ' * ('/' in name) + name:<24}"
        for group in groups:
            if t := table.get((name, group)):
                part = f"{t['right']} of {t['n']} {t['right'] / t['n']:>5.0%}"
                line += f"{part:>20}{t['f1']:>6.2f}{t['loss']:>8.3f}  "
            else:
                line += " " * 36
        print(line.rstrip())


# ---- scores of multiple choice ----

BATCH_TOKENS = 4096  # in the KV cache of a batch: 300 MB for the smallest GPT-2


def score_choices(model, enc, turns, rows, s):
    """Find each question's likeliest choice, by the sum of its tokens' log-probabilities and by
    their mean, which is fair to long choices. Print how often it is the right one, and write every
    answer to a JSON file."""
    path, block_size = score_path(s), model.config.block_size
    rows = spread(list(enumerate(rows, 1)), s.score_rows or len(rows))
    answers, encoded, done = [], [], 0
    for number, (question, choices, right) in rows:
        if ids := choice_ids(question, choices, enc, turns, block_size):
            encoded.append(ids)
            answers.append({"row": number, "question": question, "choices": choices,
                            "right": right})
    check_lengths(len(rows), len(answers), s)
    if cropped := sum(left_out > 0 for _, _, left_out in encoded):
        note(f"{cropped} questions are too long for this model: only their ends are read")
    for batch in batches(encoded):
        sums = log_likelihoods(model, [encoded[i] for i in batch])
        for i, likelihoods in zip(batch, sums.tolist()):
            tokens = [len(ending) for ending in encoded[i][1]]
            means = [x / n for x, n in zip(likelihoods, tokens)]
            answers[i] |= {"log_likelihoods": likelihoods, "tokens": tokens,
                           "sum": likelihoods.index(max(likelihoods)),
                           "mean": means.index(max(means))}
        done += len(batch)
        show_progress("rows", done, len(answers))
    table = [choice_summary(answers, by) for by in ("sum", "mean")]
    print(f"{'likeliest by':<12}{'right':>18}  accuracy and its standard error")
    for t in table:
        part = f"{t['right']:,} of {t['n']:,}"
        print(f"{t['by']:<12}{part:>18}{t['accuracy']:>10.2%} ± {t['standard_error']:.2%}")
    print(f"{'chance':<30}{1 / len(answers[0]['choices']):>10.2%}")
    write_scores(path, s, table, answers)


def choice_ids(question, choices, enc, turns, block_size):
    """The ids that a question's choices share, the list of each choice's own, and how many ids of
    the question had to be left out. None if the longest choice leaves it no room.

    A model of text reads the question, and goes on with a space and a choice. One of chats gets the
    question as the user's message and answers with a choice and <|end|>.
    """
    end_of_text, _, assistant, end = special_ids(enc)
    question = enc.encode_ordinary(question)
    if turns:
        endings = [[*enc.encode_ordinary(choice), end] for choice in choices]
    else:
        endings = [enc.encode_ordinary(" " + choice) for choice in choices]
    room = block_size + 1 - max(map(len, endings))  # the last token is never read
    if room < (5 if turns else 1):  # a chat's prompt has four ids of its own
        return None
    if turns:
        _, kept = trim([], question, room)
        context = [*chats.assemble([("user", kept)], enc), assistant]
    else:
        kept = question[-room:]
        context = kept or [end_of_text]  # an empty one: from <|endoftext|>
    return context, endings, len(question) - len(kept)


def batches(encoded):
    """The rows of choice_ids, by number, in lists whose contexts are equally long, so that one pass
    reads them all without padding; and whose endings are of about the same length."""
    by_length = defaultdict(list)
    for i, (context, endings, _) in enumerate(encoded):
        by_length[len(context)].append((max(map(len, endings)), i))
    for length, rows in sorted(by_length.items()):
        rows.sort()
        longest, i = rows[-1]
        tokens = (length + longest) * len(encoded[i][1])  # of a row, in the cache
        size = max(BATCH_TOKENS // tokens, 1)
        for first in range(0, len(rows), size):
            yield [i for _, i in rows[first:first + size]]


@torch.no_grad()
def log_likelihoods(model, rows):
    """The log-probability of each ending behind its context, in nats: (B, N) for B rows from
    choice_ids with N endings each, their contexts equally long.

    The contexts are read once. Then each is there N times, as keys and values in the cache, and all
    endings are read behind them. The last id of a context is read then too: it predicts the first
    of an ending.
    """
    device, cache = model.wte.weight.device, gpt.KVCache(model)
    contexts = torch.tensor([context for context, _, _ in rows], device=device)  # (B, T)
    reads = [torch.tensor([context[-1], *ending[:-1]]) for context, endings, _ in rows
             for ending in endings]
    targets = [torch.tensor(ending) for _, endings, _ in rows for ending in endings]
    # Padding behind an ending is seen by none of its tokens, and -1 marks it as no target.
    reads = pad_sequence(reads, batch_first=True).to(device)  # (B * N, L)
    targets = pad_sequence(targets, batch_first=True, padding_value=-1).to(device)  # (B * N, L)
    start = contexts.shape[1] - 1
    repeat_cache(cache, len(rows), start + targets.shape[1])  # nothing is in it yet, but room
    if start:
        model.hidden(contexts[:, :-1], cache)
    repeat_cache(cache, len(targets) // len(rows), start + targets.shape[1])
    x = model.hidden(reads, cache, start)  # (B * N, L, C)
    where = targets >= 0
    logits = model.head(x[where]).float()  # (tokens, padded V)
    losses = torch.zeros(targets.shape, device=device)
    losses[where] = F.cross_entropy(logits, targets[where], reduction="none")
    return -losses.sum(1).view(len(rows), -1)


def repeat_cache(cache, times, length):
    """Each row of a KVCache so many times, the copies beside one another, with room for `length`
    tokens."""
    for layer in cache.layers:
        layer.k = layer.k[:, :, :length].repeat_interleave(times, dim=0)
        layer.v = layer.v[:, :, :length].repeat_interleave(times, dim=0)


def choice_summary(answers, by):
    """How many choices were right, the share p, and the standard error of a share of n rows drawn
    at random, sqrt(p (1 - p) / n)."""
    n, right = len(answers), sum(a[by] == a["right"] for a in answers)
    p = right / n
    return {"by": by, "n": n, "right": right, "accuracy": p,
            "standard_error": math.sqrt(p * (1 - p) / n)}


# ---- starting ----

def check_settings(s):
    """Raise ValueError for the first setting out of its range."""
    least = {"turns": 0, "max_new_tokens": 1, "top_k": 0, "temperature": 0, "score_rows": 0,
             "seed": 0}
    for name, low in least.items():
        value = getattr(s, name)
        if value is not None and value < low:
            raise UserError(f"{name}={value}: must be {low} or more")
    if not 1 <= s.repetition_penalty <= 10:
        raise UserError(f"repetition_penalty={s.repetition_penalty}: must be from 1 to 10")
    if not 0 < s.top_p <= 1:
        raise UserError(f"top_p={s.top_p}: must be above 0, at most 1")
    if s.look and s.prompt is None:
        raise UserError(f"look={s.look}: needs a --prompt=TEXT; in the chat: /look")


def main(argv):
    """Score, answer one prompt, or talk, as the settings say. Raises ValueError or OSError for a
    mistake that a user can fix."""
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, "float32" if s.dtype == "int8" else s.dtype)
    if s.dtype == "int8":
        if device.type != "cpu":
            raise UserError(f"dtype=int8: is for the CPU; on {device} leave it out, or add "
                             "--device=cpu")
        why = f"{device}, int8 weights"
    model, enc, turns, name = load_model(s, device, dtype)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # those of a notebook have it not
            stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    if os.name == "nt":
        os.system("")  # from here on its console obeys colours
    if s.score:
        if s.score.is_file() and (rows := read_choices(s.score)):
            return score_choices(model, enc, turns, rows, s)
        if not turns:
            raise UserError(f"score={s.score}: this model knows no chats, so there are no answers "
                             "to score; it can choose among given ones (see data/hellaswag.py)")
        return score(model, enc, s)
    talk = Talk(model, enc, turns)
    set_turns(talk, s.turns)
    if s.prompt is None and sys.stdin.isatty():
        greet(talk, name, why)
    with only_finite(name):
        if s.prompt is None:
            return chat(talk, s)
        say(talk, enc.encode_ordinary(s.prompt), s, False)
    if s.look:
        show_look(talk, s.look)


@contextlib.contextmanager
def only_finite(name):
    """Within it, a token that cannot be drawn because the model's numbers overflow is a
    ValueError."""
    try:
        yield
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise UserError(f"{name}: its numbers overflow, as no trained model's do; the file is "
                         "damaged, use another") from error


def load_model(s, device, dtype):
    """(model, tokenizer, turns as in Talk, what to call it). Raises ValueError or OSError."""
    if s.init_from:  # weights as they came: they know no turns and go on with a text
        original = s.init_from in GPT2_NAMES
        model = gpt.load_gpt2(s.init_from if original else config.local_path(s.init_from),
                              GPT2_VOCAB_SIZE if original else None)
        enc, turns, name = get_tokenizer("gpt2"), 0, s.init_from
        if model.config.vocab_size not in (GPT2_VOCAB_SIZE, enc.n_vocab):
            raise UserError(f"init_from={s.init_from}: its {model.config.vocab_size} ids are not "
                             "GPT-2's; talk to the checkpoint it was made from: --checkpoint=FILE")
    else:
        hint = "The config file with its out_dir makes it; that file's first lines say how."
        if s.checkpoint.absolute() == config.REPO / Settings.checkpoint:
            hint = ("Make it: make chat (README.md has the same as single commands), or name "
                    "another with --checkpoint=FILE")
        checkpoint = load_checkpoint(s.checkpoint, hint)
        model = load_checkpoint_model(checkpoint, source=s.checkpoint)
        enc = get_tokenizer(checkpoint["tokenizer"])
        name = f"{s.checkpoint} (step {checkpoint['step']} of {checkpoint['max_iters']})"
        turns = max_turns(checkpoint)
    torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for every length
    model = model.to(device, dtype).eval()
    return model, enc, turns, name


def greet(talk, name, why):
    """Say what one talks to, and how one leaves."""
    note(f"{name}: {talk.model.num_params():,} parameters\n{why}")
    if not talk.turns:
        sees = "It knows no turns: it goes on with what you write."
    elif talk.turns == 1:
        sees = "It sees each message by itself."
    else:
        sees = f"It sees your last {talk.turns} messages."
    commands = " /help lists the commands," if sys.stdout.isatty() else ""
    note(f"{sees}{commands} {LEAVES} leaves.")


if __name__ == "__main__":
    config.run(main)
