"""The CPU kernels of linear attention against the float64 definition, at shapes drawn at random."""

import pytest
import torch
from ops.kernels import draw, each_set, needs_kernels, paired, tensors  # noqa: F401

from hf_attnswap import native
from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.hedgehog import hedgehog_features
from hf_attnswap.attentions.identity import IDENTITY
from hf_attnswap.attentions.relu_kernel import RELU
from hf_attnswap.ops.linear import cpu, reference
from hf_attnswap.ops.spec import FeatureMap

pytestmark = needs_kernels
MAPS = {"elu": ELU, "relu": RELU, "identity": IDENTITY, "another": FeatureMap("sigmoid", torch.sigmoid)}


def arguments(pick, sizes, dtype=torch.float64):
    """Maps and everything behind them, and the matrices that the maps learn."""
    name, learned = pick.choice([*MAPS, "hedgehog", "hedgehog"]), []
    if name == "hedgehog":
        shapes = [(sizes[h], sizes["dim"], sizes["dim"]) for h in ("heads", "kv_heads")]
        learned = [(torch.randn(shape, dtype=dtype) / 4).requires_grad_() for shape in shapes]
        maps = [FeatureMap("hedgehog", hedgehog_features, tensors={"delta": w}) for w in learned]
    else:
        maps = [MAPS[name]] * 2
    eps = pick.choice([1e-3, None]) if name != "identity" else None
    mask = torch.rand(sizes["batch"], sizes["length"]) > 0.3 if pick.random() < 0.5 else None
    features = sizes["dim"] * (2 if name == "hedgehog" else 1)
    state = torch.rand(sizes["batch"], sizes["kv_heads"], features, sizes["value_dim"] + 1, dtype=dtype)
    decay = -torch.rand(sizes["kv_heads"], dtype=dtype) if sizes["length"] and pick.random() < 0.4 else None
    learned += [] if decay is None else [decay.requires_grad_()]
    return (*maps, 0.5, mask, state if pick.random() < 0.5 else None, eps, 64, True, decay), learned


@pytest.mark.parametrize("seed", range(24))
def test_outputs_states_and_gradients(each_set, seed):  # noqa: F811
    pick, sizes = draw(seed)
    leaves = tensors(pick, sizes)
    more, learned = arguments(pick, sizes)
    runs = (lambda: cpu.run(*leaves, *more), lambda: reference.run(*leaves, *more))
    if cpu.unfit(*leaves, *more) is None:
        for ours, expected in paired(*runs, [*leaves, *learned]):
            torch.testing.assert_close(ours, expected)
    with torch.no_grad():  # called without torch's dispatcher
        for ours, expected in zip(runs[0](), runs[1](), strict=True):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("dtype, tolerance", ((torch.float32, 2e-6), (torch.bfloat16, 3e-3), (torch.float16, 1e-3)))
@pytest.mark.parametrize("phi", ("elu", "hedgehog"))
def test_error_over_a_long_text(dtype, tolerance, phi):
    """States and sums are float32: the last rows are as exact as the first."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 3000, 16).to(dtype) for h in (2, 1, 1))
    deltas = [torch.randn(h, 16, 16).to(dtype) / 4 for h in (2, 1)]
    maps = [
        FeatureMap("hedgehog", hedgehog_features, tensors={"delta": d}) if phi == "hedgehog" else ELU for d in deltas
    ]
    more = (*maps, 1.0, None, None, 1e-6, 64, True, None)
    ours = cpu.run(q, k, v, *more)[0].double()
    error = (ours - reference.run(q.double(), k.double(), v.double(), *more)[0]).abs()
    assert error.max() < tolerance * (1 if dtype == torch.float32 else 4)  # of numbers up to 4
    assert error[:, :, -1000:].mean() <= 2 * error[:, :, :1000].mean()


def test_a_state_goes_on_token_by_token(each_set):  # noqa: F811
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 5, 24) for h in (6, 2, 2))
    whole, _, after = cpu.run(q, k, v, ELU, ELU, 1.0, None, None, 1e-6, 64, True, None)
    state = torch.zeros(2, 2, 24, 25)
    for i in range(5):
        kept = state.clone()
        out, _, new = cpu.run(
            *(t[:, :, i : i + 1] for t in (q, k, v)), ELU, ELU, 1.0, None, state, 1e-6, 64, True, None
        )
        torch.testing.assert_close(out, whole[:, :, i : i + 1])
        assert torch.equal(state, kept)  # what a caller holds is left as it is
        state = new
    torch.testing.assert_close(state, after)


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_what_is_no_number_spreads_as_in_the_definition(value):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 20, 8, dtype=torch.float64) for h in (3, 1, 1))
    q[0, 1, 3, 2] = k[0, 0, 9, 1] = value
    for phi in (ELU, RELU):
        ours, expected = (
            form.run(q, k, v, phi, phi, 1.0, None, None, 1e-6, 64, True, None)[0] for form in (cpu, reference)
        )
        torch.testing.assert_close(ours[:, :, :9].isnan(), expected[:, :, :9].isnan())
        assert torch.equal(ours[:, :, 9:].isfinite(), expected[:, :, 9:].isfinite())


def test_more_threads_change_nothing():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 100, 64) for h in (6, 2, 2))
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(cpu.run(q, k, v, ELU, ELU, 1.0, None, None, 1e-6, 64, True, None))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_torch_knows_the_operator():
    """Schema, fake results, autograd, and a program for any length, as torch's own check looks at them."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 5, 8, requires_grad=True) for h in (2, 1, 1))
    given = (q, k, v, None, None, None, None, None, 1, 1.0, 1e-6, False)
    torch.library.opcheck(
        cpu.forward, given, test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


def test_export_sees_the_operator():
    class Layer(torch.nn.Module):
        def forward(self, q, k, v):
            return cpu.run(q, k, v, ELU, ELU, 1.0, None, None, 1e-6, 64, True, None)[0]

    q, k, v = (torch.randn(1, h, 6, 8) for h in (2, 1, 1))
    dims = dict.fromkeys("qkv", {2: torch.export.Dim("n", min=2, max=64)})
    program = torch.export.export(Layer(), (q, k, v), dynamic_shapes=dims)
    assert "hf_attnswap.linear" in program.graph_module.code
    torch.testing.assert_close(program.module()(q, k, v), Layer()(q, k, v))


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv(native.VARIABLE, "mmx")
    native.instruction_set.cache_clear()
    try:
        with pytest.raises(Exception, match="HF_ATTNSWAP_CPU=mmx"):
            native.instruction_set()
    finally:
        native.instruction_set.cache_clear()
