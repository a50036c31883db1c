"""See inside a model: one page with everything that it did for one exchange.

    python chat.py --look=out/look.html --prompt="What is the plural of box?"

`look` runs the model once, with hooks, and `write_page` puts what they caught into look.html.
"""
import base64
import inspect
import json
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from config import UserError
from data.conversation import special_ids, supervised
from data.files import write_atomically
from data.tokenizer import token_pieces
from model import GPT, MLP, CausalSelfAttention, sample

KEPT = 256  # logits that the page has of each position, the largest: its top_k goes so far
STOPS = {"temperature": [n / 20 for n in range(41)],  # of its sliders
         "top_k": [*range(1, 11), 15, 20, 30, 40, 50, 75, 100, 150, 200, 0],
         "top_p": [n / 20 for n in range(1, 20)] + [0.99, 1]}
BOXES = (GPT.forward, GPT.hidden, CausalSelfAttention.forward, MLP.forward, GPT.head,
         sample)


def look(model, enc, ids, start=None, longest=256):
    """All that the page shows of a model, in eval mode, that reads ids, a list: a dict, of the T
    newest ids (at most `longest`) and of L blocks:

    ids, roles (T,): a role is "user", "assistant" or "special". texts: {id: text}.
    chosen: where the page opens, at the token from which the reply's second word came.
    next_ids (T, 10), logits (T, kept): the likeliest first, the largest logit taken off all.
    rest (T, temperatures): the sum of exp(logit / temperature) over those not kept.
    came, came_p, came_rank (T,): logit, probability and rank (from 1) of the token that came next.
    lens_ids, lens_p (L + 1, T, 3), lens_came (L + 1, T): see lens; before the blocks, after each.
    weights (L, 1 + nh, T, T): of attention, the mean over the heads, then each head's.

    start: where in ids the model's own words begin; None: after the last <|assistant|>, or at 0.
    What came after the last token means nothing. Raises ValueError where there is no token.
    """
    if not ids:
        raise UserError("there is no token to look from")
    special, pieces = special_ids(enc), token_pieces(enc, ids)
    shown, hidden = ids[-longest:], len(ids[:-longest])
    if start is None:
        start = len(ids) - ids[::-1].index(special[2]) if special[2] in ids else 0
    own = supervised(ids, enc)
    own[start:] = True
    roles = ["special" if i in special else "assistant" if is_own else "user"
             for i, is_own in zip(ids, own)]
    chosen = before_second_word(pieces, start)
    with torch.no_grad():
        stream, weights, scores = record(model, ids, longest)
        came = torch.tensor([*shown[1:], shown[-1]])  # (T,)
        levels = [lens(model, x[0, -longest:], came) for x in stream]
        page = next_tokens(levels[-1][0], came)
    _, lens_ids, lens_p, lens_came = [torch.stack(z) for z in zip(*levels)]
    used = sorted({*shown, *page["next_ids"].flatten().tolist(), *lens_ids.flatten().tolist()})
    return {**page, "ids": shown, "hidden": hidden, "roles": roles[hidden:], "lens_ids": lens_ids,
            "lens_p": lens_p, "lens_came": lens_came, "came_p": lens_came[-1],
            "weights": weights, "chosen": max(chosen - hidden, 0), "stops": STOPS,
            "texts": dict(zip(used, token_pieces(enc, used))), "habits": habits(scores),
            "config": vars(model.config), "parameters": model.num_params(),
            "lines": {f.__qualname__: inspect.getsourcelines(f)[1] for f in BOXES}}


def before_second_word(pieces, start):
    """The last place of a text's first word, where the text begins at `start`; where no second
    follows, its beginning."""
    for t in range(start, len(pieces) - 1):
        if len("".join(pieces[start:t + 2]).split()) > 1:
            return t
    return min(start, len(pieces) - 1)


def record(model, ids, longest):
    """What passes through a model that reads ids: the residual stream, (1, T, C) before the first
    block and after each; each block's attention between the newest tokens, the mean over the heads
    and then each head's, (L, 1 + nh, longest, longest); and each block's head_scores, over all.
    Raises ValueError for a block without attention that can be seen."""
    stream, shown, scores = [], [None] * len(model.h), [None] * len(model.h)

    class Attending(TorchFunctionMode):
        """Sees the weights of the block that is computing: a softmax of as many rows and columns as
        there are tokens, or what the fused kernel takes of values that are 1 at one token each."""

        def __torch_function__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            weights = out
            if function is F.scaled_dot_product_attention:
                q, k, v, *rest = args
                each = torch.eye(v.shape[2], dtype=v.dtype, device=v.device)  # (T, T)
                each = each.expand(*v.shape[:3], -1)
                weights = function(q, k, each, *rest, **(kwargs or {}))  # (1, nh, T, T)
            elif function not in (F.softmax, torch.softmax, torch.Tensor.softmax):
                return out
            if weights.dim() == 4 and weights.shape[2:] == (len(ids), len(ids)):
                weights, block = weights.float().cpu(), len(stream) - 1
                newest = weights[0, :, -longest:, -longest:]
                shown[block] = torch.cat([newest.mean(0, keepdim=True), newest])
                scores[block] = head_scores(weights, ids)
            return out

    hooks = [model.h[0].register_forward_pre_hook(lambda _, args: stream.append(args[0]))]
    for block in model.h:
        hooks.append(block.register_forward_hook(lambda _, args, out: stream.append(out)))
    try:
        with Attending():
            model.hidden(torch.tensor([ids], device=model.wte.weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    if None in scores:
        raise UserError(f"the attention of block {scores.index(None) + 1} cannot be seen: it is "
                         "neither F.scaled_dot_product_attention nor a softmax over all tokens")
    return stream, torch.stack(shown), scores


def lens(model, x, came):
    """The logit lens (nostalgebraist 2020), what the model would say if x (T, C) came from its last
    block: logits (T, V), the three likeliest ids, their probabilities (T, 3), and `came`'s (T,)."""
    logits = model.head(model.ln_f(x))[:, :model.config.vocab_size].float().cpu()  # (T, V)
    p = logits.softmax(-1)
    best = p.topk(3)
    return logits, best.indices, best.values, p.gather(1, came[:, None])[:, 0]


def next_tokens(logits, came):
    """What the page needs to apply the rules of `sample` to logits (T, V): see look."""
    logits = logits - logits.amax(1, keepdim=True)
    kept, order = logits.topk(min(KEPT, logits.shape[1]))
    others = logits.scatter(1, order, -torch.inf)
    came_logit = logits.gather(1, came[:, None])  # (T, 1)
    return {"logits": kept, "next_ids": order[:, :10], "came": came_logit[:, 0],
            "came_rank": 1 + (logits > came_logit).sum(1),
            "rest": torch.stack([(others / t).exp().sum(1) for t in STOPS["temperature"][1:]], 1)}


def head_scores(weights, ids):
    """Three habits of every head, from 0 to 1: weights (L, nh, T, T), T ids -> {name: (L, nh)}.

    previous token: the mean weight that a token gives to the one before it. first token: that it
    gives to the very first. same token earlier: that it gives to all earlier occurrences of itself,
    over the tokens that have any. All means are over the tokens after the first.
    """
    ids = torch.tensor(ids)
    same = (ids[:, None] == ids).tril(-1).float()  # (T, T)
    repeated = same.any(1)
    scores = {"previous token": weights.diagonal(-1, 2, 3).mean(-1),
              "first token": weights[..., 1:, 0].mean(-1)}
    if repeated.any():
        scores["same token earlier"] = (weights * same).sum(-1)[..., repeated].mean(-1)
    return scores if len(ids) > 1 else {}


def habits(layers):
    """Lines of text: which three heads have each habit most, by head_scores of each layer."""
    said = []
    for name in layers[0]:
        scores = torch.cat([layer[name] for layer in layers])  # (L, nh)
        heads = []
        for i in scores.flatten().argsort(descending=True)[:3].tolist():
            layer, head = divmod(i, scores.shape[1])
            heads.append(f"layer {layer + 1} head {head + 1}: {scores[layer, head]:.2f}")
        said.append(f"{name:<20}" + "   ".join(heads))
    return ["which heads look most where, by their mean weight:", *said] if said else []


def write_page(path, page):
    """Write what look returns as one HTML file, attention weights in 255ths. Raises OSError."""
    def pack(x):  # a tensor: its numbers' bytes, deflated, in base64
        x = (x.int() if x.dtype == torch.int64 else x).numpy()
        zipped = base64.b64encode(zlib.compress(x.tobytes())).decode()
        return {"type": x.dtype.name, "shape": x.shape, "zlib": zipped}
    weights = (page["weights"] * 255).round().to(torch.uint8)
    text = json.dumps({**page, "weights": weights}, default=pack).replace("<", "\\u003c")
    html = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
    write_atomically(path, lambda f: f.write(html.replace("DATA", text, 1).encode("utf-8")))
