"""Talk to a model that train.py or finetune.py made.

    python chat.py                                         # out/chat/best.pt; /help lists the commands
    python chat.py --prompt="What is the plural of box?"   # one reply, and done
    python chat.py < questions.txt                         # a message a line, a reply each; blank lines: none
    python chat.py --json=True < questions.txt             # a JSON line for each reply
    python chat.py --score=data/instruction                # how many answers are right, by category
    python chat.py --attention=out/attention.png --prompt="What is the plural of box?"    # where heads look
    python chat.py --init_from=gpt2 --prompt="Once upon a time"    # GPT-2 as it is: it goes on with the text

Only replies go to standard output; all else goes to standard error. A model trained on plain text has no
turns: it goes on writing what you began.
"""
import codecs
import contextlib
import difflib
import json
import os
import re
import sys
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import config
from data.conversation import (
    assemble,
    decode_conversation,
    encode_conversation,
    encode_prompt,
    read_conversations,
    special_ids,
)
from data.tokenizer import get_tokenizer, token_pieces
from data.tokens import folder_tokenizer, open_dataset, read_meta
from model import (
    GPT,
    GPT2_NAMES,
    GPT2_VOCAB_SIZE,
    KVCache,
    load_checkpoint,
    model_from_checkpoint,
    pick_device,
    quantize_int8,
    write_atomically,
    write_json,
)


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # the model to talk to
    init_from: str | None = None  # gpt2, gpt2-medium, ... or a folder with such weights, instead
    prompt: str | None = None  # one message: print the reply and leave
    attention: Path | None = None  # with prompt: write a picture of where each head looks, a PNG
    json: bool = False  # a JSON line for each reply: text, tokens, seconds, tokens_per_second, stop
    turns: int = 0  # how many of your messages the model sees, the newest counted; 0: as it was trained
    max_new_tokens: int = 200  # longest reply, in tokens
    temperature: float = 0.5  # 0: always the likeliest token; 1: as the model learned; above: wilder
    top_k: int = 50  # choose among the so many likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest that make up this probability; 1: all
    repetition_penalty: float = 1.0  # 1 to 10; above 1 what was said already becomes less likely
    seed: int | None = None  # the same seed gives the same replies; None: new ones each time
    score: Path | None = None  # a prepared folder or an instruction file: answer its rows, count the right
    score_rows: int = 0  # rows to score; 0: all of a file, or all held-out rows and as many training rows
    score_file: Path | None = None  # where all answers go, as JSON; None: score.json beside the checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32, bfloat16, or int8 (quantized weights, CPU only)


MAKE_ONE = ("Make it: python prepare_alpaca.py config/prepare_instruction.py && python train.py "
            "config/train_chat.py (or: make chat)")

# what /set changes
CHANGEABLE = ("temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens", "seed", "turns")

HELP = """/help              this list
/reset             forget what was said
/undo              take your last message and its reply back
/retry             another reply to your last message
/set name=value    change settings, several at once; alone it shows them
/save FILE         write the chat as a JSON line that prepare_alpaca.py reads
/load FILE         go on with a chat from such a file
/tokens            the ids of the chat as the model sees them
/attention [FILE]  a picture of where each head looks, out/attention.png or FILE
/quit              leave, as Ctrl-D does; Ctrl-C stops a reply"""
COMMANDS = re.findall(r"^/\w+", HELP, re.MULTILINE)

# What a terminal would obey instead of showing: control characters as pictures of themselves.
VISIBLE = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {c: 0x2426 for c in range(127, 160)}


def check_settings(s):
    """Raise ValueError for the first setting out of its range."""
    for name, low, high in (("turns", 0, None), ("max_new_tokens", 1, None), ("temperature", 0, None),
                            ("top_k", 0, None), ("top_p", 0, 1), ("repetition_penalty", 1, 10),
                            ("score_rows", 0, None), ("seed", 0, 2**63 - 1)):
        value = getattr(s, name)
        if value is None:
            continue
        if not low <= value <= (high or float("inf")) or name == "top_p" and value == 0:
            raise ValueError(f"{name}={value}: must be " + ("above 0, at most 1" if name == "top_p" else
                             f"{low} or more" if high is None else f"from {low} to {high}"))
    if s.attention and s.prompt is None:
        raise ValueError(f"attention={s.attention}: needs a --prompt=TEXT; in the chat: /attention")


def note(text):
    """A line for the person, not for the next program: grey, on standard error."""
    grey = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[90m{text}\x1b[0m" if grey else text, file=sys.stderr, flush=True)


# ---- a conversation ----

class Talk:
    """A conversation with a model: what was said, as (role, ids) pairs, the person's and the model's in turn,
    and the KV cache that spares computing it again. `turns`: how many of the person's messages the model
    sees; 0: it knows no turns, and goes on with each message."""

    def __init__(self, model, enc, turns):
        self.model, self.enc, self.turns, self.trained_turns = model, enc, turns, turns
        self.history, self.cache = [], KVCache(model)
        self.left_out = 0  # messages that the model no longer sees, for want of room
        self.last = None  # what came of the newest reply, see `reply`

    def see(self, turns):
        """Show the model so many messages; 0: as many as it was trained on."""
        self.turns = self.trained_turns and (turns or self.trained_turns)
        self.left_out = 0

    def messages(self):
        """What was said, as data/conversation.py has it."""
        return [{"role": role, "content": self.enc.decode(ids)} for role, ids in self.history]


def trim(history, block_size, room):
    """The newest messages of a history that ends with the person's, such that their prompt leaves `room` of
    block_size for the reply. Whole oldest turns are left out; a last message too long by itself loses its
    beginning. Returns (messages, whether the last one was clipped)."""
    limit = block_size - room - 1  # <|assistant|> follows
    over = 1 + sum(len(ids) + 2 for _, ids in history) - limit  # <|endoftext|>; each has its role and <|end|>
    first = 0
    while over > 0 and first < len(history) - 1:
        over -= sum(len(ids) + 2 for _, ids in history[first:first + 2])
        first += 2
    history = history[first:]
    if over <= 0:
        return history, False
    role, ids = history[-1]
    return [(role, ids[over:])], True


def prompt_ids(talk, s):
    """What the model reads before it answers the last message of a talk: ids. Says what had to be left out,
    and takes it out of the last message."""
    block_size = talk.model.config.block_size
    room = min(s.max_new_tokens, block_size // 4)  # kept free for the reply
    view, clipped = trim(talk.history[1 - 2 * talk.turns:], block_size, room)
    if clipped:
        talk.history[-1] = view[-1]
        note(f"(the message is too long for this model: only its last {len(view[-1][1])} tokens are read)")
    left_out = max(min(len(talk.history), 2 * talk.turns - 1) - len(view), 0)
    if left_out > talk.left_out and not clipped:
        note("(the context is full: the oldest turns are left out)")
    talk.left_out = left_out
    return [*assemble(view, talk.enc), special_ids(talk.enc)[2]]


def reply(talk, ids, s):
    """Answer a message, given as ids: yields the reply piece by piece, as text, never half a character, never
    a role token. It ends with its turn, after max_new_tokens, or where the context is full. Then, or when it
    is closed before, talk.history has both messages and talk.last says what came of it."""
    began, said, stop = time.monotonic(), [], "interrupted"
    limit, prompt = s.max_new_tokens, ids or special_ids(talk.enc)[:1]
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    talk.history = [*talk.history, ("user", ids)] if talk.turns else [("user", ids)]  # of text: for /retry
    try:
        if talk.turns:
            prompt = prompt_ids(talk, s)
            limit = min(limit, talk.model.config.block_size - len(prompt) + 1)
        for i in talk.model.generate(prompt, limit, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p,
                                     repetition_penalty=s.repetition_penalty, seed=s.seed,
                                     stop_ids=special_ids(talk.enc), cache=talk.cache):
            said.append(i)
            if text := decoder.decode(talk.enc.decode_single_token_bytes(i)):
                yield text
        stop = "end" if len(said) < limit else "max_new_tokens" if limit == s.max_new_tokens else "context"
        if text := decoder.decode(b"", final=True):
            yield text
    finally:
        seconds = time.monotonic() - began
        talk.history.append(("assistant", said))
        talk.last = {"text": talk.enc.decode(said), "tokens": len(said), "seconds": round(seconds, 4),
                     "tokens_per_second": round(len(said) / max(seconds, 1e-6), 2),
                     "prompt_tokens": len(prompt), "stop": stop}


def say(talk, ids, s, tty):
    """Answer a message on standard output, as it comes or as a JSON line. In a terminal Ctrl-C ends the
    reply, not the chat."""
    try:
        with contextlib.closing(reply(talk, ids, s)) as pieces:
            for piece in pieces:
                if not s.json:
                    print(piece.translate(VISIBLE) if sys.stdout.isatty() else piece, end="", flush=True)
    except KeyboardInterrupt:
        if not tty:
            raise
        note(" (stopped)")
    print(json.dumps(talk.last, ensure_ascii=False) if s.json else "", flush=True)


# ---- commands ----

def user_path(text):
    """A path that a person typed, `~` and all. Raises ValueError."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"{text}: there is no such user's folder") from None


def change(s, flags):
    """The settings with name=value changes of those that may change while talking. Raises ValueError."""
    for flag in flags:
        name = flag.lstrip("-").partition("=")[0]
        if name not in CHANGEABLE:
            raise ValueError(f"{name}: cannot be set here; {', '.join(CHANGEABLE)} can")
    changed = config.load(Settings, [f"--{flag.lstrip('-')}" for flag in flags], start=s, typed="/set")
    check_settings(changed)
    return changed


def save(talk, path):
    """Write the chat as a JSON line; a file that holds anything else stays."""
    messages = talk.messages()
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if path.exists():
        earlier = read_conversations(path)
        if len(earlier) != 1 or earlier[0][0] != messages[:len(earlier[0][0])]:
            raise ValueError(f"{path}: is there already, and not of this chat; use another name")
    text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))
    note(f"{len(messages) // 2} turns -> {path}")


def load(talk, path):
    """Take over the chat in a file, the last one if it has several."""
    if not talk.turns:
        raise ValueError("this model knows no turns")
    conversations = read_conversations(path)
    if not conversations:
        raise ValueError(f"{path}: holds no chat")
    messages, talk.left_out = conversations[-1][0], 0
    talk.history = [(m["role"], talk.enc.encode_ordinary(m["content"])) for m in messages]
    note(f"{path} -> {len(messages) // 2} turns")


def seen_ids(talk):
    """The ids of a talk that the model saw last, its own reply among them."""
    if talk.turns:
        return assemble(talk.history[-2 * talk.turns:][talk.left_out:], talk.enc)
    return [i for _, said in talk.history for i in said]


def show_tokens(talk):
    """The ids of the chat as the model sees them, special ones and roles in colours of their own, on standard
    error."""
    special, ids = special_ids(talk.enc), seen_ids(talk)
    coloured, code = sys.stderr.isatty() and "NO_COLOR" not in os.environ, 0
    for piece, i in zip(token_pieces(talk.enc, ids), ids):
        code = {special[1]: 36, special[2]: 32}.get(i, code)  # cyan: the person; green: the model
        shown = piece.replace(" ", "·").replace("\n", "↵").translate(VISIBLE)
        if i in special[1:3]:
            print(file=sys.stderr)
        print(f"\x1b[{35 if i in special else code}m{shown}\x1b[90m{i}\x1b[0m" if coloured else
              f"{shown}[{i}]", end=" ", file=sys.stderr)
    print(file=sys.stderr, flush=True)


def head_scores(weights, ids):
    """Three habits of every head, from 0 to 1: weights (n_layer, nh, T, T), T ids -> {name: (n_layer, nh)}.

    previous token: the mean weight that a token gives to the one before it. first token: that it gives to the
    very first. same token earlier: that it gives to all earlier occurrences of itself, over the tokens that
    have any. All means are over the tokens after the first.
    """
    ids = torch.tensor(ids)
    same = (ids[:, None] == ids).tril(-1).float()  # (T, T)
    repeated = same.any(1)
    scores = {"previous token": weights.diagonal(-1, 2, 3).mean(-1),
              "first token": weights[..., 1:, 0].mean(-1)}
    if repeated.any():
        scores["same token earlier"] = (weights * same).sum(-1)[..., repeated].mean(-1)
    return scores


def show_attention(talk, path, longest=40):
    """Write a grid of pictures, a row for each layer and a column for each head, of where the last tokens of
    a talk look; say on standard error which heads have which habit (see head_scores)."""
    ids = seen_ids(talk)[-talk.model.config.block_size:]
    if not ids:
        raise ValueError("there is no token to look from")
    weights = talk.model.attention_weights(ids).float().cpu()
    for name, scores in head_scores(weights, ids).items() if len(ids) > 1 else ():
        best = scores.flatten().argsort(descending=True)[:3].tolist()
        note(f"{name:<20}" + "   ".join(f"layer {i // scores.shape[1] + 1} head {i % scores.shape[1] + 1}: "
                                        f"{scores.flatten()[i]:.2f}" for i in best))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        note("no picture: pip install matplotlib")
        return
    pieces = [p.replace("$", r"\$").replace(" ", "·") for p in token_pieces(talk.enc, ids)][-longest:]
    n_layer, n_head = weights.shape[:2]
    size = max(9 / n_head, 1.2)
    figure = Figure(figsize=(size * n_head + 1.2, size * n_layer + 1.2), layout="constrained")
    grid = figure.subplots(n_layer, n_head, sharex=True, sharey=True, squeeze=False)
    for (layer, head), axes in np.ndenumerate(grid):
        shown = weights[layer, head, -longest:, -longest:].numpy()
        axes.imshow(shown, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axes.tick_params(length=0, labelsize=5)
        axes.set_xticks(range(len(pieces)), pieces, rotation=90)
        axes.set_yticks(range(len(pieces)), pieces)
        if layer == 0:
            axes.set_title(f"head {head + 1}", fontsize=8)
        if head == 0:
            axes.set_ylabel(f"layer {layer + 1}", fontsize=8)
    write_atomically(path, lambda f: figure.savefig(f, dpi=110, format="png"))
    note(f"{path}: rows look at columns")


def command(talk, s, line):
    """Carry out a /command: returns the settings to go on with, or None to leave. Raises ValueError or
    OSError, and has then changed nothing."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name in ("/undo", "/retry", "/save", "/tokens", "/attention") and not talk.history:
        raise ValueError("nothing was said yet")
    if name in ("/save", "/load") and not rest:
        raise ValueError(f"{name} needs a file: {name} chat.jsonl")
    match name:
        case "/help":
            note(HELP)
        case "/quit":
            return None
        case "/reset":
            talk.history, talk.left_out = [], 0
        case "/undo":
            talk.history, talk.left_out = talk.history[:-2], 0
        case "/retry":
            (_, ids), _ = talk.history[-2:]
            del talk.history[-2:]
            say(talk, ids, replace(s, seed=None), True)
        case "/set":
            s = change(s, rest.split())
            note("  ".join(f"{field}={getattr(s, field)}" for field in CHANGEABLE))
            talk.see(s.turns)
        case "/save":
            save(talk, user_path(rest))
        case "/load":
            load(talk, user_path(rest))
        case "/tokens":
            show_tokens(talk)
        case "/attention":
            show_attention(talk, user_path(rest or "out/attention.png"))
        case _:
            close = difflib.get_close_matches(name, COMMANDS, 1)
            raise ValueError(f"there is no {name}; " + (f"did you mean {close[0]}?" if close else
                                                        "/help lists the commands"))
    return s


# ---- reading messages ----

def use_readline():
    """Line editing, history, Tab for commands, and pasted lines kept together, where Python has readline."""
    try:
        import readline
    except ImportError:
        return

    def complete(text, state):
        words = [f"{name}=" for name in CHANGEABLE] if readline.get_line_buffer().startswith("/set ") \
            else COMMANDS
        return ([word for word in words if word.startswith(text)] + [None])[state]

    readline.set_completer(complete)
    readline.set_completer_delims(" ")
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else
                            "tab: complete")
    if os.environ.get("TERM") != "dumb":
        readline.parse_and_bind("set enable-bracketed-paste on")


def read_messages(tty):
    """Yield what is typed, or piped in, a message a line, until it ends."""
    if not tty:
        yield from (line for line in map(str.strip, sys.stdin) if line)
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
            note("\n(Ctrl-D leaves)")


def chat(talk, s):
    """Answer messages from standard input until it ends or /quit; in a terminal, obey commands too."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    for line in read_messages(tty):
        try:
            if tty and line in ("exit", "quit"):
                note("(/quit leaves)")
            elif not (tty and re.match(r"/\w*(\s|$)", line)):
                say(talk, talk.enc.encode_ordinary(line), s, tty)
            elif (s := command(talk, s, line)) is None:
                return
        except (ValueError, OSError) as error:
            if not tty:
                raise
            note(error)
        except KeyboardInterrupt:
            if not tty:
                raise
            note(" (stopped)")


# ---- scoring ----

def rows_to_score(source, wanted):
    """{"held out": rows, "trained on": rows} of a prepared folder, or {"rows": rows} of an instruction file;
    rows are (messages, category) pairs, `wanted` of them, spread evenly. 0: all of a file or all that were
    held out, and as many that were trained on. Raises ValueError or OSError."""
    if source.is_dir():
        meta, enc = read_meta(source), get_tokenizer(folder_tokenizer(source))
        if meta["kind"] != "chat":
            raise ValueError(f"score={source}: holds plain text; score a folder of chats or a file of them")
        dataset, groups = open_dataset(source, 2**20, 1), {}
        for split, name in (("val", "held out"), ("train", "trained on")):
            rows = dataset.conversations(split)
            categories = [meta["categories"][i] for i in meta[f"{split}_categories"]] or [""] * len(rows)
            groups[name] = [(row, category) for row, category in zip(rows, categories)]
    else:
        groups = {"rows": read_conversations(source)}
    wanted = wanted or len(next(iter(groups.values())))
    if not wanted:
        raise ValueError(f"score={source}: holds no row")
    for name, rows in groups.items():
        count = min(wanted, len(rows))
        rows = [rows[n * len(rows) // count] for n in range(count)]
        groups[name] = [(row if source.is_file() else decode_conversation(row, enc), category)
                        for row, category in rows]
    return groups


def token_f1(answer, expected):
    """How far two texts have the same words, from 0 to 1: the harmonic mean of the share of the answer's
    words that are expected, and of expected ones that are there (as for SQuAD, Rajpurkar et al. 2016)."""
    answer, expected = Counter(answer.split()), Counter(expected.split())
    common = (answer & expected).total()
    return 2 * common / (answer.total() + expected.total()) if common else float(answer == expected)


@torch.no_grad()
def score_row(model, enc, messages):
    """The model's greedy answer to the last question of a conversation, against the expected one: a dict, or
    None for a conversation longer than the context. `loss` is the mean of the expected tokens', in nats."""
    ids = encode_conversation(messages, enc)
    start = len(encode_prompt(messages[:-1], enc))  # of the last answer
    if len(ids) > model.config.block_size + 1:
        return None
    device = model.wte.weight.device
    where, targets = torch.arange(start - 1, len(ids) - 1), torch.tensor(ids[start:])
    loss = model(torch.tensor([ids[:-1]], device=device), targets.to(device), where.to(device)).item()
    answer = enc.decode(list(model.generate(ids[:start], model.config.block_size - start + 1, temperature=0,
                                            stop_ids=special_ids(enc))))
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
    """The table of {(category, group): summary}: a line for each category, beside one another the groups."""
    print((" " * 22 + "".join(f"{name:^36}" for name in groups)).rstrip())
    print(" " * 22 + f"{'right':>16}{'F1':>12}{'loss':>8}" * len(groups))
    names = {name for name, _ in table}
    for name in sorted(names, key=lambda n: (n == "all", n.partition("/")[0], "/" not in n, n)):
        line = f"{'  ' * ('/' in name) + name:<24}"
        for group in groups:
            if t := table.get((name, group)):
                part = f"{t['right']} of {t['n']} {t['right'] / t['n']:>5.0%}"
                line += f"{part:>20}{t['f1']:>6.2f}{t['loss']:>8.3f}  "
            else:
                line += " " * 36
        print(line.rstrip())


def score(model, enc, s):
    """Answer rows of a prepared folder or an instruction file greedily; print what is right, by category (and
    by what stands before a category's "/"), and write every answer to a JSON file."""
    path = s.score_file or s.checkpoint.with_name("score.json")
    if path.is_dir():
        raise ValueError(f"score_file={path}: is a folder; name a file")
    results, groups = [], rows_to_score(s.score, s.score_rows)
    for name, rows in groups.items():
        for n, (messages, category) in enumerate(rows, 1):
            results.append({"rows": name, "category": category, **(score_row(model, enc, messages) or {})})
            if sys.stderr.isatty():
                print(f"\r{name}: {n} of {len(rows)}", end="" if n < len(rows) else "\n", file=sys.stderr)
    scored = [r for r in results if "answer" in r]
    if too_long := len(results) - len(scored):
        note(f"{too_long} rows are longer than this model's context and were left out")
    if not scored:
        raise ValueError(f"score={s.score}: no row is short enough for this model's context")
    cells = defaultdict(list)
    for r in scored:
        for key in {r["category"], r["category"].partition("/")[0], "all"} - {""}:
            cells[key, r["rows"]].append(r)
    table = {key: summary(rows) for key, rows in cells.items()}
    print_scores(table, list(groups))
    flat = [{"category": name, "rows": group, **t} for (name, group), t in table.items()]
    write_json(path, {"model": str(s.checkpoint), "scored": str(s.score), "summary": flat, "answers": scored})
    note(f"every answer: {path}")


def load_model(s, device, dtype):
    """(model, tokenizer, turns as in Talk, what to call it). Raises ValueError or OSError."""
    if s.init_from:  # weights as they came: they know no turns and go on with a text
        original = s.init_from in GPT2_NAMES
        model = GPT.from_pretrained(s.init_from if original else config.local_path(s.init_from),
                                    GPT2_VOCAB_SIZE if original else None)
        enc, turns, name = get_tokenizer("gpt2"), 0, s.init_from
        if model.config.vocab_size not in (GPT2_VOCAB_SIZE, enc.n_vocab):
            raise ValueError(f"init_from={s.init_from}: its {model.config.vocab_size} ids are not GPT-2's; "
                             "talk to the checkpoint it was made from: --checkpoint=FILE")
    else:
        usual = s.checkpoint.absolute() == config.REPO / Settings.checkpoint
        checkpoint = load_checkpoint(s.checkpoint, MAKE_ONE if usual else "The config file with its out_dir "
                                     "makes it; that file's first line says how.")
        model, enc = model_from_checkpoint(checkpoint), get_tokenizer(checkpoint["tokenizer"])
        name = f"{s.checkpoint} (step {checkpoint['step']} of {checkpoint['max_iters']})"
        turns = checkpoint.get("turns", 1) if checkpoint["kind"] == "chat" else 0
    model = model.to(device, dtype).eval()
    if s.dtype == "int8":
        quantize_int8(model)
    return model, enc, turns, name


def main(argv):
    """Score, answer one prompt, or talk, as the settings say. Raises ValueError or OSError for a
    mistake that a user can fix."""
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, "float32" if s.dtype == "int8" else s.dtype)
    if s.dtype == "int8":
        if device.type != "cpu":
            raise ValueError(f"dtype=int8: is for the CPU; on {device} use bfloat16, or --device=cpu")
        why = f"{device}, int8 weights"
    model, enc, turns, name = load_model(s, device, dtype)
    if None in (sys.stdin, sys.stdout):
        raise ValueError("standard input or output is closed; open it, or give it /dev/null")
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace", newline="\n")
    if s.score:
        if not turns:
            raise ValueError(f"score={s.score}: this model knows no chats, so there are no answers to score")
        return score(model, enc, s)
    talk = Talk(model, enc, turns)
    talk.see(s.turns)
    if s.prompt is not None:
        say(talk, enc.encode_ordinary(s.prompt), s, False)
        return show_attention(talk, s.attention) if s.attention else None
    if sys.stdin.isatty():
        note(f"{name}: {model.num_params():,} parameters\n{why}")
        note(("It knows no turns: it goes on with what you write." if not turns else "It sees each message "
              "by itself." if talk.turns == 1 else f"It sees your last {talk.turns} messages.") +
             (" /help lists the commands," if sys.stdout.isatty() else "") + " Ctrl-D leaves.")
    chat(talk, s)


if __name__ == "__main__":
    config.run(main)
