"""LARS against a plain NumPy computation, tensor by tensor, over several steps."""

import numpy as np
import pytest
import torch
from pool import close

from common.augment import rng
from common.lars import LARS

SHAPES = {"weight": (4, 3), "conv": (2, 3, 2, 2), "bias": (5,), "scale": (), "zero": (3, 3), "unmoved": (2, 2)}


def parameters():
    params = {k: torch.randn(s, generator=rng(k)).requires_grad_() for k, s in SHAPES.items()}
    params["zero"].data.zero_()  # a norm of 0: no trust ratio
    return params


def gradients(step):
    return {k: 0.1 * torch.randn(s, generator=rng(step, k)) for k, s in SHAPES.items() if k != "unmoved"}


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
    params = parameters()
    optimizer = LARS(params.values(), 1.0, mu, wd, trust, adapt_1d, classic)
    p = {k: x.detach().double().numpy() for k, x in params.items()}
    v = {k: np.zeros_like(x) for k, x in p.items()}
    for step, lr in enumerate((0.0, 2.0, 5.0, 0.5)):  # a schedule: with classic, old gradients keep their rate
        optimizer.param_groups[0]["lr"] = lr
        for k, g in gradients(step).items():
            params[k].grad = g
            adapt = len(SHAPES[k]) > 1 or adapt_1d
            p[k], v[k] = plain(p[k], v[k], g.double().numpy(), lr, mu, wd, trust, adapt, classic)
        optimizer.step()
    for k, x in params.items():
        close(x, p[k], 1e-4, 1e-5)
    assert torch.equal(params["unmoved"], parameters()["unmoved"])  # no gradient, no step, no decay
    assert all(not torch.equal(params[k], parameters()[k]) for k in SHAPES if k != "unmoved")


def test_one_dimensional_tensors_have_neither_decay_nor_trust_ratio():
    params = parameters()
    for p in params.values():
        p.grad = torch.zeros_like(p)
    LARS(params.values(), 10.0, weight_decay=0.5).step()
    for k, p in params.items():  # decay alone: lr * trust * p, whatever the decay's size
        moved = not torch.equal(p, parameters()[k])
        assert moved == (p.ndim > 1 and k != "zero"), k
    close(params["weight"], parameters()["weight"] * (1 - 10 * 0.001), 1e-5, 1e-6)


def test_groups_have_their_own_settings_and_the_state_is_resumed():
    def fresh():
        params = list(parameters().values())
        return params, LARS([{"params": params[:2], "weight_decay": 0.1}, {"params": params[2:], "lr": 0.1}], 1.0)

    def steps(params, optimizer, first, last):
        for step in range(first, last):
            for p, g in zip(params, gradients(step).values(), strict=False):
                p.grad = g
            optimizer.step()

    whole, a = fresh()
    steps(whole, a, 0, 4)
    half, b = fresh()
    steps(half, b, 0, 2)
    again, c = fresh()
    for p, q in zip(again, half, strict=True):
        p.data.copy_(q.data)
    c.load_state_dict(b.state_dict())
    steps(again, c, 2, 4)
    assert all(torch.equal(p, q) for p, q in zip(whole, again, strict=True))
    assert c.param_groups[1]["lr"] == 0.1 and c.param_groups[0]["weight_decay"] == 0.1
