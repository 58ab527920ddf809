"""The fast product is torch's, with its gradients, whatever the shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from thornback.engine.linear import FastLinear, use_fast_products


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 3, 96), (1, 200, 96), (4, 50, 96)])
def test_values_and_gradients_are_those_of_torch(shape, bias) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(96, 160, bias=bias)
    fast = nn.Sequential(nn.Linear(96, 160, bias=bias))
    fast[0].load_state_dict(plain.state_dict())
    use_fast_products(fast)
    assert type(fast[0]) is FastLinear
    results = []
    for module in (plain, fast):
        x = torch.linspace(-1, 1, 96 * shape[0] * shape[1]).sin().view(shape).requires_grad_()
        out = module(x)
        (out * out).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(module(x), out, rtol=1e-4, atol=1e-5)
        results.append([out, x.grad, *(p.grad for p in module.parameters())])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)


def test_ties_and_read_only_views_survive() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(2048, 64), "head": nn.Linear(64, 2048, bias=False)})
    model["head"].weight = model["embed"].weight
    use_fast_products(model)
    assert model["head"].weight is model["embed"].weight
    view = torch.arange(2048 * 64, dtype=torch.float32).view(2048, 64) / 1e5
    model["embed"].weight.data = view
    with torch.inference_mode():
        out = model["head"](torch.ones(32, 64))
    assert model["head"].weight.data_ptr() == view.data_ptr()
    torch.testing.assert_close(out[0], view.sum(1), rtol=1e-4, atol=1e-4)
