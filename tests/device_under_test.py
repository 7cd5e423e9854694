"""The device that the tests of attention, masks, models and generation run on: ATTNSWAP_TEST_DEVICE, or the CPU."""

import os
import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

DEVICE = torch.device(os.environ.get("ATTNSWAP_TEST_DEVICE", "cpu"))
# Paths below tests/ that run on any device; all others need the CPU alone.
FILES = (
    "attentions/", "masks/", "ops/", "integration/test_models.py", "integration/test_generation.py",
    "integration/test_kinds.py",
)  # fmt: skip
# Of these, what is about the forms that there are for the CPU.
OF_THE_CPU = ("ops/test_backends.py",)
TESTS = str(Path(__file__).parent)


class OnDevice(TorchFunctionMode):
    """Make the tensors of test files on `DEVICE`, where they name no device.

    The package and transformers get no such help: a tensor that they make beside the device raises. Random numbers of a
    generator are drawn where the generator is and moved, so that they are the same on every device.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function not in _device_constructors() or kwargs.get("device") is not None or not _in_a_test():
            return function(*args, **kwargs)
        if kwargs.get("generator") is None:
            return function(*args, **kwargs, device=DEVICE)
        requires_grad = kwargs.pop("requires_grad", False)
        return function(*args, **kwargs).to(DEVICE).requires_grad_(requires_grad)


def _in_a_test() -> bool:
    return sys._getframe(2).f_code.co_filename.startswith(TESTS)
