"""Eight exercises, one for each step of the README: edit a few lines, then check them.

    python -m tests.exercises        # list them, and show which are solved
    python -m tests.exercises 3      # check the third; if it fails, show what was seen, and a hint

A check runs the edited code on toy inputs and compares results, not code, so every correct solution passes.
Undo an edit (`git checkout model.py`) before the next step, or your numbers will differ from the README's. One
solution to each is in tests/solutions.md.
"""
import contextlib
import inspect
import io
import json
import re
import tempfile
import textwrap
import traceback
from collections import Counter
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import config
from config import UserError

# Each check imports the files that it is about: a syntax error in one of them does not fail other checks.


class NotYet(Exception):
    """A failed check: what it saw, and a hint."""


def expect(condition, seen, hint):
    """Raise NotYet unless the condition holds."""
    if not condition:
        raise NotYet(f"{seen}\nHint: {hint}")


def toy_gpt(n_layer=1):
    """Return a small GPT in eval mode, with weights so large that every part of it affects the output."""
    from model import GPT, GPTConfig
    torch.manual_seed(0)
    model = GPT(GPTConfig(32, 32, n_layer, n_head=2, n_embd=16)).eval()
    for p in model.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.5)
    return model


def output_of(main, *argv):
    """Run a script's main; return its standard output."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()):
        main(list(argv))
    return out.getvalue()


def show(numbers):
    """Format numbers: (0.5, -1.25) -> "0.500 -1.250"."""
    return " ".join(f"{float(number):.3f}" for number in numbers)


# ---- 1. text to tokens ----

def digits():
    from data import tokenizer
    text, wanted = "It's 12345 + 678 of 2024!", "It|'|s| |123|45| |+| |678| |of| |202|4|!".split("|")
    pieces = re.findall(tokenizer.SPLIT_PATTERN, text)
    seen = f"{text!r} is split into {'|'.join(pieces)!r}"
    expect("".join(pieces) == text, f"{seen}: characters are lost.",
           "the shortest number has one digit. The part for digits in SPLIT_PATTERN must match it, too.")
    words, wanted_words = ([p for p in all_ if not p[0].isdigit()] for all_ in (pieces, wanted))
    expect(words == wanted_words, f"{seen}: words, spaces or punctuation are split differently than before.",
           "SPLIT_PATTERN has four alternatives, separated by |; change only the one for digits.")
    numbers, wanted_numbers = ("|".join(p for p in all_ if p[0].isdigit()) for all_ in (pieces, wanted))
    expect(numbers == wanted_numbers, f"{seen}: its numbers are {numbers}, GPT-4's are {wanted_numbers}.",
           r"\d matches one digit, \d+ any number of them; regular expressions can count, too.")
    enc = tokenizer.get_tokenizer(tokenizer.train_bpe(["12345, 12345"], 256 + 10))
    learned = "|".join(tokenizer.token_pieces(enc, enc.encode_ordinary("12345")))
    expect(learned == "123|45", f"a tokenizer trained on '12345, 12345' splits 12345 into {learned}, not 123|45.",
           "Python's re splits the text in training and tiktoken in encoding: both must understand the pattern.")
    return ("12345 is split into 123|45, and a frequent group gets an id of its own, as 100 does here:\n"
            '  python -m data.tokenizer "100 + 12345"\n'
            "Texts get shorter, but 346 and 347 are now unrelated ids, so sums are harder to learn.")


# ---- 2. chats to tokens ----

def endless():
    from data import conversation
    from data.tokenizer import get_tokenizer
    enc = get_tokenizer("bytes")
    parts = ("<|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello <|end|> "
             "<|user|> Bye <|end|> <|assistant|> Salut <|end|>").split()
    messages = [{"role": role.strip("<|>"), "content": text} for role, text in zip(parts[1::3], parts[2::3])]
    ids, chat = conversation.encode_conversation(messages, enc), "".join(parts)
    expect(enc.decode(ids) == chat, f"a chat is now encoded as {enc.decode(ids)!r}; it was {chat!r}.",
           "keep the ids as they are, since a question must still end; change only what `supervised` returns.")
    learned = list(map(bool, conversation.supervised(ids, enc)))
    text = enc.decode([i for i, is_learned in zip(ids, learned) if is_learned])
    seen = f"of {chat!r} these tokens are in the loss: {text!r}"
    expect("<|end|>" not in text, f"{seen}.",
           "<|end|> is the last id of special_ids(enc). The last line of `supervised` must exclude it, too.")
    wanted = [part in ("Hello", "Salut") for part in parts for _ in enc.encode(part, allowed_special="all")]
    expect(learned == wanted, f"{seen}; it should be 'HelloSalut'.",
           "keep all of the assistant's text, and nothing else: only <|end|> is dropped from the loss.")
    return ("the loss covers the text of a reply but not its end. See what the model does now, in half a minute:\n"
            "  python train.py config/train_recite.py --out_dir=out/endless --max_iters=400\n"
            '  python chat.py --checkpoint=out/endless/best.pt --prompt="What is the plural of box?"')


# ---- 3. training from scratch ----

def cheat():
    compare(attended([8]), torch.ones(HEADS, 8, 8, dtype=torch.bool), "with 8 tokens at once",
            "under `if not self.fused`, one line sets the scores of later tokens to -inf.")
    return ("every token attends to all others, so it can copy its target. In generation there is nothing to copy:\n"
            "  python train.py config/train_recite.py --fused=False --out_dir=out/cheat --max_iters=200\n"
            '  python chat.py --checkpoint=out/cheat/best.pt --prompt="What is the plural of box?"')


HEADS = 3


@torch.no_grad()
def attended(parts):
    """Return which tokens each head of a toy GPT attends to, (nh, T, T) booleans. parts: how many tokens are read at a
    time; several parts need the cache."""
    from model import GPT, GPTConfig, KVCache
    T, start, weights = sum(parts), 0, []
    model = GPT(GPTConfig(32, 32, n_layer=1, n_head=HEADS, n_embd=12, fused=False)).eval()
    model.h[0].attn.attn_dropout.register_forward_hook(lambda module, args, output: weights.append(output[0]))
    cache = KVCache(model) if len(parts) > 1 else None
    for n in parts:
        model.hidden(torch.arange(start, start + n)[None], cache, start)
        start += n
    expect(len(weights) == len(parts), "attn_dropout was not called.",
           "keep `weights = self.attn_dropout(...)`: the checks and chat.py's --look read its output.")
    return torch.cat([F.pad(w, (0, T - w.shape[2])) for w in weights], dim=1) > 0


def compare(seen, wanted, case, hint):
    """Raise NotYet for the first head that attends to the wrong tokens, at the newest token where it does."""
    for head, i in ((head, i) for head in range(HEADS) for i in reversed(range(wanted.shape[1]))):
        found, right = ((row[head, i].nonzero()[:, 0] + 1).tolist() for row in (seen, wanted))
        expect(found == right, f"{case}: head {head + 1} at token {i + 1} attends to tokens {found}, expected "
               f"{right}.", f"{hint} (The fused kernel is not checked: train with --fused=False.)")


# ---- 4. attention ----

def window():
    causal = torch.ones(20, 20, dtype=torch.bool).tril()
    wanted = torch.stack([causal.triu(-7)] + [causal] * (HEADS - 1))  # (nh, T, T)
    compare(attended([20]), wanted, "in training, with all 20 tokens at once",
            "under `if not self.fused`, causal_mask returns one (T, S) mask for all heads. Repeat it to (nh, T, S) and "
            "change the first.")
    compare(attended([1] * 20), wanted, "in generation, one new token after cached ones (T = 1)",
            "the T new tokens are the last of S: which of the S positions may the first head see?")
    compare(attended([12, 8]), wanted, "in the prefill of a second question, 8 tokens after 12 cached ones",
            "query i of T is token S - T + i: its window starts at S - T + i - 7.")
    return ("the first head attends to 8 tokens, in training and in generation. See it, in half a minute:\n"
            "  python train.py config/train_recite.py --fused=False --out_dir=out/window --max_iters=200\n"
            '  python chat.py --checkpoint=out/window/best.pt --look=out/look.html --prompt="Reverse box."')


# ---- 5. showing the work ----

PRODUCT_STEPS = 900  # of training, about a minute


def product():
    from data.rules import result_of
    trained, held_out = products("train", 2000), products("held_out", 300)
    expect(trained == products("train", 2000), "the same seed gave different rows.",
           "draw everything with d: d.numbers(low, high, high), d.ask(section, ...).")
    for question, answer in trained + held_out:
        numbers = [int(number) for number in re.findall(r"\d+", question)]
        expect(len(numbers) == 2 and min(numbers) <= 9, f"{question!r} is not about a number and a digit.",
               "d.numbers(2, 99, 9) draws both; the question names each once.")
        expect(result_of(answer) == str(numbers[0] * numbers[1]), f"{question!r} has the answer {answer!r}.",
               "end with a comma and the product, as in 7*6=42, 4*6=24, 24+4=28, 282: the 28 tens, then the 2 of 42.")
        expect(max(numbers) <= 9 or answer.count("=") > 1, f"{question!r} has the answer {answer!r}, without steps.",
               "multiply each digit by the factor, then add the carry; see add_in_steps.")
    pairs, unseen = ({tuple(sorted(re.findall(r"\d+", question))) for question, _ in rows} for rows in (trained, held_out))
    expect(not pairs & unseen, f"{' and '.join(min(pairs & unseen, default=''))} are in both a training and a held-out row.",
           "draw operands with d.numbers, which knows what is held out.")
    return f"for example, {trained[0][0]!r} -> {trained[0][1]!r}."


def products(operands, count):
    """Return [(question, answer), ...] of the new category."""
    from data import rules
    name = "rule/product (work)"
    expect(name in rules.RULES, f"RULES has no {name!r}.",
           'write a function such as `compare`, and add a line to RULES: "rule/product (work)": (multiply, 8).')
    draw = rules.Draw(1, operands)
    try:
        return [rules.RULES[name][0](draw) for _ in range(count)]
    except KeyError as error:
        raise NotYet(f"a rule asks for {error}, which does not exist.\nHint: d.ask needs a section [name] in "
                     "data/wordings.txt, and a value for each name in braces: d.ask('product', a=a, b=b).") from error


def train_on_products():
    """Train a small model on the new category; return how many held-out products it answers correctly, as text."""
    import chat
    import prepare_alpaca
    import train
    with tempfile.TemporaryDirectory() as folder:
        for operands, count in (("train", 6000), ("held_out", 100)):
            rows = [{"question": question, "answer": answer, "category": "product (work)"}
                    for question, answer in dict.fromkeys(products(operands, count))]
            Path(folder, f"{operands}.json").write_text(json.dumps(rows), encoding="utf-8")
        output_of(prepare_alpaca.main, f"--source={folder}/train.json", f"--out_dir={folder}", "--tokenizer=bytes",
                  "--max_tokens=65")
        output_of(train.main, f"--data_dir={folder}", f"--out_dir={folder}", f"--max_iters={PRODUCT_STEPS}", "--n_layer=2",
                  "--n_head=4", "--n_embd=64", "--block_size=64", "--batch_size=32", "--learning_rate=2e-2",
                  "--embedding_learning_rate=1e-2", "--final_lr=0.05", "--best_by=train", "--eval_interval=1000",
                  "--sample_interval=0", "--device=cpu")
        output_of(chat.main, f"--checkpoint={folder}/best.pt", f"--score={folder}/held_out.json", "--device=cpu")
        answers = json.loads(Path(folder, "score.json").read_text(encoding="utf-8"))["answers"]
    example = max(answers, key=lambda answer: answer["exact"])
    return (f"Trained for a minute, a model correctly computes {sum(a['exact'] for a in answers)} of {len(answers)} "
            f"products that it has never seen, such as {example['question']!r}: {example['answer']!r}.")


# ---- 6. pretraining ----

def rms():
    from model import GPTConfig, layer_norm
    norm = layer_norm(GPTConfig(32, 32, 1, 1, n_embd=4))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 6.0, 0.0]]])  # (1, 2, 4)
    wanted = x / x.square().mean(-1, keepdim=True).sqrt()  # (1, 2, 4)
    with torch.no_grad():
        y = norm(x)
        seen = f"1 2 3 4 becomes {show(y[0, 0])}; RMSNorm gives {show(wanted[0, 0])}"
        expect(y.sum(-1).abs().max() > 0.1, f"{seen}. The mean was subtracted first.",
               "nn.LayerNorm does that, with or without a bias. RMSNorm only divides by the root mean square.")
        expect(torch.allclose(y, wanted, atol=1e-3), f"{seen}. 0 0 6 0 becomes {show(y[0, 1])}; RMSNorm gives "
               f"{show(wanted[0, 1])}.",
               "divide by the root of the mean (not the sum) of the squares, for each token separately: over the last "
               "dimension, with keepdim=True.")
        expect(norm(torch.zeros(1, 1, 4)).isfinite().all(), "0 0 0 0 becomes nan.",
               "add a small number, such as 1e-5, inside the square root.")
        shapes = [tuple(p.shape) for p in norm.parameters()]
        expect(shapes == [(4,)], f"its parameters have the shapes {shapes}; RMSNorm has one of (4,).",
               "it has a learned scale per channel, an nn.Parameter that starts as ones, and no shift.")
    return ("no mean, no shift. Does it change the loss? Train for half a minute, with your edit and without it\n"
            "(git stash, git stash pop):\n"
            "  python train.py config/train_recite.py --out_dir=out/rms --max_iters=400")


# ---- 7. GPT-2's weights ----

def rotary():
    from model import KVCache
    model, ids = toy_gpt(n_layer=2), torch.arange(10)[None]
    layer, x = model.h[0].attn, torch.randn(1, 10, 16)
    with torch.no_grad():
        logits = model(ids)[0, :, :32]  # (T, V)
        if hasattr(model, "wpe"):
            model.wpe.weight.normal_()
            change = (model(ids)[0, :, :32] - logits).abs().max()
            expect(change < 1e-5, f"with different weights in wpe the logits change by up to {change:.2f}.",
                   "GPT.hidden still adds the position embeddings.")
        y, swapped = layer(x), layer(x[:, [1, 0, *range(2, 10)]])
        expect((y[0, -1] - swapped[0, -1]).abs().max() > 1e-5,
               "the first two of 10 tokens were swapped, and the output of the last one stayed the same.",
               "rotate q and k where the comment in CausalSelfAttention.forward says so, before the two paths: at "
               "position p, by p times an angle.")
        change = (y - layer(x, None, 7)).abs().max()
        expect(change < 1e-3, f"the outputs of the same 10 tokens, 7 positions later, differ by up to {change:.2f}.",
               "scores depend on distances alone if both q and k, but not v, are rotated by the same angles. Rotating "
               "(a, b) gives (a cos - b sin, a sin + b cos).")
        cache = KVCache(model)
        parts = [model.head(model.hidden(ids[:, a:b], cache, a))[0, :, :32] for a, b in ((0, 1), (1, 6), (6, 10))]
        differ = (torch.cat(parts) - logits).abs().amax(1) > 1e-3
        expect(not differ.any(), f"from token {differ.int().argmax() + 1} on, the logits differ with the cache.",
               "with a cache the new tokens start at position `start`, not at 0, and cached keys are rotated already.")
    return ("only distances matter, and only q and k are rotated. GPT-2's own weights no longer fit, so train:\n"
            "  python train.py config/train_recite.py --out_dir=out/rotary --max_iters=400\n"
            '  python chat.py --checkpoint=out/rotary/best.pt --prompt="What is the plural of box?"')


# ---- 8. sampling ----

def min_p():
    from model import sample
    expect("min_p" in inspect.signature(sample).parameters, "sample has no parameter min_p.",
           "add one with a default that drops nothing, as top_k and top_p have.")
    p = torch.tensor([0.04, 0.5, 0.15, 0.3, 0.01])
    for sampling, wanted in (({}, [0, 1, 2, 3, 4]), ({"min_p": 0.2}, [1, 2, 3]), ({"min_p": 1.0}, [1]),
                             ({"min_p": 0.2, "top_k": 4}, [1, 2, 3]), ({"min_p": 0.2, "top_p": 0.7}, [1, 3]),
                             ({"min_p": 0.2, "temperature": 0}, [1])):
        ids = sorted(sample_often(p, **sampling))
        expect(ids == wanted, f"from probabilities of {show(p)}, {sampling} samples the ids {ids}; it should sample "
               f"{wanted}.", "keep the ids whose probability (not logit) is at least min_p times the largest one. "
               "After top_k and top_p, probs and ids are in a different order.")
    replies = []
    for flags in (["--temperature=0"], ["--temperature=2", "--top_k=0", "--min_p=1"]):
        try:
            replies.append(toy_reply(*flags))
        except UserError as error:
            raise NotYet(f"sample is correct, but chat.py --min_p=1 fails: {error}\nHint: add a line to its Settings, "
                         "below top_p: name, type, default, and a comment, which --help shows.") from error
    expect(replies[0] == replies[1], "chat.py --min_p=1 does not give the same reply as --temperature=0.",
           "find where chat.py passes top_p to generate.")
    return ("unlikely tokens are dropped, whether the distribution is flat or peaked. Compare at a high temperature:\n"
            '  python chat.py --temperature=1.5 --top_k=0 --prompt="Who are you?"\n'
            '  python chat.py --temperature=1.5 --top_k=0 --min_p=0.1 --prompt="Who are you?"')


def sample_often(p, **sampling):
    """Return how often `sample` returns each id in 400 calls, from probabilities (V,)."""
    from model import sample
    generator = torch.Generator().manual_seed(0)
    return Counter(sample(p.log(), [], generator, **sampling) for _ in range(400))


def toy_reply(*flags):
    """Return what chat.py prints for a prompt to an untrained toy model."""
    import chat
    from model import GPT, GPTConfig
    from runtime.checkpoint import model_state, save_checkpoint
    torch.manual_seed(0)
    model = GPT(GPTConfig(260, block_size=32, n_layer=1, n_head=2, n_embd=16))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "best.pt")
        save_checkpoint(path, model_state(model, "bytes", "text", step=1, max_iters=1))
        return output_of(chat.main, f"--checkpoint={path}", "--prompt=Hi", "--device=cpu", *flags)


# ---- all of them ----

# (check, task, place to edit)
EXERCISES = (
    (digits, "Split numbers into groups of up to three digits, as GPT-4 does: 12345 becomes 123|45.",
     "data/tokenizer.py: SPLIT_PATTERN"),
    (endless, "Exclude the <|end|> of a reply from the loss, so that the model does not learn to stop.",
     "data/conversation.py: supervised"),
    (cheat, "Let every token attend to the tokens after it. Why does a loss near 0 mean nothing then?",
     "model.py: CausalSelfAttention.forward, the path for fused=False"),
    (window, "Make the first head of every layer attend to the 8 newest tokens only.",
     "model.py: CausalSelfAttention.forward, the path for fused=False"),
    (product, 'Teach the model to multiply by one digit with the work shown: "What is 47 times 6?", "7*6=42, 4*6=24, 24+4=28, 282".',
     'data/rules.py: a function, RULES["rule/product (work)"]; data/wordings.txt: a section with its wordings'),
    (rms, "Replace layer norm with RMSNorm (Zhang & Sennrich 2019): scale, without subtracting the mean.",
     "model.py: layer_norm"),
    (rotary, "Replace learned position embeddings with rotary position embeddings (Su et al. 2021): rotate q and k.",
     "model.py: GPT.hidden, CausalSelfAttention.forward"),
    (min_p, "Add min_p sampling (Nguyen et al. 2024): drop tokens far less likely than the best one.",
     "model.py: sample; chat.py: a setting, so that --min_p=0.1 works"),
)


def result(number):
    """Run the check of exercise `number`, from 1; return (whether it passes, the text to print)."""
    try:
        return True, f"Exercise {number} passes: {EXERCISES[number - 1][0]()}"
    except NotYet as error:
        return False, f"Exercise {number} does not pass yet: {error}"
    except Exception as error:  # edited code may raise anything
        return False, f"Exercise {number} does not pass yet: {describe(error)}"


def describe(error):
    """Return an error as one line: its innermost place in the repository outside this file, and its message."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    message = (str(error).splitlines() or [""])[0]
    if isinstance(error, SyntaxError):
        frames, message = [(error.filename, error.lineno)], error.msg
    edited = [(Path(file), line) for file, line in frames
              if file != __file__ and Path(file).is_relative_to(config.REPO) and ".venv" not in file]
    place = f"{edited[-1][0].relative_to(config.REPO).as_posix()}, line {edited[-1][1]}: " if edited else ""
    return f"{place}{type(error).__name__}: {message}"


def main(argv):
    """List the exercises, or check one, with exit code 1 if it does not pass. Raises UserError for a wrong number."""
    torch.set_num_threads(1)
    numbers = range(1, len(EXERCISES) + 1)
    if argv in ([], ["--help"], ["-h"]):
        print("Edit a file, then check it: python -m tests.exercises 1")
        for number in numbers:
            _, task, where = EXERCISES[number - 1]
            mark = "passes " if result(number)[0] else "not yet"
            print(f"\n{number}  {mark}  {task}\n            {where}", flush=True)
        print("\ngit diff shows your edits; git checkout model.py undoes them. Stuck? See tests/solutions.md")
        return
    if len(argv) > 1 or argv[0] not in map(str, numbers):
        raise UserError(f"{' '.join(argv)}: not an exercise; use a number from 1 to {len(EXERCISES)}")
    passes, text = result(int(argv[0]))
    for line in text.splitlines():  # commands are indented, and not wrapped
        print(line if line.startswith(" ") else textwrap.fill(line, 100, break_on_hyphens=False))
    if passes and argv == ["5"]:
        print("Training a small model for a minute ...", flush=True)
        print(textwrap.fill(train_on_products(), 100))
    if passes:
        files = re.findall(r"[\w/]+\.(?:py|txt)", EXERCISES[int(argv[0]) - 1][2])
        print("Then undo your edit: git checkout", *files)
    raise SystemExit(not passes)


if __name__ == "__main__":
    config.run(main)
