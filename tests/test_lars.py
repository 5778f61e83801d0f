"""LARS against a plain NumPy computation, tensor by tensor, over several steps."""

import numpy as np
import pytest
import torch
from pool import close

from common.augment import rng
from common.lars import LARS

SHAPES = {"weight": (4, 3), "conv": (2, 3, 2, 2), "bias": (5,), "scale": (), "zero": (3, 3),
          "unmoved": (2, 2), "slow": (2, 3)}


def plain(p, v, g, lr, mu, wd, trust, adapt, classic):
    """One step of one tensor, from the definition; arrays of float64."""
    q = 1.0
    if adapt:
        g = g + wd * p
        if np.linalg.norm(p) > 0 and np.linalg.norm(g) > 0:
            q = trust * np.linalg.norm(p) / np.linalg.norm(g)
    if classic:
        v = mu * v + lr * q * g
        return p - v, v
    v = mu * v + q * g
    return p - lr * v, v


@pytest.mark.parametrize("classic", [False, True])
@pytest.mark.parametrize("adapt_1d", [False, True])
@pytest.mark.parametrize("mu, wd, trust", [(0.9, 0.0, 0.001), (0.9, 0.3, 0.001), (0.0, 0.1, 0.02)])
def test_lars_is_the_plain_computation(mu, wd, trust, adapt_1d, classic):
    params = {k: torch.randn(s, generator=rng(k)).requires_grad_() for k, s in SHAPES.items()}
    params["zero"].data.zero_()  # a norm of 0: no trust ratio
    slow = params["slow"]
    rest = [x for x in params.values() if x is not slow]

    def optimizer():
        groups = [{"params": rest}, {"params": [slow], "weight_decay": 0.7, "trust": 0.1}]
        return LARS(groups, 1.0, mu, wd, trust, adapt_1d, classic)

    p = {k: x.detach().double().numpy() for k, x in params.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    ours = optimizer()
    for step, rate in enumerate((0.0, 2.0, 5.0, 0.5)):  # classic: old gradients keep their rate
        state, ours = ours.state_dict(), optimizer()
        ours.load_state_dict(state)  # as in a run that is resumed
        for k, x in params.items():
            lr, own = (rate / 2, (0.7, 0.1)) if k == "slow" else (rate, (wd, trust))
            if k != "unmoved":  # no gradient: no decay
                x.grad = 0.1 * torch.randn(SHAPES[k], generator=rng(step, k))
                g, adapt = x.grad.double().numpy(), x.ndim > 1 or adapt_1d
                p[k], v[k] = plain(p[k], v[k], g, lr, mu, *own, adapt, classic)
        for group, share in zip(ours.param_groups, (1, 0.5), strict=True):
            group["lr"] = rate * share
        ours.step()
    for k, x in params.items():
        close(x, p[k], 1e-4, 1e-5)
