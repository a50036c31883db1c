"""Fast decoding on a CPU."""
import math

import numpy as np
import torch
import torch.nn as nn

from model import GPT, KVCache, seeded_generator, shared

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
