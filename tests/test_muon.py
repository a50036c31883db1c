"""runtime/muon.py against SVDs in float64, and how train.py divides parameters among the optimizers."""
import math

import numpy as np
import pytest
import torch

import train
from runtime.muon import NEWTON_SCHULZ_ROUNDS, Muon, newton_schulz
from tests.test_model import C, T, close, random_ids, toy


def test_newton_schulz_sets_singular_values_near_1():
    x = np.diag(np.geomspace(1, 0.003, 8))
    values = np.diag(np_orthogonalize(x))
    assert 0.4 < values.min() and values.max() < 1.6
    for scale in (1e-3, 100):  # the size of a gradient does not matter
        close(newton_schulz(torch.tensor(scale * x, dtype=torch.float32)[None])[0], np.diag(values), atol=0.02)


def np_orthogonalize(x):
    """Compute newton_schulz of one matrix from its singular values, in float64."""
    u, values, v = np.linalg.svd(x, full_matrices=False)
    values = values / np.linalg.norm(values)
    for a, b, c in NEWTON_SCHULZ_ROUNDS:
        values = a * values + b * values**3 + c * values**5
    return u @ np.diag(values) @ v


def np_update(name, grad):
    """Return Muon's update of one parameter without its learning rate: c_attn's q, k and v separately, a 3-D
    parameter matrix by matrix."""
    parts = np.split(grad, 3) if "c_attn" in name else grad if grad.ndim == 3 else [grad]
    updates = [0.2 * math.sqrt(max(x.shape)) * np_orthogonalize(x) for x in parts]
    return np.stack(updates) if grad.ndim == 3 else np.concatenate(updates)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_steps_equal_a_plain_loop_over_matrices(dtype, atol):
    gpt, lr, decay, momentum = toy(), 0.02, 0.1, 0.95
    gpt.h[0].mlp.c_fc = torch.nn.Linear(C, 3 * C)  # as wide as c_attn, but one matrix
    gpt.h[1].experts = torch.nn.Parameter(torch.randn(4, C, 2 * C))
    params = {name: p for name, p in gpt.h.named_parameters() if p.dim() >= 2}
    assert len(params) == 9
    expected = {name: p.detach().double().numpy() for name, p in params.items()}
    buffers = {name: 0.0 for name in params}
    optimizer, rng = Muon(params, lr, momentum, decay, dtype), np.random.default_rng(0)
    for _ in range(2):
        for name, p in params.items():
            grad = rng.normal(size=p.shape)
            p.grad = torch.tensor(grad, dtype=torch.float32)
            buffers[name] = momentum * buffers[name] + (1 - momentum) * grad
            nesterov = momentum * buffers[name] + (1 - momentum) * grad
            expected[name] = expected[name] * (1 - lr * decay) - lr * np_update(name, nesterov)
        optimizer.step()
    for name, p in params.items():
        close(p, expected[name], atol=atol)
        assert p.dtype == torch.float32


RATES = dict(learning_rate=0.01, embedding_learning_rate=0.003, weight_decay=0.1, momentum=0.9)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_has_one_optimizer_and_only_matrices_decay(name):
    gpt = toy()
    gpt.h[0].experts = torch.nn.Parameter(torch.randn(4, C, 2 * C))  # a reader's edits: nothing uses it,
    gpt.h[1].attn.c_proj.weight.requires_grad = False  # and this is frozen
    optimizers = train.configure_optimizers(gpt, train.Settings(optimizer=name, **RATES))
    groups = [(type(o).__name__, group) for o in optimizers for group in o.param_groups]
    held = [id(p) for _, group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in gpt.parameters() if p.requires_grad)
    in_blocks = {id(p) for p in gpt.h.parameters()}
    for optimizer, group in groups:
        assert group["peak_lr"] == group["lr"] == (0.003 if (name, optimizer) == ("muon", "AdamW") else 0.01)
        for p in group["params"]:
            assert (group["weight_decay"] > 0) == (p.dim() >= 2)
            by_muon = name == "muon" and id(p) in in_blocks and p.dim() >= 2
            assert (optimizer == "Muon") == by_muon
    assert optimizers[-1].defaults["fused"]
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    gpt(random_ids(2, T), random_ids(2, T, seed=3).flatten()).backward()
    for optimizer in optimizers:
        optimizer.step()
    same = {name for name, p in gpt.named_parameters() if p.equal(before[name])}
    assert same - {"h.0.experts"} == {"h.1.attn.c_proj.weight"}  # AdamW has no step without a gradient, Muon may decay
