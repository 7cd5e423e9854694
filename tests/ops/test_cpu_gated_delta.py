"""The CPU kernels of gated linear attention and of the delta rule against the token-by-token definition in float64."""

import pytest
import torch
import torch.nn.functional as F
from ops.kernels import draw, each_set, needs_kernels, paired, tensors  # noqa: F401

from hf_attnswap.ops.delta import cpu as delta
from hf_attnswap.ops.delta import reference as delta_reference
from hf_attnswap.ops.gated import cpu as gated
from hf_attnswap.ops.gated import reference as gated_reference

pytestmark = needs_kernels


@pytest.mark.parametrize("seed", range(10))
def test_gated(each_set, seed):  # noqa: F811
    pick, sizes = draw(seed)
    given = tensors(pick, sizes)
    gate = F.logsigmoid(torch.randn(sizes["batch"], sizes["kv_heads"], sizes["length"], dtype=torch.float64))
    leaves = [*given, gate.requires_grad_()]
    state = torch.rand(sizes["batch"], sizes["kv_heads"], sizes["dim"], sizes["value_dim"] + 1, dtype=torch.float64)
    more = (state if pick.random() < 0.5 else None, pick.choice([None, 1e-3]), 64)

    def run(form):
        return form.run(given[0].exp(), given[1].exp(), given[2], gate, *more)

    if sizes["length"]:
        for ours, expected in paired(lambda: run(gated), lambda: run(gated_reference), leaves):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("seed", range(10))
def test_delta(each_set, seed):  # noqa: F811
    pick, sizes = draw(seed, lengths=(1, 2, 8, 9, 33, 70))
    q, k, v = (t.detach() for t in tensors(pick, sizes))
    beta = torch.rand(sizes["batch"], sizes["kv_heads"], sizes["length"], dtype=torch.float64)
    state = torch.rand(sizes["batch"], sizes["kv_heads"], sizes["dim"], sizes["value_dim"], dtype=torch.float64)
    arguments = (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, beta, state if pick.random() < 0.5 else None, 64)
    for ours, expected in zip(delta.run(*arguments), delta_reference.run(*arguments), strict=True):
        torch.testing.assert_close(ours, expected)
