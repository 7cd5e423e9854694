"""The CPU kernels of windows and hybrids against the portable form in float64, in one piece and from states."""

import pytest
import torch
from ops.kernels import draw, each_set, needs_kernels, paired, tensors  # noqa: F401

from hf_attnswap.attentions.elu import ELU
from hf_attnswap.attentions.hedgehog import hedgehog_beside_softmax, hedgehog_features
from hf_attnswap.ops import hybrid, window
from hf_attnswap.ops.spec import FeatureMap

pytestmark = needs_kernels


def drawn(seed):
    """Query, key, value, what stands behind them and last in a call of the hybrid, and where the text is cut."""
    pick, sizes = draw(seed, lengths=(1, 2, 17, 40, 90))
    given = tensors(pick, sizes)
    deltas = [(torch.randn(sizes[h], sizes["dim"], sizes["dim"]) / 4).double() for h in ("heads", "kv_heads")]
    deltas = [d.requires_grad_() for d in deltas]
    hedgehog = [
        FeatureMap("hedgehog", hedgehog_features, tensors={"delta": d}, beside=hedgehog_beside_softmax) for d in deltas
    ]
    maps, learned = ([ELU] * 2, []) if pick.random() < 0.4 else (hedgehog, deltas)
    log_mix = torch.randn(sizes["heads"], dtype=torch.float64).requires_grad_()
    shape = (0.4, pick.choice([1, 3, 8, 30, 200]), pick.choice([0, 1, 4, 9]))
    valid = torch.rand(sizes["batch"], sizes["length"]) > 0.3 if pick.random() < 0.5 else None
    cuts = sorted({0, sizes["length"], *(pick.randrange(sizes["length"] + 1) for _ in range(pick.choice([0, 2])))})
    if pick.random() < 0.3:
        cuts = list(range(min(sizes["length"], 20) + 1))
    decay = -torch.rand(sizes["kv_heads"], dtype=torch.float64)
    tail = None, decay.requires_grad_() if pick.random() < 0.5 else None
    return given, (*maps, log_mix), tail, shape, valid, cuts, learned


def walked(form, given, own, tail, shape, valid, cuts):
    """The output of all pieces together, and the numbers of the last state that mean something."""
    outs, state = [], None
    for start, stop in zip(cuts, cuts[1:], strict=False):
        part = slice(start, stop)
        now = None if valid is None else valid[:, part]
        out, state = form.run(*(t[:, :, part] for t in given), *own, *shape, now, state, True, *tail)
        outs.append(out)
    out = torch.cat(outs, dim=2)
    out = out if valid is None else out * valid[:, None, : out.shape[2], None]
    return [out, state.window.count, state.linear] if own else [out, state.count]


@pytest.mark.parametrize("seed", range(16))
def test_outputs_and_states(each_set, seed):  # noqa: F811
    given, own, tail, *how, _ = drawn(seed)
    with torch.no_grad():
        for op, arguments, last in ((window, (), (None,)), (hybrid, own, tail)):
            ours, expected = (walked(form, given, arguments, last, *how) for form in (op.cpu, op.torch))
            for x, y in zip(ours, expected, strict=True):
                torch.testing.assert_close(x, y)


@pytest.mark.parametrize("seed", range(16))
def test_gradients(each_set, seed):  # noqa: F811
    given, own, tail, shape, valid, _, learned = drawn(seed)
    keep = 1 if valid is None else valid[:, None, :, None]
    learned += [own[-1], *(t for t in tail if t is not None)]
    for op, arguments, last in ((window, (), (None,)), (hybrid, own, tail)):
        leaves = [*given, *(learned if arguments else [])]
        runs = [lambda form=form: [form.run(*given, *arguments, *shape, valid, None, False, *last)[0] * keep]  # noqa: B023
                for form in (op.cpu, op.torch)]  # fmt: skip
        for ours, expected in paired(*runs, leaves):
            torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("seed", range(8))
def test_a_text_without_a_state(seed):
    given, _, _, shape, valid, _, _ = drawn(seed)
    with torch.no_grad():
        more = (*shape, valid, None, False, None)
        ours, expected = (form.run(*given, *more)[0] for form in (window.cpu, window.reference))
    keep = 1 if valid is None else valid[:, None, :, None]
    torch.testing.assert_close(ours * keep, expected * keep)


@pytest.mark.parametrize("window_size, sinks", ((1, 0), (3, 2), (8, 4), (64, 1)))
def test_steps_of_generation(each_set, window_size, sinks):  # noqa: F811
    """Token by token, from a state that is not full until it is, for texts of different lengths in a batch."""
    torch.manual_seed(0)
    given = [torch.randn(2, h, 30, 16, dtype=torch.float64) for h in (6, 2, 2)]
    shape, own = (0.4, window_size, sinks), (ELU, ELU, torch.randn(6, dtype=torch.float64))
    valid = torch.arange(12)[None] >= torch.tensor([0, 9])[:, None]
    with torch.no_grad():
        for op, arguments, last in ((window, (), (None,)), (hybrid, own, (None, -torch.rand(2).double()))):
            found = []
            for form in (op.cpu, op.torch):
                out, state = form.run(*(t[:, :, :12] for t in given), *arguments, *shape, valid, None, True, *last)
                outs = []
                for i in range(12, 30):
                    token = (t[:, :, i : i + 1] for t in given)
                    out, state = form.run(*token, *arguments, *shape, None, state, True, *last)
                    outs.append(out)
                found.append([torch.cat(outs, 2), *([state.linear] if arguments else [])])
            for ours, expected in zip(*found, strict=True):
                torch.testing.assert_close(ours, expected)


def test_inputs_of_half_the_size():
    torch.manual_seed(0)
    given = [torch.randn(1, h, 100, 16) for h in (6, 2, 2)]
    more = (ELU, ELU, torch.zeros(6), 0.25, 8, 2, None, None, False, None, None)
    exact, _ = hybrid.reference.run(*(t.double() for t in given), *more)
    for dtype, tolerance in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)):
        out, _ = hybrid.cpu.run(*(t.to(dtype) for t in given), *more)
        assert out.dtype == dtype
        assert (out.double() - exact).abs().max() < tolerance
