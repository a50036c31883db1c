"""Tries to break what the README promises, with cases drawn at random, and counts what held.

    python -m tests.fuzz --minutes=10 --seed=1                # a table: cases tried and held
    python -m tests.fuzz --family=checkpoints --case=37       # one of its cases again

A case calls a script's main with something wrong. It holds if that ends in success or in one line (a ValueError
or OSError, exit code 1) within SECONDS, never in a traceback; if earlier files are then as before; and if what a
success made is right. All is toy-sized. It needs fork and alarm, so not Windows.
"""
import config  # isort: skip
import contextlib
import copy
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, fields
from pathlib import Path
from unittest import mock

import torch

import chat
import data.text
import finetune
import model
import prepare_alpaca
import train
from data.export import write_hf_model
from data.tokenizer import get_tokenizer
from data.tokens import SPLITS, folder_tokenizer, open_dataset

SECONDS = 20  # that a case may take
MEMORY = 3 * 2**30  # bytes that cases may take more than there are at the start
WORDS = "one two three four five six seven eight nine ten eleven twelve".split()
RUN = dict(batch_size=2, max_iters=3, eval_interval=2, eval_tokens=100, log_interval=1, save_interval=1,
           sample_interval=2, warmup_iters=1, device="cpu", learning_rate=0.01, dropout=0.1)
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, block_size=32)
TEXTS = [*WORDS, "", "Say hi.", "<|end|>", "<|user|>x<|endoftext|>", "é", "👩‍🚀", "\x1b[2J", "\0", " \t", "\u2028",
         "\r\n", "<noinput>", "a" * 500]
JUNK = [None, True, -1, 0, 1, 2**31, 2**63, 10**30, 0.5, -1.5, 1e30, math.nan, math.inf, "", "x", "a\0b", "\ud800",
        "<|end|>", "../x", [], {}, [[]], [0], {"a": 1}]
SETTINGS = [-1, 0, 1, 2, 3, 7, "", "x", "None", "True", "[1]", "x/y", "a\0b", "~", "é", ".", "0m", "5m", "{", "é" * 300]
LARGE = [0.5, -0.5, 1e-30, 1e30, "nan", "inf", "-inf", "1e9999", 10**6, 2**31, 2**63, 10**12, 10**30]
# Settings whose large values only say how long to work.
ENDLESS = {"max_iters", "repeat", "epochs", "gradient_accumulation", "n_layer", "max_new_tokens"}


@dataclass
class Settings:
    minutes: float = 1.0  # how long to try
    cases: int = 0  # of each family, instead; 0: as many as the minutes allow
    seed: int = 1  # the same seed draws the same cases
    family: str | None = None  # only this one; None: all, each with the same share of the time
    case: int | None = None  # only this one of the family


class Broken(Exception):
    """A promise was not kept."""


class TooLong(BaseException):
    """Nothing that a script would catch."""


# ---- one call, and what may come of it ----

def attempt(script, flags, stdin=""):
    """Call script.main with {name: value}: (what it printed, the line it ended with or None). Raises Broken."""
    argv, said, line = [f"--{name}={value}" for name, value in flags.items()], io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), mock.patch("sys.stdin", io.StringIO(stdin)):
        try:
            script.main(argv)
        except (ValueError, OSError) as error:
            line = str(error)
        except MemoryError:
            line = config.NO_MEMORY
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # SystemExit, a panic in Rust, TooLong
            raise Broken(f"{script.__name__} {argv}\n{traceback.format_exc()}") from error
    if line is not None and ("\n" in line or len(line.split()) < 4 or not set(":;=") & set(line)):
        raise Broken(f"{script.__name__} {argv}\nno line that helps: {line!r}")
    return said.getvalue(), line


def safely(script, flags, folder):
    """attempt; where it fails before the first step, all earlier files of `folder` must be as they were."""
    def files():
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    before = files()
    said, line = attempt(script, flags)
    after = files() if line and "step     1/" not in said else before
    if changed := [str(path) for path in before if before[path] != after.get(path)]:
        raise Broken(f"{script.__name__} {flags}\n{line}\nand {changed} changed")
    return line


def train_flags(world, out_dir, **more):
    return {**RUN, **SHAPE, "data_dir": world / "text", "out_dir": out_dir, **more}


def tune_flags(world, out_dir):
    return {**RUN, "data_dir": world / "chat", "out_dir": out_dir, "init_from": world / "base" / "best.pt"}


def make_world(root):
    """What cases copy and break: rows.json, words.txt, text, chat, run (of train), tuned (of finetune), and hf, weights
    of GPT-2's shape with its ids."""
    rows = [{"instruction": f"Count from {word}.", "output": " ".join(WORDS[i:i + 3]), "category": "ab"[i % 2]}
            for i, word in enumerate(WORDS)]
    (root / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (root / "words.txt").write_text(" ".join(WORDS) * 12, encoding="utf-8")
    attempt(prepare_alpaca, {"source": root / "rows.json", "out_dir": root / "chat", "tokenizer": "bpe",
                             "vocab_size": 280, "val_fraction": 0.25})
    attempt(data.text, {"source": root / "words.txt", "out_dir": root / "text"})
    attempt(train, train_flags(root, root / "run"))
    attempt(train, train_flags(root, root / "base", data_dir=root / "chat"))
    attempt(finetune, tune_flags(root, root / "tuned"))
    gpt2 = model.GPT(model.GPTConfig(vocab_size=50257, block_size=16, n_layer=1, n_head=2, n_embd=4))
    (root / "hf").mkdir()
    write_hf_model(root / "hf", gpt2.config, model.to_gpt2_names(gpt2))


# ---- what is broken, and how ----

def some_text(rng):
    letter = chr(rng.choice([rng.randrange(0x20, 0x3000), rng.randrange(0x10000, 0x1FBFF)]))
    return "".join(rng.choice([*TEXTS, letter]) for _ in range(rng.randrange(12)))


def break_value(value, rng):
    """Nested dicts and lists with one part replaced, dropped, doubled or renamed; of a tensor, another type or NaN."""
    if isinstance(value, (dict, list)) and len(value) and rng.random() < 0.85:
        value, how = copy.copy(value), rng.random()
        key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
        if how < 0.15:
            del value[key]
        elif how < 0.25 and isinstance(value, list):
            value.append(value[key])
        elif how < 0.25:
            value[str(key) + "x"] = value.pop(key)
        else:
            value[key] = break_value(value[key], rng)
        return value
    if isinstance(value, torch.Tensor) and value.dim() and rng.random() < 0.7:
        with_nan = value.double()
        with_nan.view(-1)[-1:] = rng.choice([math.nan, math.inf])
        return rng.choice([with_nan.to(value.dtype), value.double(), value[:-1], value.int(), value[None]])
    return rng.choice(JUNK)


def break_bytes(raw, rng):
    """Bytes cut short; or a part with a flipped bit, random, zero, taken out, doubled or something that means a lot."""
    start = rng.randrange(min(len(raw), rng.choice([50, 2000, 10**9])) or 1)
    part = raw[start:start + rng.choice([1, 2, 8, 100])]
    flipped = bytes(byte ^ (1 << rng.randrange(8)) * (i == 0) for i, byte in enumerate(part))
    other = rng.choice([flipped, flipped, rng.randbytes(len(part)), bytes(len(part)), b"", part + part, b"[", b"\xff\xfe",
                        b"\r", b'"', b"1e999"])
    return raw[:start] if rng.random() < 0.1 else raw[:start] + other + raw[start + len(part):]


def break_file(path, rng):
    if path.suffix == ".json" and rng.random() < 0.7:
        broken = break_value(json.loads(path.read_text(encoding="utf-8")), rng)
        path.write_text(json.dumps(broken), encoding="utf-8")
    elif rng.random() < 0.05:
        path.unlink()
    else:
        path.write_bytes(break_bytes(path.read_bytes(), rng))


# ---- the families ----

def try_settings(rng, world, folder):
    """Every script with one to three settings that are wrong, in a folder that has an earlier run."""
    shutil.copytree(world / "run", folder / "out")
    script, flags = rng.choice([
        (train, train_flags(world, folder / "out")), (finetune, tune_flags(world, folder / "out")),
        (prepare_alpaca, {"source": world / "rows.json", "out_dir": folder / "data", "tokenizer": "bytes"}),
        (data.text, {"source": world / "words.txt", "out_dir": folder / "data"}),
        (chat, {"checkpoint": world / "tuned" / "best.pt", "prompt": "Hi", "max_new_tokens": 3})])
    for field in rng.sample(fields(script.Settings), rng.randint(1, 3)):
        flags[field.name] = rng.choice(SETTINGS if field.name in ENDLESS else SETTINGS + LARGE)
    safely(script, flags, folder)


def try_chat_files(rng, world, folder):
    """Rows of chats that are malformed, in structure or in bytes. A folder that comes of them opens."""
    rows = []
    for _ in range(rng.randrange(2, 12)):
        turns = ["user", "assistant"] * rng.randrange(1, 4)
        rows.append(rng.choice([{name: some_text(rng) for name in ("instruction", "input", "output", "category")},
                                {"messages": [{"role": role, "content": some_text(rng)} for role in turns]}]))
    for _ in range(rng.randrange(3)):
        rows = break_value(rows, rng)
    lines = "\n".join(map(json.dumps, rows if isinstance(rows, list) else [rows]))
    raw = rng.choice([json.dumps(rows), lines]).encode(rng.choice(["utf-8"] * 8 + ["utf-8-sig", "utf-16"]))
    (folder / "rows.json").write_bytes(break_bytes(raw, rng) if rng.random() < 0.3 else raw)
    flags = {"source": folder / "rows.json", "out_dir": folder / "data", "tokenizer": rng.choice(["bytes", "bpe"]),
             "vocab_size": 270, "val_fraction": 0.3, "max_tokens": rng.choice([8, 20, 1024]), "join": rng.choice([1, 3])}
    if safely(prepare_alpaca, flags, folder) is None:
        open_dataset(folder / "data", 2**20, 1)  # a token that was forged would be no turn


def try_texts(rng, world, folder):
    """Texts of any bytes. The ids that come of one decode to the same text, line ends as Python's."""
    raw = "".join(some_text(rng) for _ in range(rng.randrange(12))).encode("utf-8")
    raw = break_bytes(raw, rng) if rng.random() < 0.4 else raw
    (folder / "text.txt").write_bytes(raw)
    flags = {"source": folder / "text.txt", "out_dir": folder / "data", "tokenizer": rng.choice(["bytes", "bpe"]),
             "val_fraction": rng.choice([0.01, 0.1, 0.5, 0.99]), "bpe_bytes": rng.choice([1, 10, 10**9])}
    if safely(data.text, flags, folder) is None:
        enc, ids = get_tokenizer(folder_tokenizer(folder / "data")), []
        for split in SPLITS:
            ids += memoryview((folder / "data" / f"{split}.bin").read_bytes()).cast("H")
        if enc.decode_bytes(ids).decode() != (folder / "text.txt").read_text(encoding="utf-8-sig"):
            raise Broken("the ids decode to another text")


def try_folders(rng, world, folder):
    """A prepared folder with one file that is broken, trained on or scored."""
    kind = rng.choice(["text", "chat"])
    shutil.copytree(world / kind, folder / kind, ignore=shutil.ignore_patterns("chat_corpus.txt"))
    break_file(rng.choice(sorted((folder / kind).iterdir())), rng)
    script, flags = train, train_flags(world, folder / "out", data_dir=folder / kind)
    if kind == "chat" and rng.random() < 0.5:
        script, flags = chat, {"checkpoint": world / "tuned" / "best.pt", "score": folder / kind,
                               "score_file": folder / "score.json"}
    safely(script, flags, folder)


def try_checkpoints(rng, world, folder):
    """A checkpoint with broken contents, or bytes that must not pass for the weights, in all that reads one. To go
    on from, only with broken bytes: nobody but train.py writes those contents."""
    shutil.copytree(world / "run", folder / "out")
    path = folder / "out" / "last.pt"
    contents = torch.load(path, weights_only=True)
    script, flags = rng.choice([
        (chat, {"checkpoint": path, "prompt": "one", "max_new_tokens": 3}),
        (model, {"checkpoint": path, "export": folder / "hf"}),
        (train, train_flags(world, folder / "out", resume=True, max_iters=5)),
        (train, train_flags(world, folder / "new", init_from=path))])
    is_bytes = "resume" in flags or rng.random() < 0.4
    if is_bytes:
        path.write_bytes(break_bytes(path.read_bytes(), rng))
        with contextlib.suppress(ValueError):
            for name, tensor in model.load_checkpoint(path)["model"].items():
                if not torch.equal(tensor, contents["model"][name]):
                    raise Broken(f"a change in {name} was not noticed")
    else:
        torch.save(break_value(contents, rng), path)
    safely(script, flags, folder)


def try_weights(rng, world, folder):
    """GPT-2's weights with a broken header, config.json or byte; or as a broken pytorch_model.bin."""
    shutil.copytree(world / "hf", folder / "hf")
    path, how = folder / "hf" / "model.safetensors", rng.choice(["header", "json", "byte", "bin"])
    if how == "header":
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header = json.dumps(break_value(json.loads(raw[8:end]), rng)).encode("utf-8")
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    elif how == "bin":
        torch.save(break_value(dict(model.read_safetensors(path)), rng), folder / "hf" / "pytorch_model.bin")
        path.unlink()
    else:
        break_file(path if how == "byte" else folder / "hf" / "config.json", rng)
    safely(chat, {"init_from": folder / "hf", "prompt": "one", "max_new_tokens": 2}, folder)


def try_kills(rng, world, folder):
    """A run that is killed or stopped up to three times, and resumed, ends as the one that nobody stopped."""
    flags = train_flags(world, folder / "out", max_iters=12, eval_interval=5, save_interval=rng.choice([1, 3]))
    attempt(train, {**flags, "out_dir": folder / "straight"})
    for _ in range(rng.randint(0, 3)):
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                attempt(train, {**flags, "resume": (folder / "out" / "last.pt").exists()})
            os._exit(0)
        time.sleep(rng.uniform(0, 0.25))
        os.kill(child, rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP]))
        os.waitpid(child, 0)
    said, line = attempt(train, {**flags, "resume": (folder / "out" / "last.pt").exists()})
    for name in ("last.pt", "best.pt"):
        ours, theirs = (model.load_checkpoint(folder / run / name) for run in ("out", "straight"))
        same = all(torch.equal(ours["model"][key], tensor) for key, tensor in theirs["model"].items())
        if line or ours["history"] != theirs["history"] or not same:
            raise Broken(f"{line}; {name}: {ours['history']}, not {theirs['history']}; the same weights: {same}")


FAMILIES = {name.removeprefix("try_"): family for name, family in list(globals().items()) if name.startswith("try_")}


# ---- all of them ----

def raise_too_long(number, frame):
    raise TooLong(f"after {SECONDS} s")


@contextlib.contextmanager
def limits():
    """Within it a case too long or too large ends, and training neither draws nor measures."""
    import resource  # Windows has none
    old_limit, old_handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, raise_too_long)
    statm = Path("/proc/self/statm")  # where there is none, memory has no limit
    if statm.exists():
        used = int(statm.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, old_limit[1]))
    try:
        with mock.patch.multiple(train, draw_losses=lambda *_: None, peak_flops=lambda *_: 1e12):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old_limit)
        signal.signal(signal.SIGALRM, old_handler)


def hold(name, number, seed, world):
    """None where a case holds, else what came instead."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # for the relative paths among the settings
        signal.alarm(SECONDS)
        try:
            return FAMILIES[name](random.Random(f"{seed} {name} {number}"), world, Path(folder))
        except (Exception, TooLong) as error:
            return str(error) if isinstance(error, Broken) else traceback.format_exc()
        finally:
            signal.alarm(0)
            os.chdir(here)


def fuzz(s, names):
    """Try cases of these families and print those that broke: {family: [tried, held, seconds]}."""
    table = {name: [0, 0, 0.0] for name in names}
    limit = math.inf if s.cases or s.case is not None else 60 * s.minutes
    with tempfile.TemporaryDirectory() as world, limits():
        make_world(Path(world))
        began = time.monotonic()
        while names and time.monotonic() - began < limit:
            name = min(names, key=lambda name: table[name][2])  # the one that had the least time
            row, started = table[name], time.monotonic()
            number = row[0] if s.case is None else s.case
            problem = hold(name, number, s.seed, Path(world))
            if problem:
                print(f"\n{name}, seed {s.seed}, case {number}: {problem}", flush=True)
            row[:] = row[0] + 1, row[1] + (not problem), row[2] + time.monotonic() - started
            if row[0] == (s.cases if s.case is None else 1):
                names = [other for other in names if other != name]
    return table


def main(argv):
    """Try, print the table, and leave with exit code 1 where something broke. Raises ValueError."""
    s = config.load(Settings, argv, __doc__)
    if os.name == "nt":
        raise ValueError("it needs fork, alarms and limits of memory, which Windows does not have")
    if s.family not in (None, *FAMILIES):
        raise ValueError(f"family={s.family}: use one of {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    table = fuzz(s, [s.family] if s.family else list(FAMILIES))
    print(f"\n{'family':<14}{'cases':>8}{'held':>8}{'seconds':>10}")
    for name, (tried, held, seconds) in table.items():
        print(f"{name:<14}{tried:>8,}{held:>8,}{seconds:>10.0f}")
    sys.exit(not all(tried == held > 0 for tried, held, _ in table.values()))


if __name__ == "__main__":
    config.run(main)
