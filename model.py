"""GPT-2's architecture: attention, MLP, blocks, the KV cache, sampling, and the Muon optimizer.

`train.py` trains it and `chat.py` talks to it. Run by itself, it turns a checkpoint into what other
tools open, a folder for transformers or a file for llama.cpp:

    python model.py --checkpoint=out/chat/best.pt --export=out/chat/hf    # or out/chat.gguf

Read it from the top, from leaf to root. A block is layer norm, attention, layer norm and an MLP; a
GPT is embeddings, a stack of blocks, and the embeddings once more as the output head. Shapes stand
behind the lines: B batch, T new tokens, S tokens so far (the new ones too), C = n_embd channels,
nh heads of hs = C / nh channels, V vocabulary.

Papers: Attention Is All You Need (Vaswani et al. 2017); Language Models are Unsupervised Multitask
Learners (Radford et al. 2019, "GPT-2").
"""
import json
import math
import os
import sys
import zipfile
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from data.download import download, hub
from data.files import read_safetensors, write_atomically
from data.tokenizer import GPT2_VOCAB_SIZE, count_ids


@dataclass
class GPTConfig:
    vocab_size: int = 50260  # token ids that exist: GPT-2's 50257 and the three role tokens
    block_size: int = 1024  # the longest context, in tokens
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in linear layers and layer norms, as GPT-2 has them

    @property
    def padded_vocab_size(self):
        """Rows of the embedding table: a multiple of 64 makes faster matrix products. The extra
        rows stand for no token, so the head gives them a logit of -inf and they are never
        sampled."""
        return (self.vocab_size + 63) // 64 * 64


def causal_mask(T, S, device):
    """(T, S) booleans, a triangle: of S tokens the T newest look, and the i-th of them, from 0, may
    look at tokens 0 .. S - T + i, never at a later one."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention(q, k, v):
    """Attention written out; the model calls a fused kernel that does the same. Each of T tokens
    takes a mean of S values, weighted by how well its query fits their keys. q: (B, nh, T, hs),
    k and v: (B, nh, S, hs) -> ((B, nh, T, hs), weights (B, nh, T, S))."""
    scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, nh, T, S)
    allowed = causal_mask(q.shape[2], k.shape[2], q.device)  # (T, S)
    # No word sees the words after it: exp(-inf) = 0.
    scores = scores.masked_fill(~allowed, -math.inf)
    weights = scores.softmax(dim=-1)  # each row adds up to 1
    return weights @ v, weights


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it, and takes a weighted mean of their
    values."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        # One product gives each token's query (what it looks for), key (what it offers) and value.
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x, layer_cache=None, start=0):
        """x: (B, T, C) -> (B, T, C). With a LayerCache, x holds only the newest tokens, from
        position `start` on."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)  # (B, T, C) each
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for z in (q, k, v))  # (B, nh, T, hs): rotary positions would turn q and k here
        if layer_cache is not None:
            k, v = layer_cache.append(k, v, start)  # (B, nh, S, hs)
        S = k.shape[2]
        # What `attention` computes, in one fused kernel that never stores the weights. For T = S it
        # makes the triangle itself; one new token may look at everything; only several new tokens
        # behind cached ones need a mask.
        is_causal = True if T == S else False  # a bool; torch.compile makes T == S a symbol
        mask = causal_mask(T, S, x.device) if 1 < T < S else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: widened to 4 C channels, a nonlinearity (GELU, Hendrycks & Gimpel 2016,
    in the form with tanh that GPT-2 has), and back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        x = self.c_fc(x)  # (B, T, 4 C)
        x = F.gelu(x, approximate="tanh")
        return self.dropout(self.c_proj(x))


def layer_norm(config):
    """Layer norm (Ba et al. 2016): a token's channels shifted and scaled to mean 0 and variance 1,
    then a learned scale and shift. The blocks and the GPT make theirs here."""
    return nn.LayerNorm(config.n_embd, bias=config.bias)


class Block(nn.Module):
    """Attention moves information between tokens, the MLP works on it; both read the residual
    stream through a layer norm and add to it what they found."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = layer_norm(config)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = layer_norm(config)
        self.mlp = MLP(config)

    def forward(self, x, layer_cache=None, start=0):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), layer_cache, start)
        x = x + self.mlp(self.ln_2(x))
        return x


class LayerCache:
    """One layer's keys and values of all tokens so far, so that a new token need not compute them
    again."""

    def __init__(self, config, device, dtype):
        shape = (1, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (1, nh, block_size, hs)
        self.v = torch.empty(shape, device=device, dtype=dtype)

    def append(self, k, v, start):
        """Put k and v, both (1, nh, T, hs), at `start`; return all up to there, (1, nh, S, hs)."""
        stop = start + k.shape[2]
        self.k[:, :, start:stop] = k
        self.v[:, :, start:stop] = v
        return self.k[:, :, :stop], self.v[:, :, :stop]


class KVCache:
    """The LayerCache of every layer, and the ids of the tokens that they hold."""

    def __init__(self, model):
        weight = model.wte.weight
        self.layers = [LayerCache(model.config, weight.device, weight.dtype) for _ in model.h]
        self.ids = []


class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a last layer norm, and the token
    embeddings once more as the output head (Radford et al. 2019). Raises ValueError for heads that
    do not divide n_embd."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} cannot be split into n_head={config.n_head} "
                             "equal heads: make n_embd a multiple of n_head")
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # what each token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = layer_norm(config)
        # One table reads tokens and writes them (Press & Wolf 2017): in GPT-2, 39 M weights fewer.
        self.lm_head = nn.utils.skip_init(
            nn.Linear, config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight  # the head's own were not even drawn
        self.init_weights()

    def init_weights(self):
        """GPT-2's first weights: normal(0, 0.02), biases 0, norms 1 (as PyTorch makes them)."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of these add up in the stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2 and name.endswith("weight"):
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None, start=0):
        """Token ids (B, T) -> what the last block knows of each, (B, T, C). With a KVCache, which
        holds the `start` tokens before, idx holds only those that come after."""
        T, block_size = idx.shape[1], self.config.block_size
        assert start + T <= block_size, f"{start + T} tokens, block_size {block_size}"
        x = self.wte(idx) + self.wpe.weight[start:start + T]  # (B, T, C) + (T, C)
        if cache is None and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # the residuals too: half the bytes
        x = self.drop(x)
        for i, block in enumerate(self.h):
            x = block(x, cache.layers[i] if cache else None, start)
        return self.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., padded V): how well each embedding fits; -inf for padding."""
        logits = self.lm_head(x)
        logits[..., self.config.vocab_size:] = -math.inf
        return logits

    def forward(self, idx, targets=None, where=None):
        """Logits, or the loss that training wants.

        idx: token ids (B, T). targets: None, or the ids that should come next, one for each
        position that the loss looks at. where: the flat indices (b * T + t) of those positions,
        None for all B * T. Returns the logits (B, T, padded V), or with targets the sum of their
        cross-entropies, a scalar.
        """
        x = self.hidden(idx)  # (B, T, C)
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)  # (B * T, C)
        if where is not None:
            x = x[where]  # (N, C): the head, the widest layer, skips positions without a target
        logits = self.head(x).float()  # (N, padded V)
        # A sum, not a mean: batches of chats have unequal numbers of targets, and only the caller
        # knows how many the whole step has. It divides by that.
        return F.cross_entropy(logits, targets.flatten(), reduction="sum")

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, *, stop_ids=(), seed=None, cache=None, **sampling):
        """Continue `ids` (a list, not empty): yields new ids one by one, ending before any of
        stop_ids.

        The same seed gives the same ids. `cache`: a KVCache to go on from; whatever of `ids` it
        already holds is not computed again. `sampling`: temperature, top_k and so on, see `sample`.
        """
        assert ids, "generate needs at least one id to go on from"
        ids, cache = list(ids), cache or KVCache(self)
        generator = seeded_generator(seed)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                window = ids[window_start(len(ids), self.config.block_size):]
                # What the cache knows of the window is not computed again, but the newest token
                # always is: its output is what we sample from.
                known = min(common_prefix(cache.ids, window), len(window) - 1)
                del cache.ids[known:]  # before keys are overwritten: Ctrl-C may come in between
                new = torch.tensor([window[known:]], device=self.wte.weight.device)  # (1, T)
                x = self.hidden(new, cache, start=known)  # (1, T, C)
                cache.ids = window
                logits = self.head(x[:, -1])[0, :self.config.vocab_size]  # (V,), without padding
                next_id = sample(logits.float().cpu(), window, generator, exempt=stop_ids,
                                 **sampling)
                if next_id in stop_ids:
                    return
                ids.append(next_id)
                yield next_id
        finally:
            self.train(was_training)

    def num_params(self):
        """How many numbers the model is made of, positions and the padding of the vocabulary among
        them."""
        return sum(p.numel() for p in self.parameters())

    def flops(self, targets, tokens, pairs):
        """Floating-point operations of a training step that reads `tokens` tokens, `targets` of
        which reach the output head; `pairs` is the sum of T * T over its rows. 6 for each weight
        that a token meets in a matrix product (2 forward, 4 backward), and 12 * C for each pair in
        each layer (Chowdhery et al. 2022, "PaLM", appendix B)."""
        matrices = sum(p.numel() for p in self.h.parameters() if p.dim() == 2)
        in_products = 6 * (matrices * tokens + self.wte.weight.numel() * targets)
        return in_products + 12 * self.config.n_layer * self.config.n_embd * pairs


# ---- sampling ----

def window_start(length, block_size):
    """Where the context of a text of `length` tokens starts: at 0, as long as it fits. Then the
    window slides, by half a block and not by a token: each slide changes the positions of all that
    it still holds, which must be computed anew. With a block_size of 8, texts of up to 8 tokens
    start at 0, of 9 to 12 at 4, of 13 to 16 at 8. (A chat drops whole turns before: see chat.py.)
    """
    if length <= block_size:
        return 0
    slide = max(block_size // 2, 1)
    return math.ceil((length - block_size) / slide) * slide


def common_prefix(a, b):
    """How many ids two lists have in common at their start."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(i for i in range(shorter) if a[i] != b[i])


def seeded_generator(seed):
    """A random generator of its own, so that talking does not disturb training. seed None: other
    numbers each time."""
    generator = torch.Generator("cpu")
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(logits, context, generator, *, temperature=1.0, top_k=0, top_p=1.0,
           repetition_penalty=1.0, exempt=()):
    """Choose the next id from logits (V,), as if by these rules, in this order.

    repetition_penalty, above 1: ids in `context` become less likely (Keskar et al. 2019), but not
    those that are `exempt`, or replies would not end. temperature: 0 takes the likeliest id, 1
    draws as the model learned. top_k: only among the so many likeliest; 0: all. top_p: only among
    the likeliest that make up this probability (nucleus sampling, Holtzman et al. 2020).
    """
    if repetition_penalty != 1:
        seen = list(set(context).difference(exempt))
        old = logits[seen]  # of either sign, it gets smaller
        logits[seen] = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
    if temperature < 1e-5:  # a division by less would overflow float32
        return int(logits.argmax())
    ids = torch.arange(len(logits))
    if top_k or top_p < 1:
        logits, ids = logits.topk(min(top_k or len(logits), len(logits)))  # the likeliest first
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        likelier = probs.cumsum(-1)[:-1]  # for each but the first, the sum of the likelier ones
        probs[1:][likelier >= top_p] = 0  # multinomial does not mind a sum below 1
    return int(ids[torch.multinomial(probs, 1, generator=generator)])


# ---- the optimizer: it moves every weight a little against its gradient (skip it at first) ----

# (a, b, c) of each round of newton_schulz, below. They suit what the rounds before leave (Amsel et
# al. 2025, "The Polar Express"; their coefficients, with the 1 % of safety that they recommend).
NEWTON_SCHULZ_ROUNDS = ((8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184),
                        (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853))


def newton_schulz(x, dtype=torch.float32):
    """Nearest semi-orthogonal matrices, roughly: (n, rows, cols), singular values of about 1.

    Each round turns every singular value v into a v + b v^3 + c v^5, by matrix products alone
    (Jordan et al. 2024, "Muon"). Four rounds bring each v above a thousandth of the norm to between
    0.4 and 1.6: rough, but a fifth round costs a quarter more and does not lower the loss.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller side first, so that x @ x.mT is small
    x = x.to(dtype)  # of all products: bfloat16 is exact enough, where it is fast
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_ROUNDS:
        xx = x @ x.mT
        by = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)  # b xx + c xx xx
        x = torch.baddbmm(x, by, x, beta=a)  # a x + (b xx + c xx xx) x
    return x.mT if tall else x


def wide_matrices(p):
    """The matrices that a parameter holds, as views with no more rows than columns: three of c_attn
    (query, key, value), one of others. c_fc is turned, to share a stack with the MLP's c_proj."""
    rows, cols = p.shape
    if rows == 3 * cols:  # c_attn
        return list(p.view(3, cols, cols))
    return [p if rows <= cols else p.mT]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for the matrices of the blocks (Jordan et al. 2024).
    A gradient is large in a few directions; made orthogonal, it moves all alike. Its size is that
    of AdamW's steps (Liu et al. 2025, "Muon is Scalable"), so rates and weight decay fit both."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        self.dtype = dtype  # of its matrix products
        by_shape = {}  # matrices of one shape are stacked and made orthogonal in one batch
        for p in params:
            by_shape.setdefault(wide_matrices(p)[0].shape, []).append(p)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One step from the gradients in p.grad."""
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            matrices = [m for p in params for m in wide_matrices(p)]  # n views, (rows, cols) each
            # A matrix that nothing uses, as in a model that is being changed, has no gradient.
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grads = torch.stack([m for grad in grads for m in wide_matrices(grad)])  # a copy
            state = self.state[params[0]]  # the stack's, kept under its first parameter
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            buffer = state["momentum_buffer"].lerp_(grads, 1 - momentum)
            ahead = grads.lerp_(buffer, momentum)  # Nesterov's look ahead
            update = newton_schulz(ahead, self.dtype).to(grads.dtype)
            scale = 0.2 * math.sqrt(grads.shape[2])  # root mean square: from 1 / sqrt(cols) to 0.2
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-lr * scale)


def configure_optimizers(model, s, dtype=torch.float32):
    """The optimizers of a run, a list: AdamW (Loshchilov & Hutter 2019) for all, or Muon, its
    products in `dtype`, for the blocks' matrices and AdamW for the rest. s: train.py's settings.
    Each step sets a group's "lr" to a share of its "peak_lr"."""
    learned = [p for p in model.parameters() if p.requires_grad]
    in_blocks = set(model.h.parameters())
    matrices = [p for p in learned if p.dim() == 2 and p in in_blocks]
    tables = [p for p in learned if p.dim() == 2 and p not in in_blocks]
    vectors = [p for p in learned if p.dim() != 2]  # norms and biases: no weight decay
    adamw_lr = s.learning_rate if s.optimizer == "adamw" else s.embedding_learning_rate
    decayed = matrices + tables if s.optimizer == "adamw" else tables
    groups = [{"params": decayed, "weight_decay": s.weight_decay},
              {"params": vectors, "weight_decay": 0.0}]
    optimizers = [torch.optim.AdamW(groups, lr=adamw_lr, betas=(s.beta1, s.beta2), fused=True)]
    if s.optimizer == "muon":
        optimizers.insert(0, Muon(matrices, s.learning_rate, s.momentum, s.weight_decay, dtype))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


# ==================================================================================================
# The idea ends here. Below: GPT-2's weights, checkpoints, faster answers, the device, exporting.
# ==================================================================================================

# ---- GPT-2's weights ----

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_URL = "{hub}/openai-community/{name}/resolve/main/model.safetensors"

# GPT-2's tensors have our names and shapes, but for these:
PREFIX = "transformer."  # stands before every name, or before none
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight",  # they are (in, out)
              "mlp.c_fc.weight", "mlp.c_proj.weight")
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias",  # the causal mask
               "lm_head.weight")  # wte.weight once more


def turn_matrix(name, tensor):
    """GPT-2's files hold the matrices of TRANSPOSED as (in, out), PyTorch's linear layers as (out,
    in): turned from one to the other, and back."""
    return tensor.t() if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor


def from_gpt2_names(named):
    """Yield (our name, tensor as we have it) from GPT-2's (name, tensor) pairs."""
    for name, tensor in named:
        name = name.removeprefix(PREFIX)
        if not name.endswith(NOT_WEIGHTS):
            yield name, turn_matrix(name, tensor)


def exported_weights(model):
    """The weights of a GPT for other tools, {our name: tensor}: without the vocabulary's padding,
    and a model without biases gets biases of 0, which change nothing."""
    weights = {}
    for name, tensor in stored_weights(model).items():
        weights[name] = tensor[:model.config.vocab_size] if name == "wte.weight" else tensor
        if not model.config.bias and name.startswith(("h.", "ln_f")):
            weights[name.removesuffix("weight") + "bias"] = torch.zeros(tensor.shape[0])
    return weights


def to_gpt2_names(model):
    """exported_weights as GPT-2's files have them: the way back from from_gpt2_names."""
    return {PREFIX + name: turn_matrix(name, tensor)
            for name, tensor in exported_weights(model).items()}


def load_gpt2(name_or_path, vocab_size=None, block_size=None, dropout=0.0):
    """GPT-2 with its learned weights, as a GPT.

    name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, see fetch_gpt2), or a
    local folder (model.safetensors or pytorch_model.bin, and config.json) or .safetensors file of
    that shape. vocab_size: how many ids it is to know; more than the file has adds rows at the mean
    of the learned ones plus a little noise (Hewitt 2021). None: GPT-2's 50257 and the three role
    tokens, or what another file has. block_size: a shorter context, the learned positions are
    cropped. Raises ValueError or OSError, saying what does not fit.
    """
    path = fetch_gpt2(name_or_path) if name_or_path in GPT2_NAMES else Path(name_or_path)
    weights, vocab_size = read_gpt2_weights(path, vocab_size)
    longest, n_embd = weights["wpe.weight"].shape[0], weights["wte.weight"].shape[1]
    n_head = read_n_head(path) or max(n_embd // 64, 1)
    if n_head < 1 or n_embd % n_head:
        raise ValueError(f"{path}: its {n_embd} channels cannot be split into {n_head} equal "
                         "heads; check n_head in the config.json beside it")
    config = GPTConfig(vocab_size=vocab_size, block_size=longest, n_layer=count_layers(weights),
                       n_head=n_head, n_embd=n_embd, dropout=dropout)
    model = empty_model(config)
    load_weights(model, weights, path)
    crop_block_size(model, block_size or longest)
    return model


def crop_block_size(model, block_size):
    """Keep only the first block_size learned positions. Raises ValueError for more than there
    are."""
    if block_size > model.config.block_size:
        raise ValueError(f"block_size={block_size}: the model has learned only "
                         f"{model.config.block_size} positions; use that or less")
    if block_size < model.config.block_size and hasattr(model, "wpe"):  # not with rotary ones
        learned = model.wpe.weight
        positions = learned.detach()[:block_size].clone()
        model.wpe = nn.Embedding.from_pretrained(positions, freeze=not learned.requires_grad)
    model.config.block_size = block_size


def fetch_gpt2(name):
    """The local model.safetensors of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded at first
    use.

    From the hub's openai-community repositories, or the mirror that the variable HF_ENDPOINT names;
    into GPT2_CACHE_DIR, or ~/.cache/gpt2. Raises OSError.
    """
    folder = Path(os.environ.get("GPT2_CACHE_DIR") or "~/.cache/gpt2").expanduser() / name
    path = folder / "model.safetensors"
    if path.exists():  # from whatever mirror
        return path
    print(f"downloading {name} into {folder}", file=sys.stderr)
    try:
        return download(GPT2_URL.format(hub=hub(), name=name), path)
    except OSError as error:
        advice = "HF_ENDPOINT names a mirror, --init_from=FILE.safetensors a file"
        raise OSError(f"{error} ({advice})") from error


def read_gpt2_weights(path, vocab_size):
    """A file or folder with GPT-2's weights as ({our name: tensor}, vocab_size), in float32, wte
    grown to vocab_size (see load_gpt2). Raises ValueError or FileNotFoundError."""
    files = [path] if path.is_file() else [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no model.safetensors or pytorch_model.bin there; use a "
                                f"folder that has one, or one of {', '.join(GPT2_NAMES)}")
    named = read_safetensors(file) if file.suffix == ".safetensors" else read_pytorch_bin(file)
    weights = {}
    for name, tensor in from_gpt2_names(named):
        if name == "wte.weight" and tensor.dim() == 2 and tensor.numel():
            # It comes first: little else is in memory.
            rows = tensor.shape[0]
            vocab_size = vocab_size or (GPTConfig.vocab_size if rows == GPT2_VOCAB_SIZE else rows)
            if vocab_size < rows:
                raise ValueError(f"vocab_size={vocab_size}: {path} has {rows} ids; use that or "
                                 "more")
            padded = GPTConfig(vocab_size=vocab_size).padded_vocab_size
            tensor = grow_rows(tensor, vocab_size, padded)
        weights[name] = tensor.float().contiguous()
        if not weights[name].sum().isfinite():
            raise ValueError(f"{file}: {name} holds numbers that are not finite; fetch it again")
        del tensor
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or weights[name].dim() != 2 or not weights[name].numel():
            raise ValueError(f"{file}: holds no {name} table, so these are not GPT-2's weights")
    return weights, vocab_size


def read_pytorch_bin(file):
    """The (name, tensor) pairs of a pytorch_model.bin. Raises ValueError."""
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
        return [(str(name), tensor.float()) for name, tensor in loaded.items()]
    except Exception as error:  # torch has many for a stranger's bytes
        raise ValueError(f"{file}: not a file of weights, or cut short "
                         f"({type(error).__name__})") from error


def grow_rows(table, count, padded):
    """An embedding table with rows for ids that are new: (rows, C) -> (padded, C). Up to `count`,
    the mean of the learned rows plus noise, so that a new id is at first an average one; the
    padding behind is 0."""
    rows = table.shape[0]
    grown = torch.zeros(padded, table.shape[1])
    grown[:rows] = table
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count - rows, table.shape[1], generator=generator)
    grown[rows:count] = table.mean(0) + 0.01 * table.std() * drawn
    return grown


def read_n_head(path):
    """The number of heads that the config.json beside the weights states, or None: it shows in no
    shape."""
    try:
        file = (path if path.is_dir() else path.parent) / "config.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["n_head"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def count_layers(weights):
    """How many blocks' weights there are among {name: tensor}."""
    return len({name.split(".")[1] for name in weights if name.startswith("h.")})


def check_names_and_shapes(weights, expected, source):
    """Raise ValueError for the first of the weights that is missing, unknown or of another shape
    or type."""
    for name in [*sorted(weights.keys() - expected.keys()), *expected]:  # the unknown ones first
        if name not in weights or name not in expected:
            problem = "is missing" if name in expected else "is none of this model's"
            raise ValueError(f"{source}: the tensor {name} {problem}")
        found, wanted = tuple(weights[name].shape), tuple(expected[name].shape)
        if found != wanted:
            raise ValueError(f"{source}: {name} has the shape {found}, which does not fit; "
                             f"expected {wanted}")
        if (dtype := weights[name].dtype) != expected[name].dtype:
            raise ValueError(f"{source}: {name} is of type {dtype}, expected "
                             f"{expected[name].dtype}")


# ---- checkpoints ----

class NoInit(TorchFunctionMode):
    """Within it, new modules draw no random numbers: loaded weights will replace them anyway."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def empty_model(config):
    """A GPT whose weights were not drawn, so that they take no memory until load_weights puts
    others in their place. (On the meta device buffers of a reader's would be lost.)"""
    with NoInit():
        return GPT(config)


def shared(model):
    """{name: the earlier name of the same parameter}: in GPT-2 lm_head.weight is wte.weight."""
    first, later = {}, {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if first.setdefault(p, name) != name:
            later[name] = first[p]
    return later


def stored_weights(model):
    """{name: tensor} as checkpoints hold it: all but lm_head's, where they are wte's."""
    weights = dict(model.state_dict())
    if "lm_head.weight" in shared(model):
        del weights["lm_head.weight"]
    return weights


def load_weights(model, weights, source="the checkpoint"):
    """Give a model its weights, as stored_weights has them. Raises ValueError, with their source,
    for what does not fit."""
    check_names_and_shapes(weights, stored_weights(model), source)
    twice = shared(model)  # assign makes two parameters of what was one
    weights = {**weights, **{name: weights[earlier] for name, earlier in twice.items()}}
    model.load_state_dict(weights, assign=True)
    for name, earlier in twice.items():
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, model.get_parameter(earlier))


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; see write_atomically."""
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, hint=""):
    """The dict that save_checkpoint wrote, its tensors mapped from the file, so that they take no
    memory of their own (but on Windows, where a file that is mapped could not be replaced).

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint, is cut short or has
    changed since it was written: its checksums are verified, which takes 0.15 s for GPT-2's 124M.
    `hint` ends the first message, and should say how to make one.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder; name the best.pt in it" if path.is_dir() else "no such checkpoint"
        raise FileNotFoundError(f"{path}: {what}. {hint}".strip())
    try:
        with zipfile.ZipFile(path) as members:
            if changed := members.testzip():
                raise ValueError(f"the checksum of {changed} is wrong")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True,
                                mmap=sys.platform != "win32")
        check_checkpoint(checkpoint)
    except PermissionError:
        raise
    except Exception as error:  # whatever torch says of them, the user's next step is the same
        why = error if type(error) is ValueError else type(error).__name__
        raise ValueError(f"{path}: not a checkpoint of this project, or damaged ({why}); "
                         "make a new one or name another") from error
    return checkpoint


def check_checkpoint(checkpoint):
    """Raise ValueError for what cannot be right in a checkpoint, as far as chat.py needs it."""
    for name, kind in (("config", dict), ("model", dict), ("step", int), ("max_iters", int)):
        if type(checkpoint.get(name)) is not kind:
            raise ValueError(f"its {name} is missing or broken")
    for name in checkpoint["config"].keys() - {field.name for field in fields(GPTConfig)}:
        raise ValueError(f"its config has an unknown {name!r}, of another model.py")
    config, weights = GPTConfig(**checkpoint["config"]), checkpoint["model"]
    for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
        value = getattr(config, name)
        if type(value) is not int or value < 1:
            raise ValueError(f"{name}={value!r} in its config")
    if (ids := count_ids(checkpoint["tokenizer"])) != config.vocab_size:
        raise ValueError(f"its tokenizer has {ids} ids, its model {config.vocab_size}")
    kind, turns = checkpoint["kind"], checkpoint.get("turns", 1)
    if kind not in ("chat", "text") or (kind == "chat" and turns < 1):
        raise ValueError(f"kind {kind!r} of {turns} turns")
    if any(type(logit) is not float for logit in checkpoint.get("trial", ())):
        raise ValueError("its trial is broken")
    for name, tensor in weights.items():
        is_other_float = tensor.is_floating_point() and tensor.dtype != torch.float32
        if is_other_float or tensor.layout != torch.strided:
            raise ValueError(f"{name} is of type {tensor.dtype}")
        if not tensor.sum().isfinite():  # in a tenth of the time that tensor.isfinite() takes
            raise ValueError(f"{name} holds numbers that are not finite")
    # Before a model of an impossible size is made; load_weights compares the rest.
    shapes = {"wte.weight": (config.padded_vocab_size, config.n_embd),
              "wpe.weight": (config.block_size, config.n_embd)}
    if (count_layers(weights) != config.n_layer or
            any(name in weights and weights[name].shape != shapes[name] for name in shapes)):
        raise ValueError("its weights do not fit its config")


def model_checkpoint(model, tokenizer_spec, kind, **extra):
    """What chat needs of a model: its config, weights, tokenizer and kind, "chat" or "text";
    `extra` says how it was made."""
    return {"config": asdict(model.config), "model": stored_weights(model),
            "tokenizer": tokenizer_spec, "kind": kind, "trial": trial(model), **extra}


def trained_turns(checkpoint):
    """How many questions the longest chat had that a checkpoint's model learned from; 0: it learned
    plain text."""
    return checkpoint.get("turns", 1) if checkpoint["kind"] == "chat" else 0


@torch.no_grad()
def trial(model):
    """What a model makes of a made-up text: its last logits of at most 64 ids, a list. Whoever
    loads the weights into a model.py that was edited since gets others."""
    T, V = min(16, model.config.block_size), model.config.vocab_size
    was_training = model.training
    model.eval()
    ids = torch.arange(T, device=next(model.parameters()).device)[None] % V  # (1, T)
    logits = model(ids)[0, -1, :min(V, 64)]
    model.train(was_training)
    return logits.float().tolist()


@torch.no_grad()
def cache_agrees(model):
    """Whether a model reads a text in parts, with the cache, as it does at once. Who changes how
    tokens see each other, for instance the mask where T = S alone, may forget the one or the
    other, and chats would not hear what was trained."""
    T = min(256, model.config.block_size)
    device, was_training, cache = model.wte.weight.device, model.training, KVCache(model)
    ids = torch.arange(T, device=device)[None] % model.config.vocab_size  # (1, T)
    model.eval()
    parts = [(0, T // 2), (T // 2, T - 1), (T - 1, T)]
    read = [model.hidden(ids[:, a:b], cache, a) for a, b in parts if a < b]
    whole, read = model.hidden(ids), torch.cat(read, 1)  # (1, T, C) both
    model.train(was_training)
    exactness = 1e-4 if device.type == "cpu" else 1e-2  # a GPU's products are shorter
    return bool((whole - read).abs().max() <= exactness * whole.abs().max())


def model_from_checkpoint(checkpoint, dropout=0.0, source="the checkpoint"):
    """The GPT in a checkpoint, with no random initialisation on the way. Raises ValueError, with
    its source, where the weights do not fit the config or the model as it is written above."""
    model = empty_model(GPTConfig(**{**checkpoint["config"], "dropout": dropout}))
    try:
        load_weights(model, checkpoint["model"], source)
    except ValueError as error:
        raise ValueError(f"{error}. It was made by another model.py than this one: edit it to be "
                         "that again, or train again") from error
    if then := checkpoint.get("trial"):
        now = trial(model)
        furthest = max(map(abs, then))
        if any(abs(a - b) > 0.02 * furthest for a, b in zip(now, then)):
            print(f"warning: {source} was trained with another model.py than this one, which "
                  "computes something else with its weights", file=sys.stderr)
    return model


# ---- a model that only answers: faster ways take the place of its own ----

def through_numpy(of_one, x):
    """A layer's of_one, which is numpy's, for a tensor of one token: (..., in) -> (..., out)."""
    return torch.from_numpy(of_one(x.flatten().numpy())).view(*x.shape[:-1], -1)


class FastLinear(nn.Linear):
    """nn.Linear on a CPU, without gradients. Many tokens go through oneDNN, a tenth faster than
    PyTorch's BLAS; a single one through numpy's, which reads the weights with all cores, where
    PyTorch's has one."""

    def forward(self, x):  # (..., in) -> (..., out)
        if x.numel() == self.in_features:
            return through_numpy(self.of_one, x)
        if not torch.backends.mkldnn.is_available():
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def of_one(self, x):  # numpy's, (in,) -> (out,)
        y = self.weight_array @ x
        return y if self.bias_array is None else y + self.bias_array


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits. For a single token nearly all the time goes into
    reading weights, and these are a quarter of the bytes.

    A product with one token is a sum of the matrix's columns, each times a channel of the token:
    what PyTorch's embedding bags compute, and they have a fast kernel for tables of bytes. So the
    weights are kept as such a table. A row has those of one input channel for `width` outputs, at
    most 384, as many sums as a core keeps at hand, and behind them their own scale and smallest
    value. More tokens are multiplied in float32 (Dettmers et al. 2022, "LLM.int8()", shows what
    rounding their channels too would cost).
    """

    def __init__(self, weight, bias):
        super().__init__()
        n_out, self.in_features = weight.shape
        most = min(384, max(n_out // torch.get_num_threads(), 1))  # each thread has a bag or more
        self.width = max(width for width in range(1, most + 1) if n_out % width == 0)
        self.bags = n_out // self.width
        rows = weight.view(self.bags, self.width, -1).mT.reshape(-1, self.width)  # (bags * in, w)
        table = torch.ops.quantized.embedding_bag_byte_prepack(rows)  # (bags * in, w + 8) bytes
        self.table, self.bias = nn.Buffer(table), bias
        self.bias_array = None if bias is None else bias.detach().numpy()
        self.indices = torch.arange(len(table), dtype=torch.int32)
        self.starts = self.indices[::self.in_features].contiguous()  # of each bag

    def forward(self, x):  # (..., in) -> (..., out)
        if x.numel() == self.in_features:
            return through_numpy(self.of_one, x)
        weight = torch.ops.quantized.embedding_bag_byte_unpack(self.table)
        weight = weight.view(self.bags, self.in_features, self.width)
        y = x.reshape(-1, self.in_features) @ weight  # (bags, tokens, width)
        y = y.transpose(0, 1).reshape(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias

    def of_one(self, x):  # numpy's, (in,) -> (out,)
        x = torch.from_numpy(np.tile(x, self.bags))
        y = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, self.indices, self.starts, per_sample_weights=x).numpy().reshape(-1)
        return y if self.bias_array is None else y + self.bias_array


class FastGPT(GPT):
    """A GPT that only answers, on a CPU. What it does for each token that it writes stands here
    once more, in numpy, whose calls cost less than PyTorch's for so few numbers: the blocks above
    for T = 1, without dropout, on the same cache."""

    def hidden(self, idx, cache=None, start=0):
        """As GPT.hidden."""
        if cache is None or idx.numel() > 1:
            return super().hidden(idx, cache, start)
        n_head, S = self.config.n_head, start + 1
        x = self.wte_array[int(idx)] + self.wpe_array[start]  # (C,)
        for (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), layer in zip(self.steps, cache.layers):
            q, k, v = c_attn.of_one(norm_of_one(x, ln_1)).reshape(3, n_head, -1)  # (nh, hs) each
            keys, values = layer.k[0].numpy(), layer.v[0].numpy()  # (nh, block_size, hs)
            keys[:, start], values[:, start] = k, v
            scores = keys[:, :S] @ (q / math.sqrt(q.shape[1]))[:, :, None]  # (nh, S, 1)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights = (weights / weights.sum(1, keepdims=True)).swapaxes(1, 2)  # (nh, 1, S)
            x = x + attn_proj.of_one((weights @ values[:, :S]).reshape(-1))
            x = x + mlp_proj.of_one(gelu_of_one(c_fc.of_one(norm_of_one(x, ln_2))))
        return torch.from_numpy(norm_of_one(x, self.ln_f))[None, None]  # (1, 1, C)

    def num_params(self):
        """As before its weights became tables."""
        return self.size


def norm_of_one(x, norm):
    """layer_norm for one token, in numpy: (C,) -> (C,)."""
    x = x - np.add.reduce(x) / len(x)
    x = x * (norm.weight_array / math.sqrt(x @ x / len(x) + norm.eps))
    return x if norm.bias_array is None else x + norm.bias_array


def gelu_of_one(x):
    """GELU in the form with tanh, in numpy."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))))


def make_fast(model, int8=False):
    """Make a GPT that only answers faster on a CPU, in place; elsewhere, and in bfloat16, it
    stays. int8: with weights of 8 bits in its blocks and its head. Whoever changes the model above
    need not change FastGPT: where it would compute something else, it is not used."""
    if not model.wte.weight.is_cpu or model.wte.weight.dtype != torch.float32:
        return
    model.size = model.num_params()
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            is_linear = type(layer) is nn.Linear  # a subclass may compute something else
            if is_linear and int8:
                setattr(parent, name, Int8Linear(layer.weight, layer.bias))
            elif is_linear or type(layer) is nn.LayerNorm:
                layer.weight_array = layer.weight.numpy()
                layer.bias_array = None if layer.bias is None else layer.bias.numpy()
            if is_linear and not int8:
                layer.__class__ = FastLinear
    try:
        model.wte_array, model.wpe_array = model.wte.weight.numpy(), model.wpe.weight.numpy()
        model.steps = [(block.ln_1, block.attn.c_attn, block.attn.c_proj,
                        block.ln_2, block.mlp.c_fc, block.mlp.c_proj) for block in model.h]
        is_same = is_same_in_numpy(model)
    except Exception:  # a model that was changed need not have these layers, or their shapes
        is_same = False
    if is_same:
        model.__class__ = FastGPT


@torch.no_grad()
def is_same_in_numpy(model):
    """Whether FastGPT computes what the model does, tried with the last token of a full context,
    since a window may be long; the keys and values before it are drawn at random."""
    cache, start = KVCache(model), model.config.block_size - 1
    drawn = torch.randn(cache.layers[0].k[:, :, :start].shape, generator=seeded_generator(0))
    for layer in cache.layers:
        layer.k[:, :, :start], layer.v[:, :, :start] = drawn, drawn
    one = torch.zeros(1, 1, dtype=torch.long)
    with np.errstate(all="ignore"):  # where weights overflow chat.py says so
        own, fast = model.hidden(one, cache, start), FastGPT.hidden(model, one, cache, start)
    return bool((fast - own).abs().max() <= 1e-3 * own.abs().max())


@torch.no_grad()
def is_gpt2(model):
    """Whether a model, on a CPU, computes what GPT-2 does: its blocks, and the embeddings once more
    as the head. It is made fast."""
    make_fast(model)
    V, one = model.config.vocab_size, torch.zeros(1, 1, dtype=torch.long)
    x = model.hidden(one, KVCache(model))  # (1, 1, C)
    own, wanted = model.head(x)[..., :V], x @ model.wte.weight[:V].T
    is_same = (own - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    is_tied = shared(model) == {"lm_head.weight": "wte.weight"}
    return isinstance(model, FastGPT) and is_tied and bool(is_same)


# ---- the device ----

def pick_device(device="auto", dtype="auto"):
    """Where and in what precision to compute: (torch.device, torch.dtype, why), for "auto" or a
    name. A Mac's GPU, mps, is used by name only: PyTorch computes some things wrong on it.

    Raises ValueError for a device this machine does not have, or a dtype of another name.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    has_mps = torch.backends.mps.is_available()
    try:
        picked = torch.device(best if device == "auto" else device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device: use auto, cpu, cuda, cuda:1 or "
                         "mps") from None
    missing = picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count()
    if picked.type not in ("cpu", best, "mps" if has_mps else "cpu") or missing:
        raise ValueError(f"device={device!r} is not available on this machine: use auto or {best}")
    fast, why_dtype = "float32", "fast here"
    if picked.type == "cuda":
        # Emulated, as on a T4 or V100, bfloat16 is slower than float32, and does not compile.
        if torch.cuda.is_bf16_supported(including_emulation=False):
            fast = "bfloat16"
        elif dtype == "bfloat16":
            raise ValueError(f"dtype=bfloat16: {picked} has none of its own; use float32")
        else:
            why_dtype = "this GPU has no bfloat16"
    name = fast if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use auto, float32 or bfloat16 (chat.py: or int8)")
    why_device = "the only one here" if best == "cpu" else "found"
    why_device = "there is mps too, by --device=mps" if has_mps else why_device
    why_device = why_device if device == "auto" else "as set"
    why_dtype = why_dtype if dtype == "auto" else "as set"
    return picked, getattr(torch, name), f"{picked} ({why_device}), {name} ({why_dtype})"


# ---- by itself: a checkpoint for other tools ----

@dataclass
class ExportSettings:
    checkpoint: Path = Path("out/chat/best.pt")  # what to export
    export: Path = Path("out/chat/hf")  # a .gguf file for llama.cpp, or a folder for transformers
    dtype: str = "float32"  # of a .gguf file's matrices: float32, float16 or q8_0 (8.5 bits)


def main(argv):
    """Export a checkpoint for other tools. Raises ValueError or OSError."""
    import config  # only the scripts need it
    from data.export import write_hf_folder
    s = config.load(ExportSettings, argv, __doc__)
    is_gguf = s.export.suffix.lower() == ".gguf"
    if s.dtype != "float32" and not is_gguf:
        raise ValueError(f"dtype={s.dtype}: a folder for transformers holds float32; "
                         "use --export=FILE.gguf")
    hint = "Train one first, or name it with --checkpoint=FILE."
    checkpoint = load_checkpoint(s.checkpoint, hint)
    model = model_from_checkpoint(checkpoint, source=s.checkpoint)
    if not is_gpt2(model):
        raise ValueError(f"{s.checkpoint}: model.py was changed, and computes something else than "
                         "GPT-2, which is all that other tools would do with its weights")
    if is_gguf:
        return export_gguf(s, model, checkpoint)
    write_hf_folder(s.export, model.config, to_gpt2_names(model), checkpoint["tokenizer"])
    print(f"{s.checkpoint} -> {s.export}: {', '.join(sorted(p.name for p in s.export.iterdir()))}")


def export_gguf(s, model, checkpoint):
    """Write a GGUF file and beside it an Ollama Modelfile. Raises ValueError or OSError."""
    from data.export import ids_may_differ, write_gguf, write_modelfile
    tokenizer, turns = checkpoint["tokenizer"], trained_turns(checkpoint)
    modelfile = s.export.with_suffix(".Modelfile")
    write_gguf(s.export, model.config, exported_weights(model), tokenizer, s.dtype, turns)
    write_modelfile(modelfile, s.export, model.config, turns)
    print(f"{s.checkpoint} -> {s.export}: {s.export.stat().st_size:,} bytes, and {modelfile}")
    if texts := ids_may_differ(tokenizer):
        print(f"llama.cpp may cut into other tokens than chat.py: {texts}")


if __name__ == "__main__":
    import config
    config.run(main)
