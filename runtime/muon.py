"""The Muon optimizer (Jordan et al. 2024), for the matrices of the blocks. It needs far fewer
steps than AdamW for a given loss; its matrix products take about a fifth of a step in make chat."""
import math

import torch

# (a, b, c) of each round of newton_schulz (Amsel et al. 2025, "The Polar Express"; their
# coefficients with the 1% safety margin that they recommend).
NEWTON_SCHULZ_ROUNDS = ((8.2052, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184),
                        (3.9096, -2.8234, 0.5250), (3.2856, -2.4153, 0.4853))


def newton_schulz(x, dtype=torch.float32):
    """Approximate the nearest semi-orthogonal matrices: (n, rows, cols), all singular values near
    1. Each round maps every singular value v to a v + b v^3 + c v^5, using only matrix products.
    Four rounds bring every v that is over a thousandth of the norm to between 0.4 and 1.6, which
    is enough: a fifth round does not lower the loss."""
    is_tall = x.shape[1] > x.shape[2]
    x = (x.mT if is_tall else x).to(dtype)  # the smaller side first, so that x @ x.mT is small
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in NEWTON_SCHULZ_ROUNDS:
        xx = x @ x.mT
        by = torch.baddbmm(xx, xx, xx, beta=b, alpha=c)  # b xx + c xx xx
        x = torch.baddbmm(x, by, x, beta=a)  # a x + (b xx + c xx xx) x
    return x.mT if is_tall else x


def split_matrices(name, p):
    """Return the matrices in a parameter, a list of views: three in c_attn (queries, keys, values),
    one for each index of a 3-D parameter's first dimension. Tall ones are transposed, so that c_fc
    shares a stack with c_proj."""
    rows, cols = p.shape[-2:]
    is_qkv = name.endswith("c_attn.weight") and rows == 3 * cols
    matrices = p.view(-1, cols if is_qkv else rows, cols)
    return list(matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices)


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates. A gradient is large in a few directions; an orthogonal
    update is equally large in all. Updates are scaled to the size of AdamW's (Liu et al. 2025,
    "Muon is Scalable"), so learning rates and weight decay are comparable. named_params: {name:
    parameter of 2 or more dimensions}. dtype: of the matrix products; bfloat16 is enough."""

    def __init__(self, named_params, lr, momentum=0.9, weight_decay=0.0, dtype=torch.float32):
        self.dtype, self.names = dtype, {p: name for name, p in named_params.items()}
        by_shape = {}  # matrices of one shape are stacked and orthogonalized in one batch
        for name, p in named_params.items():
            by_shape.setdefault(split_matrices(name, p)[0].shape, []).append(p)
        groups = [{"params": group} for group in by_shape.values()]
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """Take one step from the gradients in p.grad."""
        for group in self.param_groups:
            params, lr, momentum = group["params"], group["lr"], group["momentum"]
            matrices = [m for p in params for m in split_matrices(self.names[p], p)]
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            grads = torch.stack([m for p, grad in zip(params, grads)
                                 for m in split_matrices(self.names[p], grad)])  # (n, rows, cols)
            state = self.state[params[0]]  # the whole stack's, stored under its first parameter
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(grads)
            buffer = state["momentum_buffer"].lerp_(grads, 1 - momentum)
            ahead = grads.lerp_(buffer, momentum)  # Nesterov momentum
            update = newton_schulz(ahead, self.dtype).to(grads.dtype)
            scale = 0.2 * math.sqrt(grads.shape[2])  # root mean square: from 1 / sqrt(cols) to 0.2
            torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            torch._foreach_add_(matrices, update.unbind(), alpha=-lr * scale)
