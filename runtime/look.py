"""Look inside a model: one page with everything that it computed for one exchange.

    python chat.py --look=out/look.html --prompt="What is the plural of box?"

`look` runs the model once, with hooks, and `write_page` puts what they recorded into look.html.
"""
import base64
import json
import zlib
from pathlib import Path

import torch

from data.conversation import special_ids, supervised
from data.files import write_atomically
from data.tokenizer import token_pieces

KEPT = 256  # the page has this many of the largest logits of each position, enough for any top_k
STOPS = {"temperature": [n / 20 for n in range(41)],  # the values of its sliders
         "top_k": [*range(1, 11), 15, 20, 30, 40, 50, 75, 100, 150, 200, 0],
         "top_p": [n / 20 for n in range(1, 20)] + [0.99, 1]}


def look(model, enc, ids, start=None, longest=256):
    """Run a model in eval mode on ids, a list; return a dict of all that the page shows of the T
    newest tokens (at most `longest`) and of L blocks:

    ids, roles (T,): a role is "user", "assistant" or "special". texts: {id: text}.
    chosen: the position where the page opens, the first token of the reply.
    next_ids (T, 10), logits (T, kept): the most likely first; the largest logit is set to 0.
    rest (T, temperatures): the sum of exp(logit / temperature) over the logits not kept.
    target_logit, target_p, target_rank (T,): of the actual next token; ranks start at 1.
    lens_ids, lens_p (L + 1, T, 3), lens_target_p (L + 1, T): `lens` at the embeddings and blocks.
    weights (L, 1 + nh, T, T): attention weights, the mean over the heads, then each head's.

    start: where in ids the model's own text begins; None: after the last <|assistant|>, or at 0.
    """
    special, shown, hidden = special_ids(enc), ids[-longest:], max(len(ids) - longest, 0)
    if start is None:
        start = len(ids) - ids[::-1].index(special[2]) if special[2] in ids else 0
    own = supervised(ids, enc)
    own[start:] = True
    roles = ["special" if i in special else "assistant" if is_own else "user"
             for i, is_own in zip(ids, own)]
    with torch.no_grad():
        stream, weights = record(model, ids, longest)
        target = torch.tensor([*shown[1:], shown[-1]])  # (T,)
        levels = [lens(model, x[0, -longest:], target) for x in stream]
        page = next_tokens(levels[-1][0], target)
    _, lens_ids, lens_p, target_p = [torch.stack(z) for z in zip(*levels)]
    used = sorted({*shown, *page["next_ids"].flatten().tolist(), *lens_ids.flatten().tolist()})
    return {**page, "ids": shown, "hidden": hidden, "roles": roles[hidden:], "lens_ids": lens_ids,
            "lens_p": lens_p, "lens_target_p": target_p, "target_p": target_p[-1], "stops": STOPS,
            "chosen": max(min(start, len(ids) - 1) - hidden, 0), "weights": weights,
            "texts": dict(zip(used, token_pieces(enc, used))), "parameters": model.num_params(),
            "config": vars(model.config), "head_patterns": head_patterns(weights, shown)}


def record(model, ids, longest):
    """Run a model on ids; return its residual stream, (1, T, C) before the first block and after
    each, and the weights of `look`."""
    stream, weights = [], []

    def keep_weights(module, args, out):  # out: (1, nh, T, T)
        newest = out[0, :, -longest:, -longest:].float().cpu()
        weights.append(torch.cat([newest.mean(0, keepdim=True), newest]))

    hooks = [model.h[0].register_forward_pre_hook(lambda module, args: stream.append(args[0]))]
    for block in model.h:
        hooks.append(block.register_forward_hook(lambda module, args, out: stream.append(out)))
    layers = [module for module in model.h.modules() if hasattr(module, "attn_dropout")]
    fused = [layer.fused for layer in layers]
    try:
        for layer in layers:
            hooks.append(layer.attn_dropout.register_forward_hook(keep_weights))
            layer.fused = False  # the written-out form computes the weights
        model.hidden(torch.tensor([ids], device=model.wte.weight.device))
    finally:
        for layer, value in zip(layers, fused):
            layer.fused = value
        for hook in hooks:
            hook.remove()
    assert len(weights) == len(model.h), "each block needs an attn_dropout, called on its weights"
    return stream, torch.stack(weights)


def lens(model, x, target):
    """Apply the logit lens (nostalgebraist 2020): predict from x (T, C) as if it came from the last
    block. Returns logits (T, V), the three most likely ids and their probabilities (T, 3), and the
    probability of `target` (T,)."""
    logits = model.head(model.ln_f(x))[:, :model.config.vocab_size].float().cpu()  # (T, V)
    p = logits.softmax(-1)
    best = p.topk(3)
    return logits, best.indices, best.values, p.gather(1, target[:, None])[:, 0]


def next_tokens(logits, target):
    """Return what the page needs to apply `sample` to logits (T, V); see look."""
    logits = logits - logits.amax(1, keepdim=True)
    kept, order = logits.topk(min(KEPT, logits.shape[1]))
    others = logits.scatter(1, order, -torch.inf)
    target_logit = logits.gather(1, target[:, None])  # (T, 1)
    return {"logits": kept, "next_ids": order[:, :10], "target_logit": target_logit[:, 0],
            "target_rank": 1 + (logits > target_logit).sum(1),
            "rest": torch.stack([(others / t).exp().sum(1) for t in STOPS["temperature"][1:]], 1)}


def head_patterns(weights, ids):
    """Return lines of text that name the heads with the largest mean weights on the previous token,
    on the first, and on earlier occurrences of the same token, averaged over all ids but the first.
    weights: (L, 1 + nh, T, T)."""
    H, ids = weights.shape[1] - 1, torch.tensor(ids)
    weights = weights[:, 1:].flatten(0, 1)  # (L * nh, T, T)
    same = (ids[:, None] == ids).tril(-1)  # (T, T)
    repeated = same.any(1)
    scores = {"previous token": weights.diagonal(-1, 1, 2).mean(-1),  # (L * nh,)
              "first token": weights[:, 1:, 0].mean(-1)}
    if repeated.any():
        scores["same token earlier"] = (weights * same).sum(-1)[:, repeated].mean(-1)
    lines = ["heads with the largest mean attention to:"]
    for name, score in scores.items():
        heads = [f"layer {i // H + 1} head {i % H + 1}: {score[i]:.2f}"
                 for i in score.argsort(descending=True, stable=True)[:3].tolist()]
        lines.append(f"{name:<20}" + "   ".join(heads))
    return lines


def write_page(path, page):
    """Write what look returns as one HTML file, with 8-bit attention weights. Raises OSError."""
    page = {**page, "weights": (page["weights"] * 255).round().int()}
    arrays = {name: (x.double().round(decimals=6) if x.is_floating_point() else x).tolist()
              for name, x in page.items() if torch.is_tensor(x)}
    zipped = zlib.compress(json.dumps(arrays, separators=(",", ":")).encode())
    rest = {name: x for name, x in page.items() if name not in arrays}
    text = json.dumps({**rest, "zlib": base64.b64encode(zipped).decode()}).replace("<", "\\u003c")
    html = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
    write_atomically(path, lambda f: f.write(html.replace("DATA", text, 1).encode("utf-8")))
