"""Talk to a model that train.py made.

    python chat.py                                         # out/chat/best.pt; Ctrl-D leaves
    python chat.py --prompt="What is the plural of box?"   # one reply, and done
    python chat.py < questions.txt                         # a message a line, a reply each
    python chat.py --score=data/instruction                # how many answers are right, word for word
    python chat.py --init_from=gpt2 --prompt="Once upon a time"    # GPT-2 as it is: it goes on with the text

Only replies go to standard output; all else goes to standard error. A model trained on plain text has no
turns: it goes on writing what you began.
"""
import codecs
import os
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import config
from data.conversation import decode_conversation, encode_prompt, special_ids
from data.tokenizer import get_tokenizer
from data.tokens import folder_tokenizer, open_dataset, read_meta
from model import GPT, KVCache, load_checkpoint, model_from_checkpoint, pick_device


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
    score: Path | None = None  # a prepared folder: answer its rows greedily and print how many are right
    score_rows: int = 0  # rows scored of each split; 0: all held-out rows and as many training rows
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


def answer(model, enc, ids):
    """The greedy reply to a conversation's ids, in which the last assistant's turn is left out: ids."""
    end_of_text, _, assistant, end = special_ids(enc)
    start = max(i for i, token in enumerate(ids) if token == assistant) + 1
    room = model.config.block_size - start + 1
    return list(model.generate(ids[:start], room, temperature=0, stop_ids=special_ids(enc)))


def score(model, enc, s):
    """Answer rows of a prepared folder greedily, held-out and training ones, and print by category how many
    answers are right word for word (white space aside). Groups are what stands before a category's "/"."""
    meta = read_meta(s.score)
    theirs = get_tokenizer(folder_tokenizer(s.score))
    if meta["kind"] != "chat" or theirs._mergeable_ranks != enc._mergeable_ranks:
        raise ValueError(f"{s.score}: not chats in this model's tokenizer; score with the data it was "
                         "trained on")
    dataset = open_dataset(s.score, model.config.block_size, 1)
    right, total = defaultdict(int), defaultdict(int)
    for split in ("val", "train"):
        rows = dataset.conversations(split)
        categories = [meta["categories"][i] for i in meta[f"{split}_categories"]] or [""] * len(rows)
        wanted = min(len(rows), s.score_rows or meta["val_rows"])
        for n in range(wanted):
            number = n * len(rows) // wanted
            if len(rows[number]) > model.config.block_size:
                continue
            expected = decode_conversation(rows[number], enc)[-1]["content"]
            ok = enc.decode(answer(model, enc, rows[number])).split() == expected.split()
            for key in {categories[number], categories[number].partition("/")[0], "all"}:
                right[split, key] += ok
                total[split, key] += 1
            if sys.stderr.isatty():
                print(f"\r{split}: {n + 1} of {wanted}", end="", file=sys.stderr)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    print(f"{'answers right, word for word':<32}{'held out':>18}{'trained on':>20}")
    names = {name for _, name in total} - {""}
    for name in sorted(names, key=lambda n: (n == "all", n.partition("/")[0], "/" not in n, n)):
        cells = [f"{right[split, name]} of {count:>5} {right[split, name] / count:>5.0%}"
                 if (count := total[split, name]) else "" for split in ("val", "train")]
        indented = "  " * ("/" in name) + name
        print(f"{indented:<32}{cells[0]:>18}  {cells[1]:>18}")


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
