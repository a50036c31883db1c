"""Generate faster on a CPU, in float32 or int8. Prefill uses oneDNN. Decoding is memory-bound: it
uses NumPy, whose BLAS reads the weights with all cores instead of one."""
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT, KVCache, empty_model, seeded_generator

warnings.filterwarnings("ignore", "torch.quantize_per_tensor")  # deprecated; torch is pinned


class FastLinear(nn.Module):
    """nn.Linear on the same weights, without gradients."""

    def __init__(self, weight, bias=None):
        super().__init__()
        self.weight, self.bias = weight, torch.zeros(len(weight)) if bias is None else bias

    def forward(self, x):  # (..., in) -> (..., out)
        if not torch.backends.mkldnn.is_available():
            return F.linear(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    def one_token(self, x):  # arrays: (in,) -> (out,)
        return self.weight.numpy() @ x + self.bias.numpy()


class Int8Linear(nn.Module):
    """nn.Linear in int8: weights with a scale per output, activations with a scale per token. The
    weights have 7 bits: CPUs without VNNI add two products in 16 bits, where 8 would overflow."""

    def __init__(self, weight, bias=None):
        super().__init__()
        scales = torch.maximum(weight.amax(1), -weight.amin(1)).clamp(min=1e-9) / 63
        rounded = (weight / scales[:, None]).round_().char()
        self.packed = torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(
            rounded, scales.double(), torch.zeros(len(scales), dtype=torch.long), axis=0), None)
        self.bias = torch.zeros(len(scales)) if bias is None else bias

    def forward(self, x):  # (..., in) -> (..., out)
        size = x.abs().amax(-1, keepdim=True).clamp(min=1e-9)  # linear_dynamic has only one scale
        y = torch.ops.quantized.linear_dynamic(x / size, self.packed)
        return torch.addcmul(self.bias, y, size)

    def one_token(self, x):  # arrays: (in,) -> (out,)
        y = torch.ops.quantized.linear_dynamic(torch.from_numpy(x)[None], self.packed)[0]
        return y.numpy() + self.bias.numpy()


class FastGPT(GPT):
    """GPT with fast linear layers, which decodes with a KV cache one token at a time in NumPy."""

    @np.errstate(all="ignore")  # chat.py reports logits that are not finite
    def hidden(self, idx, cache=None, start=0):
        if cache is None or idx.numel() > 1:
            return super().hidden(idx, cache, start)
        n_head, S = self.config.n_head, start + 1
        x = (self.wte.weight[int(idx)] + self.wpe.weight[start]).numpy()  # (C,)
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
    fast, n_params = empty_model(model.config).eval().requires_grad_(False), model.num_params()
    fast.load_state_dict(model.state_dict(), assign=True)  # without copying
    fast.__class__, fast.num_params = FastGPT, lambda: n_params  # int8 weights are not parameters
    for parent in list(fast.modules()):
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:  # a subclass may compute something different
                setattr(parent, name, linear(layer.weight, layer.bias))
    fast.output = linear(fast.wte.weight)
    fast.steps = [(block.ln_1.forward, block.attn.c_attn, block.attn.c_proj,
                   block.ln_2.forward, block.mlp.c_fc, block.mlp.c_proj) for block in fast.h]
    return fast


@torch.no_grad()
def computes_the_same(config):
    """Whether a FastGPT and model.py's GPT agree on a short prefill and a full context's last
    token. Both are narrow, with the same random weights, large enough for every part to matter."""
    model = empty_model(replace(config, vocab_size=64, n_embd=4 * config.n_head)).eval()
    for seed, p in enumerate(model.parameters()):
        p.normal_(std=0.5, generator=seeded_generator(seed))
    logits, last = [], config.block_size - 1  # an edited attention window may be long
    for gpt in (model, build(model, FastLinear)):
        cache = KVCache(gpt)
        cache.layers = [cache.layers[0]] * len(cache.layers)  # shared by all layers: quick to fill
        cache.layers[0].k.normal_(generator=seeded_generator(0))
        cache.layers[0].v.normal_(std=10, generator=seeded_generator(1))
        xs = [gpt.hidden(torch.tensor([ids]), cache, start)[0]
              for ids, start in (([0, 1, 2][:last + 1], 0), ([3], last))]
        logits.append(torch.cat([gpt.head(x) for x in xs]))
    return (logits[1] - logits[0]).abs().max() <= 1e-3 * logits[0].std()


def speed_up(model, int8=False):
    """Return a faster model that shares an eval-mode GPT's weights and generates the same tokens.
    int8: quantize the linear layers and the head. Return the model itself if it is not on a CPU in
    float32, or if an edited model.py computes something different from this file."""
    if model.wte.weight.device.type != "cpu" or model.wte.weight.dtype != torch.float32:
        return model
    try:
        if computes_the_same(model.config):
            return build(model, Int8Linear if int8 else FastLinear)
    except Exception:  # an edited model need not have these layers, or their shapes
        pass
    print("note: model.py was edited, so runtime/fast_cpu.py is not used", file=sys.stderr)
    return model
