"""Write a converted model as one ONNX graph, which onnxruntime runs: a text, or the next token of one."""

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UsageError
from ..ops import backends, nodes
from .program import FORMS, Program

OPSET = 21
FILE = "model.onnx"
# Above this, protobuf cannot hold the weights.
LARGEST = 3 << 29


@torch.no_grad()
def export(model: PreTrainedModel, folder: Path) -> Program:
    """Write `model.onnx` into a folder, and return the program that it holds.

    The inputs are input_ids and attention_mask, int64 `[batch, length]`, of the new tokens, and `past.NAME` for what is
    remembered; the outputs are those of the model and `present.NAME`, which are the next `past.NAME`. At the start of a
    text all of these are zeros, of size 0 where the size is called past. Padding stands before the first token of a
    text, or behind the last where the model is an encoder.

    Args:
        model: in float32, on the CPU.

    Raises:
        UsageError: a model of another kind, or packages that are missing.
    """
    try:
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UsageError(f"an export needs {error.name}: pip install 'hf_attnswap[onnx]'") from None
    program = Program(model.eval())
    names = [tensor.name for tensor in program.remembered]
    batch, length, past = (torch.export.Dim(name) for name in ("batch", "length", "past"))
    tokens, sizes = {0: batch, 1: length}, {"batch": batch, "past": past}
    shapes = [{i: sizes[s] for i, s in enumerate(t.shape) if s in sizes} for t in program.remembered]
    given = torch.ones(2, 5, dtype=torch.long)
    inputs = given, given.clone(), [tensor.empty(2, 7) for tensor in program.remembered]
    with backends.backend(FORMS):
        written = _graph(
            program, inputs, (tokens, tokens, shapes),
            input_names=["input_ids", "attention_mask", *(f"past.{name}" for name in names)],
            output_names=[*program.outputs, *(f"present.{name}" for name in names)],
        )  # fmt: skip
    _add_functions(written.model)
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    written.save(folder / FILE, external_data=size > LARGEST)
    return program


def _graph(program: nn.Module, inputs, shapes, **names):
    """Return the graph of a program whose open sizes are given."""
    import time; t = time.process_time()
    exported = torch.export.export(program, inputs, dynamic_shapes=shapes, strict=False, prefer_deferred_runtime_asserts_over_guards=True)
    print("export", time.process_time() - t); t = time.process_time()
    out = torch.onnx.export(exported, (), dynamo=True, opset_version=OPSET, verbose=False, **names)
    print("onnx", time.process_time() - t)
    return out


def _add_functions(model) -> None:
    """Add to a graph those functions of this package that it calls."""
    import onnx_ir

    from .functions import FUNCTIONS

    for name in {node.op_type for node in model.graph if node.domain == nodes.DOMAIN}:
        function = onnx_ir.serde.deserialize_function(FUNCTIONS[name].to_function_proto())
        model.functions[function.identifier()] = function
