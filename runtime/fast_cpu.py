"""Generate faster on a CPU. Prefill uses oneDNN, which is 10 % faster than PyTorch's BLAS. Decoding
is memory-bound: it uses NumPy, whose BLAS reads the weights with all cores instead of one."""
import math
import sys
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, KVCache, empty_model, seeded_generator


class FastLinear(nn.Module):
    """nn.Linear on the same weights, without gradients."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.arrays = weight.numpy(), 0 if bias is None else bias.numpy()

    def forward(self, x):  # (..., in) -> (..., out)
        if not torch.backends.mkldnn.is_available():
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def one_token(self, x):  # arrays: (in,) -> (out,)
        weight, bias = self.arrays
        return weight @ x + bias


class Int8Linear(nn.Module):
    """nn.Linear with int8 weights, as an embedding_bag: a sum of table rows, each times one input
    channel. A row has that channel's weights for `width` outputs, and their scale and minimum."""

    def __init__(self, weight, bias=None):
        super().__init__()
        n_out, n_in = weight.shape
        # A core keeps up to 384 sums in registers, and each thread needs a bag.
        largest = min(384, max(n_out // torch.get_num_threads(), 1))
        width = max(width for width in range(1, largest + 1) if n_out % width == 0)
        rows = weight.view(-1, width, n_in).mT.reshape(-1, width)  # (bags * in, width)
        self.table = torch.ops.quantized.embedding_bag_byte_prepack(rows)  # (bags * in, width + 8)
        self.indices = torch.arange(len(rows), dtype=torch.int32)
        self.starts = self.indices[::n_in].contiguous()  # the first row of each bag
        self.bias = 0 if bias is None else bias.numpy()

    def forward(self, x):  # (..., in) -> (..., out), on dequantized weights
        weight = torch.ops.quantized.embedding_bag_byte_unpack(self.table)
        weight = weight.view(len(self.starts), x.shape[-1], -1)  # (bags, in, width)
        y = (x.flatten(0, -2) @ weight).transpose(0, 1)  # (tokens, bags, width)
        return y.reshape(*x.shape[:-1], -1) + torch.as_tensor(self.bias)

    def one_token(self, x):  # arrays: (in,) -> (out,)
        x = torch.from_numpy(np.tile(x, len(self.starts)))
        return torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
            self.table, self.indices, self.starts, per_sample_weights=x).numpy().ravel() + self.bias


class FastGPT(GPT):
    """GPT with fast linear layers, which decodes with a KV cache one token at a time in NumPy."""

    @np.errstate(all="ignore")  # chat.py reports logits that are not finite
    def hidden(self, idx, cache=None, start=0):
        if cache is None or idx.numel() > 1:
            return super().hidden(idx, cache, start)
        n_head, S = self.config.n_head, start + 1
        x = self.tables[0][int(idx)] + self.tables[1][start]  # (C,)
        for (ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj), layer in zip(self.steps, cache.layers):
            q, k, v = c_attn.one_token(ln_1(torch.from_numpy(x)).numpy()).reshape(3, n_head, -1)
            keys, values = layer.k[0].numpy(), layer.v[0].numpy()  # (nh, block_size, hs)
            keys[:, start], values[:, start] = k, v
            scores = keys[:, :S] @ (q / math.sqrt(q.shape[1]))[:, :, None]  # (nh, S, 1)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights = (weights / weights.sum(1, keepdims=True)).swapaxes(1, 2)  # (nh, 1, S)
            x = x + attn_proj.one_token((weights @ values[:, :S]).ravel())
            h = torch.from_numpy(c_fc.one_token(ln_2(torch.from_numpy(x)).numpy()))  # (4 C,)
            x = x + mlp_proj.one_token(F.gelu(h, approximate="tanh").numpy())
        return self.ln_f(torch.from_numpy(x))[None, None]  # (1, 1, C)

    def head(self, x):
        one = x.numel() == x.shape[-1]
        y = torch.from_numpy(self.output.one_token(x.numpy().ravel())) if one else self.output(x)
        y[..., self.config.vocab_size:] = -math.inf
        return y.view(*x.shape[:-1], -1)


def build(model, linear):
    """Return a FastGPT on a GPT's weights; linear is FastLinear or Int8Linear."""
    fast, n_params = empty_model(model.config).eval(), model.num_params()
    fast.load_state_dict(model.state_dict(), assign=True)  # without copying
    fast.requires_grad_(False)
    fast.__class__, fast.num_params = FastGPT, lambda: n_params  # int8 weights are not parameters
    for parent in list(fast.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:  # a subclass may compute something different
                setattr(parent, name, linear(layer.weight, layer.bias))
    fast.output = linear(fast.wte.weight)
    fast.tables = fast.wte.weight.numpy(), fast.wpe.weight.numpy()
    fast.steps = [(block.ln_1.forward, block.attn.c_attn, block.attn.c_proj,
                   block.ln_2.forward, block.mlp.c_fc, block.mlp.c_proj) for block in fast.h]
    return fast


@torch.no_grad()
def shrink(model):
    """Return a narrow GPT with random weights, in which every part affects the logits."""
    config = replace(model.config, vocab_size=64, n_embd=4 * model.config.n_head)
    small = empty_model(config).eval()
    for seed, p in enumerate(small.parameters()):
        p.normal_(std=0.5, generator=seeded_generator(seed))
    return small


@torch.no_grad()
def probe(model):
    """Return the logits (T, V) of a short prefill and of a full context's last token."""
    cache, last = KVCache(model), model.config.block_size - 1  # an edited window may be long
    cache.layers = [cache.layers[0]] * len(cache.layers)  # one for all: quick to fill
    cache.layers[0].k.normal_(generator=seeded_generator(0))
    cache.layers[0].v.normal_(std=10, generator=seeded_generator(1))  # attention matters
    xs = [model.hidden(torch.tensor([ids]), cache, start)[0]
          for ids, start in (([0, 1, 2][:last + 1], 0), ([3], last))]
    return torch.cat([model.head(x) for x in xs])


def speed_up(model, int8=False):
    """Return a faster model that generates what a GPT in eval mode does and shares its weights.
    int8: quantize the linear layers and the head. Return the model itself if it is not on a CPU in
    float32, or if an edited model.py computes something different from this file."""
    if model.wte.weight.device.type != "cpu" or model.wte.weight.dtype != torch.float32:
        return model
    try:
        small = shrink(model)
        found, wanted = probe(build(small, FastLinear)), probe(small)
        if (found - wanted).abs().max() <= 1e-3 * wanted.std():
            return build(model, Int8Linear if int8 else FastLinear)
    except Exception:  # an edited model need not have these layers, or their shapes
        pass
    print("note: model.py was edited, so runtime/fast_cpu.py is not used", file=sys.stderr)
    return model
