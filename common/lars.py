"""LARS (You, Gitman, Ginsburg 2017, arXiv:1708.03888): a weight's step is scaled to the weight's own norm."""

import torch


class LARS(torch.optim.Optimizer):
    """For each weight p with gradient g, as MoCo v3, BYOL and Barlow Twins have it:

        d = g + weight_decay p;    q = trust |p| / |d|, or 1 where a norm is 0
        v = momentum v + q d;      p = p - lr v

    Tensors of at most one dimension (biases, scales and shifts of BN) have neither decay nor q: d = g, q = 1.
    adapt_1d=True treats them as weights, as apex's LARC in the linear probes of SimSiam and of the paper did
    (with its other rule of decay, of which those probes had none).
    classic=True is SimCLR's momentum: v = momentum v + lr q d; p = p - v."""

    def __init__(self, params, lr, momentum=0.9, weight_decay=0, trust=0.001, adapt_1d=False, classic=False):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay, trust=trust,
                                      adapt_1d=adapt_1d, classic=classic))

    @torch.no_grad()
    def step(self):
        """One update; tensors of a group are treated together, which is faster than one by one on a GPU."""
        for group in self.param_groups:
            for scaled in (True, False):
                params = [p for p in group["params"] if p.grad is not None
                          and (p.ndim > 1 or group["adapt_1d"]) == scaled]
                if not params:
                    continue
                d = [p.grad for p in params]
                if scaled:
                    d = torch._foreach_add(d, params, alpha=group["weight_decay"])
                    p_norm, d_norm = (torch.stack(torch._foreach_norm(x)) for x in (params, d))
                    q = torch.where((p_norm > 0) & (d_norm > 0), group["trust"] * p_norm / d_norm, 1.0)
                    d = torch._foreach_mul(d, q.unbind())
                for p in params:
                    if "velocity" not in self.state[p]:
                        self.state[p]["velocity"] = torch.zeros_like(p)
                v = [self.state[p]["velocity"] for p in params]
                inside, outside = (group["lr"], 1.0) if group["classic"] else (1.0, group["lr"])
                torch._foreach_mul_(v, group["momentum"])
                torch._foreach_add_(v, d, alpha=inside)
                torch._foreach_add_(params, v, alpha=-outside)
