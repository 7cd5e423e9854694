"""Launching a kernel: Triton looks for the compiled one once for arguments of the same kinds."""

from types import SimpleNamespace

import pytest
import torch

from hf_attnswap.ops import gpu


class Kernel:
    """A kernel of two arguments and two constants that notes how it was launched."""

    arg_names = ("X", "n", "FIRST", "SECOND")

    def __init__(self):
        self.compiled, self.launched = [], []

    def __getitem__(self, grid):
        def compile_and_run(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Compiled(self)

        return compile_and_run


class Compiled:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


@pytest.fixture
def launch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gpu, "_compiled", {})
    like = SimpleNamespace(device=SimpleNamespace(type="cuda", index=0))
    kernel = Kernel()

    def run(x, n, **constants):
        gpu.launch(kernel, (5, 2), like, x, n, **constants)
        return len(kernel.compiled), kernel.launched[-1:]

    return run


def test_arguments_of_the_same_kinds_share_a_kernel(launch):
    x = torch.zeros(64)
    assert launch(x, 3, num_warps=4, SECOND=7, FIRST=1) == (1, [])
    # The grid has three parts and the constants stand in the order of the kernel.
    assert launch(torch.ones(64), 5, num_warps=4, SECOND=7, FIRST=1)[1][0][0] == (5, 2, 1)
    found, ((_, arguments),) = launch(x, 5, num_warps=4, SECOND=7, FIRST=1)
    assert found == 1 and arguments[0] is x and arguments[1:] == (5, 1, 7)


@pytest.mark.parametrize(
    "other",
    [
        lambda x: (x.half(), 3, {}), lambda x: (x[1:], 3, {}), lambda x: (x, 1, {}), lambda x: (x, 32, {}),
        lambda x: (x, 1 << 40, {}), lambda x: (x, 3, {"FIRST": 2}), lambda x: (x, 3, {"num_warps": 8}),
    ],
)  # fmt: skip
def test_other_kinds_have_a_kernel_of_their_own(launch, other):
    x = torch.zeros(64)
    constants = dict(num_warps=4, SECOND=7, FIRST=1)
    launch(x, 3, **constants)
    x, n, more = other(x)
    assert launch(x, n, **constants | more)[0] == 2
