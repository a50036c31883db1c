"""Eight exercises, one for each step of the README's journey. Each is an edit of a few lines, checked here.

    python -m tests.exercises        # what they are, and which are right already
    python -m tests.exercises 3      # is the third right? If not: what was seen, and a hint

Read a task, change the file that it names, and ask as often as you like. `git diff` shows what you changed, and
`git checkout model.py` takes it back: do so before you go on, for what was made with one code is not what another
computes. Every check runs the edited code on something tiny and looks at what comes out; it does not look at how you
wrote it.
The solutions are in tests/solutions.md.
"""
import config  # isort: skip  # first: from here on Ctrl-C leaves no traceback
import inspect
import math
import re
import sys
import textwrap
import traceback
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F

# What is edited is imported by the checks that need it: a file with a mistake in it stops no other check.


class NotYet(Exception):
    """What a check saw, and a hint."""


def expect(is_so, seen, hint):
    """Go on if it is so; else raise NotYet."""
    if not is_so:
        raise NotYet(f"{seen}\nHint: {hint}")


def spread(module):
    """A module with weights so large that everything in it can be seen to matter, in eval mode."""
    torch.manual_seed(0)
    for p in module.parameters():
        if p.dim() == 2:
            nn.init.normal_(p, std=0.5)
    return module.eval()


def toy_gpt(n_layer=1):
    """A small GPT, spread."""
    import model as gpt
    return spread(gpt.GPT(gpt.GPTConfig(vocab_size=32, block_size=32, n_layer=n_layer, n_head=2, n_embd=16)))


def shown(numbers):
    """Numbers for people: (0.5, -1.25) -> "0.500 -1.250"."""
    return " ".join(f"{float(number):.3f}" for number in numbers)


# ---- 1. text to tokens ----

def digits():
    """Cut numbers into groups of up to three digits, as GPT-4 does: 12345 is 123|45.

    data/tokenizer.py: SPLIT_PATTERN
    """
    from data import tokenizer
    text, wanted = "It's 12345 + 678 of 2024!", "It|'|s| |123|45| |+| |678| |of| |202|4|!".split("|")
    pieces = re.findall(tokenizer.SPLIT_PATTERN, text)
    seen = f"{text!r} is cut into {'|'.join(pieces)!r}"
    expect("".join(pieces) == text, f"{seen}, and some of it is lost: every character must be in a piece.",
           "how many digits has the shortest number? The part for digits in SPLIT_PATTERN must match it too.")
    expect(re.sub(r"\d", "", "".join(pieces)) == re.sub(r"\d", "", text) and
           [p for p in pieces if not p[0].isdigit()] == [p for p in wanted if not p[0].isdigit()],
           f"{seen}: what is no number is cut in another way than before.",
           "SPLIT_PATTERN has four parts, with | between them: only the one for digits is to change.")
    numbers, right = ("|".join(p for p in all_ if p[0].isdigit()) for all_ in (pieces, wanted))
    expect(numbers == right, f"{seen}: its numbers are {numbers}, where GPT-4 has {right}.",
           r"\d in SPLIT_PATTERN is one digit, \d+ is as many as there are; Python's re has something between the two.")
    expect(re.findall(tokenizer.SPLIT_PATTERN, "\u0661\u0662") != [], r"Arabic digits, '\u0661\u0662', are lost.",
           r"other scripts have digits of their own; \d knows them, [0-9] does not.")
    enc = tokenizer.get_tokenizer(tokenizer.train_bpe(["12345, 12345"], 256 + 10))
    learned = "|".join(tokenizer.token_pieces(enc, enc.encode_ordinary("12345")))
    expect(learned == "123|45", f"a tokenizer learned from '12345, 12345' cuts 12345 into {learned}, not 123|45.",
           "train_bpe and tiktoken both cut by the pattern: is it one that both understand?")
    return ("12345 is cut into 123|45, and what is frequent within a piece gets an id, as 100 does here:\n"
            '  python -m data.tokenizer "100 + 12345"\n'
            "Texts get shorter, but that 12 is one more than 11 must now be learned for each pair of ids.")


# ---- 2. chats to tokens ----

def endless():
    """Unlearn to stop: nobody is taught the <|end|> of an answer any more.

    data/conversation.py: supervised
    """
    from data import conversation
    from data.tokenizer import get_tokenizer
    enc = get_tokenizer("bytes")
    parts = ("<|endoftext|> <|user|> Hi <|end|> <|assistant|> Hello <|end|> "
             "<|user|> Bye <|end|> <|assistant|> Salut <|end|>").split()
    ids = conversation.encode_conversation([{"role": role.strip("<|>"), "content": text}
                                            for role, text in zip(parts[1::3], parts[2::3])], enc)
    expect(enc.decode(ids) == "".join(parts), f"a chat is now written {enc.decode(ids)!r}, and was {''.join(parts)!r}.",
           "leave the ids as they are: a question must still end. Only what is learned from, in `supervised`, changes.")
    learned = [bool(is_learned) for is_learned in conversation.supervised(ids, enc)]
    taught = enc.decode([i for i, is_learned in zip(ids, learned) if is_learned])
    seen = f"of {''.join(parts)!r} this is learned from: {taught!r}"
    expect("<|end|>" not in taught, f"{seen}.",
           "the last line of `supervised` says it: what stands behind <|assistant|> and is no marker. <|end|> is none "
           "of those three markers; its id is the last of special_ids.")
    wanted = [part in ("Hello", "Salut") for part in parts for _ in enc.encode(part, allowed_special="all")]
    expect(learned == wanted, f"{seen}, which should be 'HelloSalut'.",
           "all of the assistant's text stays, and nothing else: only <|end|> goes out of what `supervised` returns.")
    return ("of an answer only the text is learned, not that it ends. See what becomes of it, in half a minute:\n"
            "  python train.py config/train_recite.py --out_dir=out/endless --max_iters=400\n"
            '  python chat.py --checkpoint=out/endless/best.pt --prompt="What is the plural of box?"')


# ---- 3. training from scratch ----

def cheat():
    """Let every word see the words after it. Why is the loss, nearly 0, no triumph?

    model.py: CausalSelfAttention.forward
    """
    model, ids = toy_gpt(n_layer=1), torch.arange(8)[None]
    other = ids.clone()
    other[0, -1] = 20
    changed = (model(ids)[..., :32] - model(other)[..., :32]).abs().amax(2)[0] > 1e-4  # (8,)
    places = " ".join(str(i + 1) for i in changed.nonzero()[:, 0].tolist())
    expect(changed.all(), "of 8 words the last was replaced by another, and what the model expects next changed at "
           f"{int(changed.sum())} of 8 places only (place {places}).",
           "`attention` only shows how it is done. The model calls F.scaled_dot_product_attention, in "
           "CausalSelfAttention.forward: who tells it there that no word may see a later one?")
    chance, loss = math.log(16), loss_on_random_ids()
    expect(loss < chance / 2, f"trained on random ids it reaches a loss of {loss:.2f}; nobody who cannot see the next id gets "
           f"below ln 16 = {chance:.2f}, and who sees it gets to nearly 0.",
           "each word must see at least the next one: look at is_causal and mask in CausalSelfAttention.forward.")
    return (f"trained on random ids, of which nobody can foresee the next, it reaches a loss of {loss:.2f}; chance is "
            f"ln 16 = {chance:.2f}. It copies the answer from the next place, which is empty when a word is to be written:\n"
            "  python train.py config/train_recite.py --out_dir=out/cheat --max_iters=200\n"
            '  python chat.py --checkpoint=out/cheat/best.pt --prompt="What is the plural of box?"')


def loss_on_random_ids(vocab_size=16, T=8, steps=150):
    """The loss of a toy GPT, trained for a second on ids drawn at random and asked for others; the last place, behind
    which nothing stands that it could see, does not count."""
    import model as gpt
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(vocab_size, T, n_layer=1, n_head=4, n_embd=32))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        ids = torch.randint(vocab_size, (64, T + 1))
        loss = model(ids[:, :-1], ids[:, 1:]) / (64 * T)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ids = torch.randint(vocab_size, (256, T + 1))
    with torch.no_grad():
        logits = model.eval()(ids[:, :-1])[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:-1].flatten()).item()


# ---- 4. inside, seen ----

WINDOW, TOKENS, HEADS = 8, 20, 3


def window():
    """A head of its own: in every layer the first head sees only the 8 newest tokens.

    model.py: CausalSelfAttention.forward
    """
    import model as gpt
    triangle = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    wanted = torch.stack([triangle.triu(1 - WINDOW)] + [triangle] * (HEADS - 1))  # (nh, T, T)
    layer = spread(gpt.CausalSelfAttention(gpt.GPTConfig(32, 32, 1, HEADS, 4 * HEADS)))
    with torch.no_grad():
        layer.c_proj.weight.copy_(torch.eye(4 * HEADS))  # so that the heads stay side by side
    compare_sight(seen_by(layer, [TOKENS]), wanted, "in training, all 20 tokens at once",
                  "one mask for all heads is what is_causal gives to F.scaled_dot_product_attention. Its attn_mask may "
                  "also be (nh, T, S), with another triangle for each head, if is_causal is False.")
    compare_sight(seen_by(layer, [1] * TOKENS), wanted, "as it answers, one new token behind cached ones (T = 1)",
                  "T new tokens are the newest of S: which of S places are the 8 newest of the first one's view? "
                  "And one new token, which had no mask, needs one now.")
    compare_sight(seen_by(layer, [12, 8]), wanted, "as it reads a second question, 8 tokens behind 12 cached ones",
                  "the i-th of T new tokens, from 0, is the token S - T + i: the window moves along with it.")
    return ("the first head sees 8 tokens, in training and in answers. See it, in half a minute:\n"
            "  python train.py config/train_recite.py --out_dir=out/window --max_iters=200\n"
            '  python chat.py --checkpoint=out/window/best.pt --look=out/look.html --prompt="What is the plural of box?"')


def seen_by(layer, parts):
    """Which tokens each head of an attention layer sees, (nh, T, T) booleans: those whose change changes what comes out.
    parts: how many tokens it reads at a time; several parts need the cache."""
    import model as gpt
    C = 4 * HEADS

    def heads(x):  # (1, T, C) -> (T, nh, hs)
        if len(parts) == 1:
            return layer(x)[0].view(TOKENS, HEADS, -1)
        cache = gpt.LayerCache(gpt.GPTConfig(32, 32, 1, HEADS, C), "cpu", torch.float32)
        starts = [sum(parts[:i]) for i in range(len(parts))]
        read = [layer(x[:, start:start + n], cache, start) for start, n in zip(starts, parts)]
        return torch.cat(read, 1)[0].view(TOKENS, HEADS, -1)

    with torch.no_grad():
        x = torch.randn(1, TOKENS, C, generator=torch.Generator().manual_seed(1))
        usual, seen = heads(x), []
        for j in range(TOKENS):
            other = x.clone()
            other[0, j] = -other[0, j]
            seen.append((heads(other) - usual).abs().amax(2).T > 1e-6)  # (nh, T): who has seen token j
    return torch.stack(seen, 2)


def compare_sight(seen, wanted, where, hint):
    """Raise NotYet for the first head, and its newest token, that sees other tokens than it should."""
    for head in range(HEADS):
        for i in reversed(range(TOKENS)):
            expect(seen[head, i].equal(wanted[head, i]), f"{where}: head {head + 1} of token {i + 1} sees "
                   f"{spans(seen[head, i])}; it should see {spans(wanted[head, i])}.", hint)


def spans(seen):
    """Booleans (T,) as people say them: "tokens 1 to 3, 5"."""
    numbers = [i + 1 for i in seen.nonzero()[:, 0].tolist()]
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    runs = [f"{a} to {b}" if a < b else f"{a}" for a, b in zip(starts, ends)]
    return "tokens " + ", ".join(runs) if runs else "nothing"


# ---- 5. reciting, and knowing the rule ----

KNOWN = {*(f"rule/{name}" for name in (
    "plural", "past tense", "upper case", "length", "reverse", "unit conversion", "sum", "subtraction", "comparison",
    "counting", "sequence", "sorting", "letters", "negation", "repeat", "word picking", "yes or no")),
    *(f"chat/{name}" for name in (
        "other word", "other letter", "more", "polite", "told 1 turn ago", "told 2 turns ago", "told 3 turns ago",
        "told 4 turns ago", "two told"))}


def rule():
    """Invent a rule, as "Say wug twice." -> "wug wug", and let the rows teach it.

    data/rules.py: RULES, OF_WORDS; data/wordings.txt: a section of its wordings
    """
    from data import rules
    new = sorted(set(rules.RULES) - KNOWN)
    expect(new, f"RULES has the {len(KNOWN)} categories that it had before.",
           "write a function that draws a word and returns a question and its answer, as `letter` does (or add a line "
           "to WORD_RULES), wordings for it in data/wordings.txt, and name it in RULES: (what makes it, how often).")
    for name in new:
        kinds = ["train", "held_out"] + ["made_up"] * (name in rules.OF_WORDS)
        asked = {kind: conversations_of(name, kind) for kind in kinds}
        check_answers(name, asked)
    rows = Counter(row["category"] for row in rules.make_rows(4000, 1, "train"))
    expect(all(rows[name] for name in new), f"of 4,000 rows none is of {', '.join(n for n in new if not rows[n])}.",
           "the number in RULES is how often it comes, beside those of the others, which add up to about 130.")
    question, answer = asked["held_out"][0][-1]
    return (f"{new[-1]}: {question!r} -> {answer!r}; {rows[new[-1]]} of 4,000 rows. Is the rule learned? Four minutes\n"
            "(it is the first half of make chat, which has about half of all right, and needs the second for more):\n"
            "  python -m data.rules\n"
            "  python prepare_alpaca.py config/prepare_rules.py\n"
            "  python train.py config/train_rules.py --out_dir=out/my_rule\n"
            "  python -m data.rules --operands=held_out --rows=1000 --out=data/rules/held_out.json\n"
            "  python chat.py --checkpoint=out/my_rule/best.pt --score=data/rules/held_out.json")


def conversations_of(name, kind, count=300):
    """So many of a category's conversations, of one kind of operands: lists of (question, answer)."""
    from data import rules

    def made(draw):
        try:
            turns = rules.RULES[name][0](draw)
        except KeyError as error:
            raise NotYet(f"{name} asks for {error}, which is not there.\nHint: d.ask looks for a section of that name in "
                         "data/wordings.txt, [name] in a line of its own, and fills in what stands in braces: "
                         "each needs a value, as in d.ask(\"letters\", w=word).") from error
        return turns if isinstance(turns, list) else [turns]

    drawn, again = ([made(draw) for _ in range(count)] for draw in (rules.Draw(1, kind), rules.Draw(1, kind)))
    odd = next((t for turns in drawn for t in turns
                if not isinstance(t, tuple) or len(t) != 2 or not all(isinstance(z, str) and z.strip() for z in t)), None)
    expect(odd is None, f"{name} returned {str(odd)[:60]!r}.",
           "a rule returns a question and its answer, two texts (or, for a chat, a list of such pairs).")
    expect(drawn == again, f"{name} drew other rows from the same seed: {drawn[0][0][0]!r}, then {again[0][0][0]!r}.",
           "draw everything with d: d.word(), d.number(low, high), d.rng.choice(...).")
    return drawn


def check_answers(name, asked):
    """Raise NotYet unless a question has one answer, and none of training is asked in a test. asked: {kind of operands:
    conversations}."""
    from data import rules
    written = rules.Draw(1, "train").questions
    answers = {}
    for kind, conversations in asked.items():
        for turns in conversations:
            before = ""
            for question, answer in turns:
                first, where = answers.setdefault(before + question, (answer, kind))
                expect(first == answer, f"{question!r} is answered by {first!r}, and by {answer!r}.",
                       "an answer must follow from what the question says; is something drawn that it does not tell?")
                before += f"{question}\n{answer}\n"
            expect(len(turns) > 1 or turns[0][0] not in written, f"{turns[0][0]!r} is a hand-written question.",
                   "some of those are held out: word yours differently in data/wordings.txt.")
            expect(kind == where or where != "train", f"{question!r} is asked in training, and in {kind} rows too.",
                   "draw what a question is about with d.word() and d.number(low, high), which know what is held out; "
                   "a list of your own does not, unless you filter it with d.fits.")


# ---- 6. a model that read first ----

def rms():
    """RMSNorm (Zhang & Sennrich 2019) for layer norm: scale, and take no mean off.

    model.py: layer_norm
    """
    import model as gpt
    norm = gpt.layer_norm(gpt.GPTConfig(32, 32, 1, 1, n_embd=4))
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 6.0, 0.0]]])  # (1, 2, 4)
    expect(isinstance(norm, nn.Module), f"layer_norm returns a {type(norm).__name__}.",
           "it must return a module: torch's, or a class of your own with __init__ and forward, as MLP is.")
    shapes = [tuple(p.shape) for p in norm.parameters()]
    wanted = x / x.square().mean(-1, keepdim=True).sqrt()  # (1, 2, 4)
    with torch.no_grad():
        y = norm(x)
        told = f"1 2 3 4 becomes {shown(y[0, 0])}, where RMSNorm has {shown(wanted[0, 0])}"
        expect(y.shape == x.shape, f"{tuple(x.shape)} becomes {tuple(y.shape)}.",
               "the mean is over the last dimension only, and needs keepdim=True.")
        expect(y.sum(-1).abs().max() > 0.1, f"{told}: the mean is taken off first.",
               "PyTorch's nn.LayerNorm does that, with and without a bias. RMSNorm only divides by the root of the mean of "
               "the squares.")
        expect(torch.allclose(y, wanted, atol=1e-3), f"{told}; 0 0 6 0 becomes {shown(y[0, 1])}, where it has "
               f"{shown(wanted[0, 1])}.",
               "divide each token's channels by the root of the mean, not the sum, of their squares; each token's alone.")
        expect(norm(torch.zeros(1, 1, 4)).isfinite().all(), "0 0 0 0 becomes nan.",
               "add something tiny, as 1e-5, before the root.")
        expect(shapes == [(4,)], f"it has parameters of the shapes {shapes}; RMSNorm has one of (4,).",
               "one learned scale a channel, an nn.Parameter of ones, and no shift.")
        scales = torch.tensor([1.0, 10.0, 100.0, 0.0])
        next(norm.parameters()).copy_(scales)
        expect(torch.allclose(norm(x), wanted * scales, atol=0.1),
               f"with the scales 1 10 100 0, 1 2 3 4 becomes {shown(norm(x)[0, 0])}.",
               "what comes out is multiplied by the learned scale.")
        model = toy_gpt()
    left = [name for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)]
    expect(not left, f"these are layer norms still: {', '.join(left)}.",
           "the blocks and the GPT all make theirs with layer_norm(config).")
    return ("no mean, no shift, and all it needs is there. Does the loss mind? Two runs of half a minute tell, one of them "
            "with your edit stashed (git stash, git stash pop):\n"
            "  python train.py config/train_recite.py --out_dir=out/rms --max_iters=400")


# ---- 7. GPT-2's weights ----

def rotary():
    """Rotary positions (Su et al. 2021) for learned ones: nothing is added, q and k turn.

    model.py: GPT.hidden, CausalSelfAttention.forward
    """
    import model as gpt
    model, ids = toy_gpt(n_layer=2), torch.arange(10)[None]
    with torch.no_grad():
        logits = model(ids)[0, :, :32]  # (T, V)
        if hasattr(model, "wpe"):
            model.wpe.weight.normal_()
            change = (model(ids)[0, :, :32] - logits).abs().max()
            expect(change < 1e-5, f"with other weights in wpe the logits change by up to {change:.2f}.",
                   "GPT.hidden still adds the learned positions to the embeddings.")
        layer = model.h[0].attn
        x = torch.randn(1, 10, 16)
        check_turned(layer, x)
        swapped = x[:, [1, 0, *range(2, 10)]]
        change = (layer(x)[0, -1] - layer(swapped)[0, -1]).abs().max()
        expect(change > 1e-5, "the first two of 10 tokens changed places, and the last one does not notice.",
               "a token at position p is turned by p times an angle: two positions must not have the same.")
        shifted = layer(x, None, 7)
        change = (layer(x) - shifted).abs().max()
        expect(change < 1e-3, "the same 10 tokens give other outputs from position 7 on than from 0 on, by up to "
               f"{change:.2f}: the scores do not depend on distances alone.",
               "q and k must both be turned, by the same angles, and before they meet; v must not.")
        cache = gpt.KVCache(model)
        parts = [(0, 1), (1, 6), (6, 7), (7, 10)]
        read = [model.head(model.hidden(ids[:, a:b], cache, a))[0, :, :32] for a, b in parts]
        others = [i + 1 for i, change in enumerate((torch.cat(read) - logits).abs().amax(1)) if change > 1e-3]
        expect(not others, "read in parts, with the cache, the logits differ from those of all at once from token "
               f"{min(others, default=0)} on.",
               "with a cache the newest tokens begin at position `start`, not at 0; what the cache holds was turned "
               "before it was put there.")
    return ("only distances count, and nothing but q and k is turned. GPT-2's own weights no longer fit, so train:\n"
            "  python train.py config/train_recite.py --out_dir=out/rotary --max_iters=400\n"
            '  python chat.py --checkpoint=out/rotary/best.pt --prompt="What is the plural of box?"')


def check_turned(layer, x):
    """Raise NotYet unless an attention layer's q and k keep their lengths, but not their directions, and v stays: as they
    are when they meet."""
    import model as gpt
    met, kernel, written_out = [], F.scaled_dot_product_attention, gpt.attention
    try:
        F.scaled_dot_product_attention = lambda q, k, v, *a, **o: met.append((q, k, v)) or kernel(q, k, v, *a, **o)
        gpt.attention = lambda q, k, v: met.append((q, k, v)) or written_out(q, k, v)
        layer(x)
    finally:
        F.scaled_dot_product_attention, gpt.attention = kernel, written_out
    if not met:  # a reader's own way of attending
        return
    were = [z.view(1, 10, 2, 8).transpose(1, 2) for z in layer.c_attn(x).split(16, dim=2)]  # (1, nh, T, hs) each
    for name, was, now in zip("qkv", were, met[0]):
        expect(now.shape == was.shape, f"{name} has the shape {tuple(now.shape)}, and had {tuple(was.shape)}.",
               "turning changes no shape: (B, nh, T, hs) stays (B, nh, T, hs).")
        change = (now.norm(dim=3) / was.norm(dim=3)).flatten()
        expect(name == "v" or (change - 1).abs().max() < 1e-3, f"{name} does not keep its lengths: they are "
               f"{change.min():.2f} to {change.max():.2f} times what they were.",
               "turning a pair (a, b) by an angle gives (a cos - b sin, a sin + b cos), which is as long as before.")
        moved = not torch.allclose(now[0, :, 1:], was[0, :, 1:], atol=1e-4)
        expect(moved or name == "v", f"{name} is as it was.",
               "turn q and k, both, where the comment in CausalSelfAttention.forward says so: the token at position p by "
               "p times an angle, and each pair of channels by an angle of its own.")
        expect(not moved or name != "v", "v is turned.",
               "the scores of q and k tell distances; v is what is passed on, and stays as it is.")


# ---- 8. GPT-2 learns to answer ----

def min_p():
    """min_p sampling (Nguyen et al. 2024): drop what is far less likely than the likeliest.

    model.py: sample; chat.py: Settings, SAMPLING, so that --min_p=0.1 works
    """
    import model as gpt
    expect("min_p" in inspect.signature(gpt.sample).parameters, "sample takes "
           f"{', '.join(list(inspect.signature(gpt.sample).parameters)[3:])}, but no min_p.",
           "give it one more argument, with a default that drops nothing, as top_k and top_p have.")
    p = torch.tensor([0.04, 0.5, 0.15, 0.3, 0.01])
    plain = drawn(p)
    expect(set(plain) == set(range(5)), f"without min_p only the ids {ids_of(plain)} of 0 to 4 are drawn.",
           "its default must drop nothing.")
    for least, kept, more in ((0.2, {1, 2, 3}, {}), (1.0, {1}, {}), (0.05, {0, 1, 2, 3}, {}), (0.2, {1, 3}, {"top_k": 2}),
                              (0.2, {1, 3}, {"top_p": 0.7}), (0.2, {1, 2, 3}, {"top_k": 4})):
        counts = drawn(p, min_p=least, **more)
        with_more = "".join(f", {name}={value}" for name, value in more.items())
        expect(set(counts) == kept, f"of ids with the probabilities {shown(p)}, min_p={least}{with_more} draws "
               f"the ids {ids_of(counts)}, and should draw {ids_of(kept)}: those of at least {least} * 0.5.",
               "compare probabilities, not logits, with min_p times the largest of them; behind top_k the ids are in "
               "another order, and probs goes along with them.")
    flat = drawn(torch.full((40,), 1 / 40), min_p=0.1)
    expect(len(flat) == 40, f"of 40 equally likely ids (0.025 each) min_p=0.1 draws {len(flat)} different ones.",
           "what counts is the share of the likeliest one's probability, not the probability itself.")
    expect(set(drawn(p, min_p=0.2, temperature=0)) == {1}, "at temperature 0 it no longer takes the likeliest id.",
           "leave what stands before the temperature as it is.")
    import chat
    expect("min_p" in chat.Settings.__dataclass_fields__, "sample is right, but chat.py has no setting min_p.",
           "one line in its Settings, beside top_p: a name, a type, a default and a comment, which --help shows.")
    expect("min_p" in chat.SAMPLING, "chat.py has the setting min_p, but does not hand it to sample.",
           "SAMPLING names the settings that it hands on.")
    return ("what is unlikely beside the best goes, however flat or steep the odds are. Hot, with and without:\n"
            '  python chat.py --temperature=1.5 --top_k=0 --prompt="Who are you?"\n'
            '  python chat.py --temperature=1.5 --top_k=0 --min_p=0.1 --prompt="Who are you?"')


def drawn(p, **sampling):
    """How often `sample` draws each id, of 400 times, from probabilities (V,)."""
    import model as gpt
    generator = torch.Generator().manual_seed(0)
    try:
        return Counter(gpt.sample(p.log(), [], generator, **sampling) for _ in range(400))
    except RuntimeError as error:
        if "multinomial" not in str(error):
            raise
        raise NotYet(f"of {len(p)} ids with probabilities up to {p.max():.3f} no id is left to draw, with "
                     f"{sampling or 'no min_p given'}.\nHint: the likeliest must always stay. Compare probabilities, not "
                     "logits, with min_p times the largest probability.") from error


def ids_of(counts):
    return " ".join(map(str, sorted(counts)))


# ---- all of them ----

EXERCISES = (digits, endless, cheat, window, rule, rms, rotary, min_p)


def result(number):
    """(whether exercise `number`, from 1, is right; what to tell)."""
    check = EXERCISES[number - 1]
    try:
        edited = " ".join(re.findall(r"[\w/]+\.(?:py|txt)", task_of(check)[1]))
        return True, f"{number} is right: {check()}\nThen take it back, or what follows differs: git checkout {edited}"
    except NotYet as error:
        return False, f"{number} is not right yet: {error}"
    except Exception as error:  # in what was edited, any is possible
        return False, f"{number} is not right yet: {place_of(error)}"


def task_of(check):
    """What an exercise asks for, and where: the two parts of its check's docstring."""
    return inspect.getdoc(check).split("\n\n")


def place_of(error):
    """An error as one line: where in the repository it came up, outside of this file, and what it says."""
    what = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    if isinstance(error, SyntaxError) and error.filename:
        file, line, what = error.filename, error.lineno, f"{type(error).__name__}: {error.msg}"
    else:
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        ours = [frame for frame in frames if frame[0].startswith(str(config.REPO)) and frame[0] != __file__
                and ".venv" not in frame[0]]
        if not ours:
            return what
        file, line = ours[-1]
    return f"{file.removeprefix(str(config.REPO)).strip('/').strip(chr(92))}, line {line}: {what}"


def wrapped(text):
    """A text whose lines are at most 100 columns; commands, which are indented, stay as they are."""
    return "\n".join(line if line.startswith(" ") else textwrap.fill(line, 100, break_on_hyphens=False)
                     for line in text.splitlines())


def listing():
    """Yield the lines that say what the exercises are, and which are right."""
    yield "Edit a file, then ask about it: python -m tests.exercises 1"
    for number, check in enumerate(EXERCISES, 1):
        task, where = task_of(check)
        is_right, _ = result(number)
        yield f"\n{number}  {'right  ' if is_right else 'not yet'}  {task}\n            {where}"
    yield "\ngit diff shows your edits, git checkout model.py takes them back. Stuck: tests/solutions.md"


def main(argv):
    """The list, or one exercise; the exit code is 1 where it is not right. Raises ValueError for a wrong number."""
    torch.set_num_threads(1)
    sys.stdout.reconfigure(errors="backslashreplace")
    if not argv:
        for line in listing():
            print(line, flush=True)
        return
    if len(argv) > 1 or argv[0] not in map(str, range(1, len(EXERCISES) + 1)):
        raise ValueError(f"{' '.join(argv)}: give the number of one exercise, 1 to {len(EXERCISES)}, or nothing for a list")
    is_right, text = result(int(argv[0]))
    print(wrapped(text))
    sys.exit(not is_right)


if __name__ == "__main__":
    config.run(main)
