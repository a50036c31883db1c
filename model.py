"""GPT-2's architecture, and all that belongs to it: attention, the KV cache, sampling, the optimizers,
GPT-2's weights and checkpoints. `train.py` trains it and `chat.py` talks to it; run by itself, it turns a
checkpoint into a folder that other tools open:

    python model.py --checkpoint=out/chat/best.pt --export=out/chat/hf

Read it from top to bottom: a block is layer norm, attention, layer norm and an MLP; a GPT is embeddings,
a stack of blocks, and the embeddings once more as the output head.

Papers: Attention Is All You Need (Vaswani et al. 2017); Language Models are Unsupervised Multitask Learners
(Radford et al. 2019, "GPT-2").

In the shape comments: B batch, T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V
vocabulary.
"""
import json
import math
import os
import struct
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from data.download import download


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
        """Rows of the embedding table: a multiple of 64 makes faster matrix products. The extra rows stand
        for no token, so the head gives them a logit of -inf and they are never sampled."""
        return (self.vocab_size + 63) // 64 * 64


def linear(x, weight, bias=None):
    """x @ weight.T + bias, as F.linear: (..., in), (out, in), (out,) -> (..., out). Skip the rest on a first
    reading: for inference on a CPU oneDNN computes it, which reads the weights with all cores even for a
    single token (BLAS with one), and is a tenth faster for many."""
    if x.is_cpu and x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and \
            not torch.is_grad_enabled():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, computed by `linear` above."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def causal_mask(T, S, device):
    """(T, S) booleans, a triangle: the i-th of the T newest of S tokens may look at tokens 0 .. S - T + i,
    never at a later one."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)


def attention(q, k, v):
    """Attention written out: each of T tokens takes a mean of S values, weighted by how well its query fits
    their keys. q: (B, nh, T, hs), k and v: (B, nh, S, hs) -> ((B, nh, T, hs), weights (B, nh, T, S))."""
    scores = q @ k.mT / math.sqrt(q.shape[3])  # (B, nh, T, S)
    allowed = causal_mask(q.shape[2], k.shape[2], q.device)  # (T, S)
    scores = scores.masked_fill(~allowed, -math.inf)  # no word sees the words after it: exp(-inf) = 0
    weights = scores.softmax(dim=-1)  # each row adds up to 1
    return weights @ v, weights


class CausalSelfAttention(nn.Module):
    """Every token looks at itself and the tokens before it, and takes a weighted mean of their values."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.keep_weights, self.weights = False, None  # see GPT.attention_weights

    def forward(self, x, layer_cache=None):
        """x: (B, T, C) -> (B, T, C). With a LayerCache (below), x holds only the newest T tokens."""
        B, T, C = x.shape
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
                   for z in self.c_attn(x).split(C, dim=2))
        if layer_cache is not None:
            k, v = layer_cache.append(k, v)  # (B, nh, S, hs): all S tokens so far, the newest T among them
        S = k.shape[2]
        if self.keep_weights:
            y, self.weights = attention(q, k, v)
        else:  # the same in one fused kernel, which never stores the weights
            mask = None if T in (1, S) else causal_mask(T, S, x.device)  # is_causal stands for a square one
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=T == S and T > 1,
                                               dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)  # the heads side by side again
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Each token by itself: widened to 4 C channels, a nonlinearity (GELU, Hendrycks & Gimpel 2016, in the
    form with tanh that GPT-2 has), and back to C."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x):  # (B, T, C) -> (B, T, C)
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


class Block(nn.Module):
    """Attention moves information between tokens, the MLP works on it; both add to the residual stream.

    Each reads it through a layer norm (Ba et al. 2016): a token's channels shifted and scaled to mean 0 and
    variance 1, then a learned scale and shift.
    """

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, layer_cache=None):  # (B, T, C) -> (B, T, C)
        x = x + self.attn(self.ln_1(x), layer_cache)
        return x + self.mlp(self.ln_2(x))


class LayerCache:
    """One layer's keys and values of all tokens so far, so that a new token need not compute them again."""

    def __init__(self, config, batch_size, device, dtype):
        shape = (batch_size, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.k = torch.empty(shape, device=device, dtype=dtype)  # (B, nh, block_size, hs), full up to length
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, k, v):
        """Add k and v, both (B, nh, T, hs); return all so far, (B, nh, length, hs)."""
        start, self.length = self.length, self.length + k.shape[2]
        self.k[:, :, start:self.length] = k
        self.v[:, :, start:self.length] = v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class KVCache:
    """The LayerCache of every layer, and the ids they were computed from (batch of one)."""

    def __init__(self, model):
        weight = model.wte.weight
        self.layers = [LayerCache(model.config, 1, weight.device, weight.dtype)
                       for _ in range(model.config.n_layer)]
        self.ids = []

    def truncate(self, length):
        """Forget all but the first `length` tokens."""
        del self.ids[length:]
        for layer in self.layers:
            layer.length = min(layer.length, length)


class GPT(nn.Module):
    """GPT-2: token and position embeddings, n_layer blocks, a last layer norm, and the token embeddings once
    more as the output head (Radford et al. 2019). Raises ValueError for heads that do not divide n_embd."""

    def __init__(self, config):
        super().__init__()
        if config.n_embd % config.n_head:
            raise ValueError(f"n_embd={config.n_embd} cannot be split into n_head={config.n_head} equal "
                             "heads: make n_embd a multiple of n_head")
        self.config = config
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)  # what each token is
        self.wpe = nn.Embedding(config.block_size, config.n_embd)  # where it stands
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        # There is no lm_head: GPT-2 ties the output head to wte (Press & Wolf 2017).
        self.int8_head = None  # but quantize_int8 makes one
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):  # 2 * n_layer of them add to one residual stream
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def hidden(self, idx, cache=None):
        """Token ids (B, T) -> what the last block knows of each, (B, T, C). With a KVCache, idx holds only
        the tokens that come after those already in it."""
        start = cache.layers[0].length if cache else 0
        T = idx.shape[1]
        assert start + T <= self.config.block_size, f"{start + T} tokens, block_size {self.config.block_size}"
        x = self.drop(self.wte(idx) + self.wpe.weight[start:start + T])  # (B, T, C)
        for i, block in enumerate(self.h):
            x = block(x, cache.layers[i] if cache else None)
        return self.ln_f(x)

    def head(self, x):
        """(..., C) -> logits (..., padded V): how well each token's embedding fits, padded ids -inf."""
        logits = self.int8_head(x) if self.int8_head else linear(x, self.wte.weight)
        logits[..., self.config.vocab_size:] = -math.inf
        return logits

    def forward(self, idx, targets=None, where=None):
        """Logits, or the loss that training wants.

        idx: token ids (B, T). targets: None, or the ids that should come next, one for each position that
        the loss looks at. where: the flat indices (b * T + t) of those positions, None for all B * T.
        Returns the logits (B, T, padded V), or with targets the *sum* of their cross-entropies (a scalar,
        in float32): the caller knows how many targets the whole step has, and divides by that.
        """
        x = self.hidden(idx)
        if targets is None:
            return self.head(x)
        x = x.flatten(0, 1)  # (B * T, C)
        if where is not None:
            x = x[where]  # the head is the widest layer: spare it positions whose answer nobody checks
        return F.cross_entropy(self.head(x).float(), targets.flatten(), reduction="sum")

    @torch.no_grad()
    def attention_weights(self, ids):
        """Where every head looks: ids, a list of T -> (n_layer, nh, T, T), rows the tokens that look, columns
        those looked at."""
        layers = [block.attn for block in self.h]
        for attn in layers:
            attn.keep_weights = True
        try:
            self.hidden(torch.tensor([ids], device=self.wte.weight.device))
            return torch.cat([attn.weights for attn in layers])
        finally:
            for attn in layers:
                attn.keep_weights, attn.weights = False, None

    @torch.no_grad()
    def generate(self, ids, max_new_tokens, *, temperature=1.0, top_k=0, top_p=1.0, repetition_penalty=1.0,
                 seed=None, stop_ids=(), cache=None):
        """Continue `ids` (a list, at least one): yields new ids one by one, ending before any of stop_ids.

        temperature 0 takes the likeliest token each time; top_k and top_p as in `sample`. A
        repetition_penalty above 1 makes what the context holds already less likely (Keskar et al. 2019), but
        not stop_ids, which would keep a reply from ending. The same seed gives the same ids. `cache` is a
        KVCache to go on from: whatever of `ids` it already holds is not computed again. Past block_size, the
        window slides by half a block: positions are learned, so what it still holds is computed anew from
        position 0.
        """
        ids = list(ids)
        assert ids, "generate needs at least one id to go on from"
        cache = cache or KVCache(self)
        device = self.wte.weight.device
        generator = torch.Generator("cpu")
        generator.manual_seed(seed) if seed is not None else generator.seed()
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                window = ids[window_start(len(ids), self.config.block_size):]
                # The newest token is always computed: its output is what we sample from.
                known = min(common_prefix(cache.ids, window), len(window) - 1)
                cache.truncate(known)
                x = self.hidden(torch.tensor([window[known:]], device=device), cache)  # (1, new, C)
                cache.ids = window
                logits = self.head(x[:, -1])[0, :self.config.vocab_size].float().cpu()  # (V,)
                if repetition_penalty != 1:
                    seen = list(set(window).difference(stop_ids))
                    penalized = logits[seen]
                    logits[seen] = torch.where(penalized > 0, penalized / repetition_penalty,
                                               penalized * repetition_penalty)
                next_id = sample(logits, temperature, top_k, top_p, generator)
                if next_id in stop_ids:
                    return
                ids.append(next_id)
                yield next_id
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, name_or_path, vocab_size=None, block_size=None, dropout=0.0):
        """GPT-2 with its learned weights.

        name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl (downloaded once, see fetch_gpt2), or a local
        folder (model.safetensors or pytorch_model.bin, and config.json) or .safetensors file of that shape.
        vocab_size: how many ids it is to know; more than the file has adds rows at the mean of the learned
        ones plus a little noise (Hewitt 2021). None: GPT-2's 50257 and the three role tokens, or what
        another file has. block_size: a shorter context, the learned positions are cropped. Raises
        ValueError or OSError, saying what does not fit.
        """
        path = fetch_gpt2(name_or_path) if name_or_path in GPT2_NAMES else Path(name_or_path)
        weights, vocab_size = read_gpt2_weights(path, vocab_size)
        longest, n_embd = weights["wpe.weight"].shape[0], weights["wte.weight"].shape[1]
        n_layer = len({name.split(".")[1] for name in weights if name.startswith("h.")})
        n_head = read_n_head(path) or max(n_embd // 64, 1)
        if n_embd == 0 or n_head < 1 or n_embd % n_head:
            raise ValueError(f"{path}: its {n_embd} channels cannot be split into {n_head} equal heads; "
                             "check n_head in the config.json beside it")
        config = GPTConfig(vocab_size, longest, n_layer, n_head, n_embd, dropout)
        with torch.device("meta"), NoInit():
            model = cls(config)
        model.load_state_dict(checked(weights, model.state_dict(), path), assign=True)
        model.crop_block_size(block_size or longest)
        return model

    def crop_block_size(self, block_size):
        """Keep only the first block_size learned positions. Raises ValueError for more than there are."""
        if block_size > self.config.block_size:
            raise ValueError(f"block_size={block_size}: the model has learned only {self.config.block_size} "
                             "positions; use that or less")
        self.config.block_size = block_size
        self.wpe = nn.Embedding.from_pretrained(self.wpe.weight.detach()[:block_size].clone(), freeze=False)

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors, as transformers has them for
        GPT-2 (GPT2LMHeadModel). A model without biases gets biases of 0, which change nothing."""
        folder, c = Path(folder), self.config
        folder.mkdir(parents=True, exist_ok=True)
        weights = {}
        for name, tensor in self.state_dict().items():
            tensor = tensor[:c.vocab_size] if name == "wte.weight" else tensor
            weights[PREFIX + name] = tensor.t() if name.endswith(TRANSPOSED) else tensor
            bias = name.removesuffix("weight") + "bias"
            if not c.bias and name.startswith(("h.", "ln_f")):
                weights[PREFIX + bias] = torch.zeros(tensor.shape[0])
        roles = 0 if c.vocab_size == GPT2_VOCAB_SIZE else 3  # tokens that follow <|endoftext|>
        end_of_text = c.vocab_size - 1 - roles
        ends = {"bos_token_id": end_of_text, "eos_token_id": sorted({end_of_text, c.vocab_size - 1})}
        write_safetensors(folder / "model.safetensors", weights)
        write_json(folder / "config.json", {
            "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_ctx": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
            "n_head": c.n_head, "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
            "attn_pdrop": c.dropout, "embd_pdrop": c.dropout, "resid_pdrop": c.dropout,
            "tie_word_embeddings": True, "torch_dtype": "float32",
            "bos_token_id": end_of_text, "eos_token_id": end_of_text})
        write_json(folder / "generation_config.json", ends)

    def num_params(self):
        """How many numbers the model is made of, positions and the padding of the vocabulary among them."""
        int8 = sum(m.weight.numel() for m in self.h.modules() if isinstance(m, Int8Linear))
        return int8 + sum(p.numel() for p in self.parameters())

    def flops(self, targets, tokens, pairs):
        """Floating-point operations of a training step that reads `tokens` tokens, `targets` of which reach
        the output head; `pairs` is the sum of T * T over its rows. 6 for each weight that a token meets in a
        matrix product (2 forward, 4 backward), and 12 * C for each pair in each layer (Chowdhery et al.
        2022, "PaLM", appendix B)."""
        c = self.config
        return 6 * (12 * c.n_layer * c.n_embd**2 * tokens + self.wte.weight.numel() * targets) + \
            12 * c.n_layer * c.n_embd * pairs

    def configure_optimizers(self, optimizer, learning_rate, embedding_learning_rate, weight_decay, betas,
                             momentum=0.9):
        """The optimizers for a training run, a list.

        "adamw": one AdamW (Loshchilov & Hutter 2019) for all, at learning_rate. "muon": Muon for the
        blocks' matrices at learning_rate and momentum, AdamW for embeddings, norms and biases at
        embedding_learning_rate. Weights of two dimensions are decayed, norms and biases are not. Each group
        keeps its peak as group["peak_lr"].
        """
        blocks = [p for p in self.h.parameters() if p.dim() == 2]
        tables = [self.wte.weight, self.wpe.weight]
        vectors = [p for p in self.parameters() if p.dim() == 1]
        fused = self.wte.weight.device.type in ("cuda", "cpu")
        if optimizer == "adamw":
            groups = [{"params": blocks + tables, "lr": learning_rate, "weight_decay": weight_decay},
                      {"params": vectors, "lr": learning_rate, "weight_decay": 0.0}]
            optimizers = [torch.optim.AdamW(groups, betas=betas, fused=fused)]
        else:
            groups = [{"params": tables, "lr": embedding_learning_rate, "weight_decay": weight_decay},
                      {"params": vectors, "lr": embedding_learning_rate, "weight_decay": 0.0}]
            optimizers = [Muon(blocks, learning_rate, momentum, weight_decay),
                          torch.optim.AdamW(groups, betas=betas, fused=fused)]
        for group in (g for o in optimizers for g in o.param_groups):
            group["peak_lr"] = group["lr"]
        return optimizers


# ---- sampling ----

def common_prefix(a, b):
    """How many ids two lists have in common at their start."""
    n = min(len(a), len(b))
    return n if a[:n] == b[:n] else next(i for i in range(n) if a[i] != b[i])


def window_start(length, block_size):
    """Where the context of a text of `length` tokens starts: 0, or past block_size the first multiple of
    half a block from which the rest fits."""
    half = max(block_size // 2, 1)
    return 0 if length <= block_size else -(-(length - block_size) // half) * half


def sample(logits, temperature, top_k, top_p, generator):
    """One id from logits (V,): the likeliest at temperature 0; else by chance among the top_k likeliest
    (0: all) that make up at least top_p of the probability (nucleus sampling, Holtzman et al. 2020)."""
    if temperature < 1e-5:  # smaller ones would overflow float32
        return int(logits.argmax())
    order = None
    if top_k or top_p < 1:
        logits, order = logits.topk(min(top_k or len(logits), len(logits)))  # the likeliest first
    probs = (logits / temperature).softmax(-1)
    if top_p < 1:
        probs[1:][probs.cumsum(-1)[:-1] >= top_p] = 0  # the first one always stays
    picked = torch.multinomial(probs, 1, generator=generator)
    return int(picked if order is None else order[picked])


# ---- the optimizer ----

# Each round's (a, b, c) suit what the rounds before it leave of the singular values (Amsel et al. 2025, "The
# Polar Express"; their coefficients, with the 1 % of safety that they recommend for rounding).
NEWTON_SCHULZ_ROUNDS = ((8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250),
                        (3.2856, -2.4153, 0.4853))


def newton_schulz(x):
    """Nearest semi-orthogonal matrices, roughly: (n, r, c) -> (n, r, c) with singular values of about 1.

    Each round turns every singular value v into a v + b v^3 + c v^5, by matrix products alone (Jordan et al.
    2024, "Muon"). Four of them bring every one above a thousandth of the norm to between 0.4 and 1.6: rough,
    but a fifth costs a quarter more and does not lower the loss.
    """
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x  # the smaller side first: x @ x.mT is then the smaller of the two products
    x = x.bfloat16() if x.is_cuda else x.float()  # bfloat16 is slow on most CPUs
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_ROUNDS:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)  # a x + (b s + c s s) x
    return x.mT if tall else x


def wide_matrices(p):
    """The matrices that a parameter is made of, as views with no more rows than columns: c_attn holds three
    (query, key, value), the others one, some of which are turned."""
    rows, cols = p.shape
    return list(p.view(3, cols, cols)) if rows == 3 * cols else [p if rows <= cols else p.mT]


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal, for the matrices of the blocks (Jordan et al. 2024).

    Matrices of one shape are stacked and orthogonalised in one batch. Updates are scaled to the root mean
    square that AdamW's have (Liu et al. 2025, "Muon is Scalable"), so learning rates and weight decay mean
    much the same in both.
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0):
        by_shape = {}
        for p in params:
            by_shape.setdefault(wide_matrices(p)[0].shape, []).append(p)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One step from the gradients in p.grad."""
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            matrices = [matrix for p in params for matrix in wide_matrices(p)]
            grads = torch.stack([matrix for p in params for matrix in wide_matrices(p.grad)])  # (n, r, c)
            state = self.state[params[0]]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            buffer = state["momentum_buffer"].lerp_(grads, 1 - momentum)
            update = newton_schulz(grads.lerp_(buffer, momentum)).to(grads.dtype)  # Nesterov's look ahead
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-lr * 0.2 * math.sqrt(grads.shape[2]))


# ---- int8 weights ----

class Int8Linear(nn.Module):
    """A linear layer with int8 weights, each output row with a scale of its own. For a single token nearly
    all the time goes into reading weights, and these are a quarter of the bytes: PyTorch's int8 kernel then
    quantizes the token's channels too, with one scale and zero point. More tokens are multiplied in float32
    (Dettmers et al. 2022, "LLM.int8()", shows what one scale for many tokens would cost)."""

    def __init__(self, weight, bias):
        super().__init__()
        scale = weight.abs().amax(dim=1).clamp(min=1e-12) / 127  # (out,)
        rows = (weight / scale[:, None]).round().to(torch.int8)  # (out, in)
        self.weight, self.scale, self.bias = nn.Buffer(rows), nn.Buffer(scale), bias
        # Without VNNI instructions the kernel adds pairs of products in 16 bits, and needs inputs of 7 bits.
        self.reduce_range = not any(on for name, on in torch.cpu.get_capabilities().items() if "vnni" in name)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # quantized tensors are on their way out, but fastest
            self.packed = torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(
                rows, scale.double(), torch.zeros(len(scale), dtype=torch.long), 0), bias)

    def forward(self, x):  # (..., in) -> (..., out)
        if x.numel() > x.shape[-1]:
            return F.linear(x, self.weight.float()) * self.scale + (0 if self.bias is None else self.bias)
        return torch.ops.quantized.linear_dynamic(x, self.packed, self.reduce_range)


def quantize_int8(model):
    """Give a GPT int8 weights in its blocks and head, in place; for inference on a CPU."""
    with torch.no_grad():
        for module in [m for m in model.h.modules() if not isinstance(m, nn.Linear)]:
            for name, layer in list(module.named_children()):
                if isinstance(layer, nn.Linear):
                    setattr(module, name, Int8Linear(layer.weight, layer.bias))
        model.int8_head = Int8Linear(model.wte.weight, None)


# ---- the device ----

def pick_device(device="auto", dtype="auto"):
    """Where and in what precision to compute: (torch.device, torch.dtype, why), for "auto" or a name.

    Raises ValueError for a device this machine does not have, or a dtype of another name.
    """
    best = ("cuda" if torch.cuda.is_available() else
            "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        picked = torch.device(best if device == "auto" else device)
    except RuntimeError:
        raise ValueError(f"device={device!r} is not a device: use auto, cpu, cuda, cuda:1 or mps") from None
    missing = picked.type == "cuda" and (picked.index or 0) >= torch.cuda.device_count()
    if picked.type not in ("cpu", best) or missing:
        raise ValueError(f"device={device!r} is not available on this machine: use auto or {best}")
    fast = "bfloat16" if picked.type == "cuda" and torch.cuda.is_bf16_supported() else "float32"
    name = fast if dtype == "auto" else dtype
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype={dtype!r}: use auto, float32 or bfloat16 (chat.py: or int8)")
    why = "as set" if device != "auto" else "the only one here" if best == "cpu" else "found"
    why_dtype = "as set" if dtype != "auto" else "fast here"
    return picked, getattr(torch, name), f"{picked} ({why}), {name} ({why_dtype})"


# ---- files ----

def write_atomically(path, write):
    """Call write(f) so that `path` is never half-written: to a file beside it, to the disk, then renamed
    over it. Raises OSError (disk full, no permission); an older file then stays."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch wraps a failed write in a RuntimeError
        part.unlink(missing_ok=True)
        cause = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path}: could not be saved ({cause}); an earlier file there is untouched") from error


def write_json(path, value):
    """Write a value as JSON; see write_atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda f: f.write(text.encode("utf-8")))


DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
          "U8": torch.uint8}


def read_safetensors(path):
    """Yield (name, tensor) for each tensor of a safetensors file, the largest first, in memory of its own.

    The format: 8 bytes, the length of the header; the header, JSON: {name: {dtype, shape, data_offsets}};
    then the bytes of the tensors. Every number is checked before it is used: raises ValueError for a file
    that is cut short or says anything impossible.
    """
    def need(ok, what):
        if not ok:
            raise ValueError(f"{path}: not a whole safetensors file ({what}); fetch it again")

    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        length = int.from_bytes(f.read(8), "little")
        need(2 <= length <= min(size - 8, 100_000_000), "its header does not fit in it")
        try:
            header = json.loads(f.read(length).decode("utf-8"))
            header.pop("__metadata__", None)
            entries = [(name, entry["dtype"], list(entry["shape"]), list(entry["data_offsets"]))
                       for name, entry in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            entries = None
        need(entries, "its header is broken or empty")
        for name, kind, shape, offsets in entries:
            need(isinstance(kind, str) and kind in DTYPES, f"{name!r} is of unknown type {kind!r}")
            need(len(offsets) == 2 and all(type(n) is int and 0 <= n for n in shape + offsets) and
                 math.prod(n or 1 for n in shape) < 2**60, f"{name!r} has impossible numbers")
            need(offsets[0] <= offsets[1] <= size - 8 - length, f"{name!r} ends beyond the file")
            need(offsets[1] - offsets[0] == math.prod(shape) * DTYPES[kind].itemsize,
                 f"{name!r} has another size than its shape")
        for name, kind, shape, (start, stop) in sorted(entries, key=lambda e: e[3][0] - e[3][1]):
            raw = np.empty(stop - start, np.uint8)  # NumPy's memory is reused better than torch's, once freed
            f.seek(8 + length + start)
            need(f.readinto(raw) == stop - start, f"{name!r} is cut short")
            tensor = torch.from_numpy(raw).view(DTYPES[kind]) if raw.size else torch.empty(0)
            yield name, tensor.view(shape)
            del raw, tensor


def write_safetensors(path, tensors):
    """Write {name: tensor} as float32 in the format that read_safetensors reads; never half a file."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [offset, offset := offset + 4 * tensor.numel()]}
    text = json.dumps(header).encode("utf-8")
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            f.write(tensor.detach().float().cpu().contiguous().numpy().data)

    write_atomically(path, write)


# ---- GPT-2's weights ----

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
GPT2_VOCAB_SIZE = 50257  # ids in GPT-2's own files, which know no role tokens
GPT2_URL = "{mirror}/openai-community/{name}/resolve/main/model.safetensors"

# GPT-2's tensors have our names and shapes, but for these:
PREFIX = "transformer."  # stands before every name, or before none
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # (in, out)
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", "lm_head.weight")  # the causal mask; wte.weight once more


def fetch_gpt2(name):
    """The local model.safetensors of gpt2, gpt2-medium, gpt2-large or gpt2-xl, downloaded at first use.

    From the hub's openai-community repositories, or the mirror that the variable HF_ENDPOINT names; into
    GPT2_CACHE_DIR, or ~/.cache/gpt2. Raises OSError.
    """
    folder = Path(os.environ.get("GPT2_CACHE_DIR") or "~/.cache/gpt2").expanduser() / name
    path = folder / "model.safetensors"
    if not path.exists():
        print(f"downloading {name} into {folder}", file=sys.stderr)
    mirror = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        return download(GPT2_URL.format(mirror=mirror.rstrip("/"), name=name), path)
    except OSError as error:
        raise OSError(f"{error} (HF_ENDPOINT names a mirror, --init_from=FILE.safetensors a file)") from error


def grow_rows(table, count, padded):
    """An embedding table with rows for ids that are new: (rows, C) -> (padded, C). Up to `count`, the mean
    of the learned rows plus noise, so that a new id is at first an average one; the padding behind is 0."""
    rows = table.shape[0]
    grown = torch.zeros(padded, table.shape[1])
    grown[:rows] = table
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(count - rows, table.shape[1], generator=generator)
    if table.numel():
        grown[rows:count] = table.mean(0) + 0.01 * table.std() * drawn
    return grown


def read_gpt2_weights(path, vocab_size):
    """A file or folder with GPT-2's weights as ({our name: tensor}, vocab_size): the transposed ones turned,
    in float32, wte grown to vocab_size (see from_pretrained). Raises ValueError or FileNotFoundError."""
    files = [path] if path.is_file() else [path / "model.safetensors", path / "pytorch_model.bin"]
    file = next((f for f in files if f.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"{path}: no model.safetensors or pytorch_model.bin there; use a folder "
                                f"that has one, or one of {', '.join(GPT2_NAMES)}")
    if file.suffix == ".safetensors":
        named = read_safetensors(file)
    else:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
            named = [(str(name), tensor.float()) for name, tensor in loaded.items()]
        except Exception as error:  # torch has many for a stranger's bytes
            raise ValueError(f"{file}: not a file of weights, or cut short "
                             f"({type(error).__name__})") from error
    weights = {}
    for name, tensor in named:
        name = name.removeprefix(PREFIX)
        if name.endswith(NOT_WEIGHTS):
            continue
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t()
        if name == "wte.weight" and tensor.dim() == 2:  # the largest, so while little else is in memory
            rows = tensor.shape[0]
            vocab_size = vocab_size or (GPTConfig.vocab_size if rows == GPT2_VOCAB_SIZE else rows)
            if vocab_size < rows:
                raise ValueError(f"vocab_size={vocab_size}: {path} has {rows} ids; use that or more")
            tensor = grow_rows(tensor, vocab_size, GPTConfig(vocab_size).padded_vocab_size)
        weights[name] = tensor.float().contiguous()
        del tensor
    for name in ("wte.weight", "wpe.weight"):
        if name not in weights or weights[name].dim() != 2:
            raise ValueError(f"{file}: holds no {name} table, so these are not GPT-2's weights")
    return weights, vocab_size


def read_n_head(path):
    """The number of heads that the config.json beside the weights states, or None: it shows in no shape."""
    try:
        file = (path if path.is_dir() else path.parent) / "config.json"
        return int(json.loads(file.read_text(encoding="utf-8"))["n_head"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def checked(weights, expected, path):
    """`weights`, or a ValueError for the first tensor that is missing, unknown or of another shape."""
    for name in [*sorted(weights.keys() - expected.keys()), *expected]:  # the unknown ones first
        if name not in weights or name not in expected:
            problem = "is missing" if name in expected else "does not belong to a GPT-2"
            raise ValueError(f"{path}: the tensor {name} {problem}")
        if weights[name].shape != expected[name].shape:
            raise ValueError(f"{path}: {name} has the shape {tuple(weights[name].shape)}, expected "
                             f"{tuple(expected[name].shape)}")
    return weights


# ---- checkpoints ----

class NoInit(TorchFunctionMode):
    """Within it, new modules draw no random numbers: loaded weights will replace them anyway. (Drawing them
    for the meta device would also import half of torch, which takes a second.)"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


def save_checkpoint(path, checkpoint):
    """Write a dict of tensors and plain values; see write_atomically."""
    write_atomically(path, lambda f: torch.save(checkpoint, f))


def load_checkpoint(path, hint=""):
    """The dict that save_checkpoint wrote, its tensors mapped from the file (read when first used).

    Raises FileNotFoundError, or ValueError for a file that is no checkpoint or is cut short; `hint` ends
    the first message, and should say how to make one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint. {hint}".strip())
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        checkpoint["model"], checkpoint["config"], checkpoint["tokenizer"], checkpoint["kind"]
    except Exception as error:  # whatever torch says of a stranger's bytes, the user's next step is the same
        raise ValueError(f"{path}: not a checkpoint of this project, or cut short "
                         f"({type(error).__name__}); make a new one or name another") from error
    return checkpoint


def model_checkpoint(model, tokenizer_spec, kind, **extra):
    """What chat needs of a model: its config, weights, tokenizer and kind, "chat" or "text"; `extra` says
    how it was made."""
    return {"config": asdict(model.config), "model": model.state_dict(), "tokenizer": tokenizer_spec,
            "kind": kind, **extra}


def model_from_checkpoint(checkpoint, dropout=0.0):
    """The GPT in a checkpoint, with no random initialisation on the way. Raises ValueError where the
    weights do not fit the config."""
    config = GPTConfig(**{**checkpoint["config"], "dropout": dropout})
    with torch.device("meta"), NoInit():
        model = GPT(config)
    try:
        model.load_state_dict(checkpoint["model"], assign=True)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise ValueError(f"the checkpoint's weights do not fit its config: {problem}") from error
    return model


# ---- by itself: a checkpoint for other tools ----

@dataclass
class ExportSettings:
    checkpoint: Path = Path("out/chat/best.pt")  # what to export
    export: Path = Path("out/chat/hf")  # the folder to write: opens with transformers' AutoModelForCausalLM


def main(argv):
    """Export a checkpoint as a folder for transformers. Raises ValueError or OSError."""
    import config  # only the scripts need it
    from data.conversation import CHAT_TEMPLATE
    from data.tokenizer import write_hf_tokenizer
    s = config.load(ExportSettings, argv, __doc__)
    checkpoint = load_checkpoint(s.checkpoint, "Train one first, or name it with --checkpoint=FILE.")
    model_from_checkpoint(checkpoint).save_pretrained(s.export)
    write_hf_tokenizer(s.export, checkpoint["tokenizer"], checkpoint["config"]["block_size"], CHAT_TEMPLATE)
    print(f"{s.checkpoint} -> {s.export}: {', '.join(sorted(p.name for p in s.export.iterdir()))}")


if __name__ == "__main__":
    import config
    config.run(main)
