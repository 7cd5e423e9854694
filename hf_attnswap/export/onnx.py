"""Write a converted model as one ONNX graph, which onnxruntime runs: a text, or the next tokens of one."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import UsageError
from ..ops.nodes import DOMAIN, making_graph
from .program import Program

OPSET = 21
FILE = "model.onnx"
# Bytes of weights that stand in a file beside it: protobuf holds 2 GiB.
MOST_INSIDE = 3 << 29
NEEDED = ("onnx", "onnxscript")


def require_packages() -> None:
    """Raise UsageError where a package is missing that an export needs."""
    for name in NEEDED:
        try:
            __import__(name)
        except ImportError:
            raise UsageError(f"an export to ONNX needs the package {name}: pip install 'hf_attnswap[onnx]'") from None


@torch.no_grad()
def export(model: PreTrainedModel, folder: Path) -> Program:
    """Write `model.onnx` into a folder, and return the program that it holds.

    The inputs are input_ids and attention_mask, int64 `[batch, length]`, of the new tokens, and `past.NAME` for what is
    remembered; the outputs are those of the model and `present.NAME`, which are the next `past.NAME`. At the start of a
    text these are zeros, of size 0 where the size is called past. Padding stands before the first token of a text; an
    encoder has none of these tensors, and its padding may stand anywhere.

    Args:
        model: in float32, on the CPU, in eval mode.

    Raises:
        UsageError: a model of another kind, or packages that are missing.
    """
    require_packages()
    program = Program(model)
    names = [tensor.name for tensor in program.remembered]
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    sizes = {"batch": batch, "past": past}
    tokens = {0: batch, 1: length}
    shapes = [{i: sizes[size] for i, size in enumerate(t.shape) if size in sizes} for t in program.remembered]
    given = torch.ones(2, 5, dtype=torch.long)
    inputs = given, given.clone(), [tensor.empty(2, 7) for tensor in program.remembered]
    with making_graph(), _quiet():
        exported = torch.export.export(
            program, inputs, dynamic_shapes=(tokens, tokens, shapes), strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )  # fmt: skip
        written = torch.onnx.export(
            exported, (), dynamo=True, opset_version=OPSET, verbose=False,
            input_names=["input_ids", "attention_mask", *(f"past.{name}" for name in names)],
            output_names=[*program.outputs, *(f"present.{name}" for name in names)],
        )  # fmt: skip
    assert written is not None
    _add_functions(written.model)
    _name_sizes(written.model.graph, [("batch", "length")] * 2 + [tensor.shape for tensor in program.remembered])
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    written.save(folder / FILE, external_data=size > MOST_INSIDE)
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch says of itself and of packages that no graph needs."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        log.setLevel(before)


def _add_functions(model: Any) -> None:
    """Add to a graph those functions of this package that it calls."""
    import onnx_ir

    from .functions import FUNCTIONS

    for name in sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        function = onnx_ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        model.functions[function.identifier()] = function


def _name_sizes(graph: Any, inputs: list[tuple[int | str, ...]]) -> None:
    """Call open sizes by their names, in place of torch's symbols, wherever a shape has them.

    Args:
        inputs: of each input, its shape with names for what is open.
    """
    import onnx_ir

    # An input that the model does not use is not there.
    symbols = {
        str(found): name
        for value, shape in zip(graph.inputs, inputs, strict=True)
        for found, name in zip(value.shape, shape, strict=True)
        if isinstance(name, str)
    }

    def named(size: Any) -> int | str:
        known = re.sub(r"s\d+", lambda found: symbols.get(found[0], found[0]), str(size))
        return size if isinstance(size, int) else known

    for value in [*graph.inputs, *(value for node in graph for value in node.outputs)]:
        if value.shape is not None:
            value.shape = onnx_ir.Shape([named(size) for size in value.shape])
