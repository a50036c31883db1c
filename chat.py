"""Talk to a model that train.py made.

    python chat.py                                         # out/chat/best.pt; Ctrl-D leaves
    python chat.py --prompt="What is the plural of box?"   # one reply, and done
    python chat.py < questions.txt                         # a message a line, a reply each
    python chat.py --score=data/instruction                # how many answers are right, by category
    python chat.py --init_from=gpt2 --prompt="Once upon a time"    # GPT-2 as it is: it goes on with the text

Only replies go to standard output; all else goes to standard error. A model trained on plain text has no
turns: it goes on writing what you began.
"""
import codecs
import os
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from data.conversation import (
    decode_conversation,
    encode_conversation,
    encode_prompt,
    read_conversations,
    special_ids,
)
from data.tokenizer import get_tokenizer
from data.tokens import folder_tokenizer, open_dataset, read_meta
from model import GPT, KVCache, load_checkpoint, model_from_checkpoint, pick_device, write_json


@dataclass
class Settings:
    checkpoint: Path = Path("out/chat/best.pt")  # the model to talk to
    init_from: str | None = None  # gpt2, gpt2-medium, ... or a folder with such weights, instead
    prompt: str | None = None  # one message: print the reply and leave
    turns: int = 0  # how many of your messages the model sees, the newest counted; 0: as it was trained
    max_new_tokens: int = 200  # longest reply, in tokens
    temperature: float = 0.5  # 0: always the likeliest token; 1: as the model learned; above: wilder
    top_k: int = 50  # choose among the so many likeliest tokens; 0: all
    top_p: float = 1.0  # choose among the likeliest that make up this probability; 1: all
    seed: int | None = None  # the same seed gives the same replies; None: new ones each time
    score: Path | None = None  # a prepared folder or an instruction file: answer its rows, count the right
    score_rows: int = 0  # rows to score; 0: all of a file, or all held-out rows and as many training rows
    score_file: Path | None = None  # where all answers go, as JSON; None: score.json beside the checkpoint
    device: str = "auto"  # auto, cpu, cuda, cuda:1 or mps
    dtype: str = "auto"  # auto, float32 or bfloat16


def check_settings(s):
    """Raise ValueError for the first setting out of its range."""
    for name, low, high in (("turns", 0, None), ("max_new_tokens", 1, None), ("temperature", 0, None),
                            ("top_k", 0, None), ("top_p", 0, 1), ("score_rows", 0, None)):
        value = getattr(s, name)
        if value < low or high is not None and value > high or name == "top_p" and value == 0:
            raise ValueError(f"{name}={value}: must be " + ("above 0, at most 1" if name == "top_p" else
                                                           f"{low} or more"))


def note(text):
    """A line for the person, not for the next program: grey, on standard error."""
    grey = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    print(f"\x1b[90m{text}\x1b[0m" if grey else text, file=sys.stderr, flush=True)


def room(model, s):
    """How much of the context is kept free for the reply: what it may take, at most a quarter."""
    return min(s.max_new_tokens, model.config.block_size // 4)


def trim(messages, enc, block_size, room):
    """The prompt for messages that end with the user's, as ids, leaving `room` of block_size for the reply.

    Whole oldest turns are left out until it fits; a last message too long by itself loses its beginning.
    Returns (ids, note), the note being what to tell the person, or "".
    """
    limit = block_size - room
    told = ""
    ids = encode_prompt(messages, enc)
    while len(ids) > limit and len(messages) > 1:
        messages = messages[2:]
        told = "(the context is full: the oldest turns are left out)"
        ids = encode_prompt(messages, enc)
    if len(ids) > limit:
        # <|endoftext|> <|user|> text <|end|> <|assistant|>: the end of the text stays
        ids = ids[:2] + ids[len(ids) - limit + 2:]
        told = f"(the message is too long for this model: only its last {limit - 4} tokens are read)"
    return ids, told


def stream(model, enc, ids, s, limit, cache=None):
    """Yield what the model writes after ids, at most `limit` tokens and to the first special token, piece by
    piece, as text: never half a character, never a role token."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for i in model.generate(ids, limit, temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed,
                            stop_ids=special_ids(enc), cache=cache):
        if text := decoder.decode(enc.decode_single_token_bytes(i)):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text


def reply(model, enc, ids, s, cache=None):
    """The reply to a prompt (ids), as `stream` yields it; ends with its turn or where the context is full."""
    return stream(model, enc, ids, s, min(s.max_new_tokens, model.config.block_size - len(ids) + 1), cache)


def continue_text(model, enc, text, s):
    """What a model that knows no turns writes after `text`, as `stream` yields it."""
    return stream(model, enc, enc.encode_ordinary(text) or special_ids(enc)[:1], s, s.max_new_tokens)


def say(pieces):
    """Print pieces of text as they come; returns them as one. Ctrl-C ends a reply, not the chat."""
    said = []
    try:
        for piece in pieces:
            said.append(piece)
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        note(" (stopped)")
    print(flush=True)
    return "".join(said)


def chat(model, enc, s, turns):
    """Read messages from standard input, a line each, and answer them until it ends. The model sees the
    newest `turns` of them and its replies in between; with 0 it does not chat, but goes on with each line."""
    tty = sys.stdin.isatty() and sys.stdout.isatty()
    if tty:
        try:
            import readline  # noqa: F401  (line editing and history for input(), where there is one)
        except ImportError:
            pass
    messages, cache = [], KVCache(model)
    while True:
        try:
            line = input("\n> " if tty else "").strip()
        except EOFError:
            if tty:
                print()
            return
        except KeyboardInterrupt:
            note("\n(Ctrl-D leaves)")
            continue
        if not line:
            continue
        if not turns:
            say(continue_text(model, enc, line, s))
            continue
        del messages[:max(len(messages) - 2 * (turns - 1), 0)]  # two for each earlier turn stay
        messages.append({"role": "user", "content": line})
        ids, told = trim(messages, enc, model.config.block_size, room(model, s))
        if told:
            note(told)
        messages.append({"role": "assistant", "content": say(reply(model, enc, ids, s, cache))})


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
    path = s.score_file or s.checkpoint.with_name("score.json")
    flat = [{"category": name, "rows": group, **t} for (name, group), t in table.items()]
    write_json(path, {"model": str(s.checkpoint), "scored": str(s.score), "summary": flat, "answers": scored})
    note(f"every answer: {path}")


def load_model(s, device, dtype):
    """(model, tokenizer, turns as in `chat`, what to call it) for the settings. Raises ValueError or
    OSError."""
    if s.init_from:  # weights as they came, without role tokens: they go on with a text
        model, enc = GPT.from_pretrained(s.init_from, vocab_size=50257), get_tokenizer("gpt2")
        return model.to(device, dtype).eval(), enc, 0, s.init_from
    checkpoint = load_checkpoint(s.checkpoint, "Make one: python prepare_alpaca.py "
                                 "config/prepare_instruction.py && python train.py config/train_chat.py "
                                 "(or: make chat)")
    model = model_from_checkpoint(checkpoint, device).to(dtype).eval()
    name = f"{s.checkpoint} (step {checkpoint['step']} of {checkpoint['max_iters']})"
    turns = (s.turns or checkpoint.get("turns", 1)) if checkpoint["kind"] == "chat" else 0
    return model, get_tokenizer(checkpoint["tokenizer"]), turns, name


def main(argv):
    s = config.load(Settings, argv, __doc__)
    check_settings(s)
    device, dtype, why = pick_device(s.device, s.dtype)
    model, enc, turns, name = load_model(s, device, dtype)
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    if s.score:
        if not turns:
            raise ValueError(f"score={s.score}: this model knows no chats, so there are no answers to score")
        return score(model, enc, s)
    if s.prompt is not None:
        if not turns:
            say(continue_text(model, enc, s.prompt, s))
            return
        messages = [{"role": "user", "content": s.prompt}]
        ids, told = trim(messages, enc, model.config.block_size, room(model, s))
        if told:
            note(told)
        say(reply(model, enc, ids, s))
        return
    if sys.stdin.isatty():
        note(f"{name}: {model.num_params():,} parameters, {why}. " +
             ((f"It sees your last {turns} messages" if turns > 1 else "It sees each message by itself") +
              ". Ask it something; Ctrl-D leaves." if turns else
              "It knows no turns: it goes on with what you write. Ctrl-D leaves."))
    chat(model, enc, s, turns)


if __name__ == "__main__":
    config.run(main)
