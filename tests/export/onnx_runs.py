"""Run an exported graph, or single nodes of one, by onnxruntime, as a program without torch would."""

from functools import cache

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper

from hf_attnswap.export.functions import FUNCTIONS

KINDS = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64, torch.bool: TensorProto.BOOL}


def session_of(model: str | bytes) -> onnxruntime.InferenceSession:
    """A session of a model, in a file or in memory, on one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Graph:
    """Hold a session of model.onnx; `reads` feeds tokens and carries what is remembered."""

    def __init__(self, model: str):
        self.session = session_of(model)
        self.past = {i.name: i for i in self.session.get_inputs() if i.name.startswith("past.")}
        self.outputs = [o.name for o in self.session.get_outputs()]

    def empty(self, batch: int) -> dict:
        """What is remembered of no token."""
        sizes, kinds = {"batch": batch, "past": 0}, {"tensor(int64)": np.int64, "tensor(float)": np.float32}
        return {name: np.zeros([sizes.get(s, s) for s in i.shape], kinds[i.type]) for name, i in self.past.items()}

    def reads(self, ids, mask, past: dict) -> tuple[dict, dict]:
        """The outputs of these tokens by name, and what is remembered after them."""
        feed = {"input_ids": np.asarray(ids), "attention_mask": np.asarray(mask), **past}
        found = dict(zip(self.outputs, self.session.run(None, feed), strict=True))
        return found, {name: found.pop(name.replace("past.", "present.", 1)) for name in past}


@cache
def _session_of_node(name: str, kinds: tuple, attributes: tuple, outputs: int) -> onnxruntime.InferenceSession:
    domain, _, op = name.partition("::")
    inputs = [f"in{i}" if kind is not None else "" for i, kind in enumerate(kinds)]
    node = helper.make_node(op, inputs, [f"out{i}" for i in range(outputs)], domain=domain, **dict(attributes))
    described = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "node",
        [described(n, KINDS[kind[0]], [None] * kind[1]) for n, kind in zip(inputs, kinds, strict=True) if n],
        [described(n, TensorProto.FLOAT, None) for n in node.output],
    )  # fmt: skip
    functions = [FUNCTIONS[op].to_function_proto()] if op in FUNCTIONS else []
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(domain, 1)]
    model = helper.make_model(graph, functions=functions, opset_imports=sets, ir_version=10)
    return session_of(model.SerializeToString())


def run_node(name, inputs, attributes=None, *, dtypes, shapes, version):
    """What onnxruntime makes of one node; stands in for `torch.onnx.ops.symbolic_multi_out`."""
    kinds = tuple(None if t is None else (t.dtype, t.dim()) for t in inputs)
    session = _session_of_node(name, kinds, tuple((attributes or {}).items()), len(shapes))
    feed = {f"in{i}": t.detach().contiguous().numpy() for i, t in enumerate(inputs) if t is not None}
    found = [torch.from_numpy(out) for out in session.run(None, feed)]
    assert [tuple(t.shape) for t in found] == [tuple(shape) for shape in shapes]
    return found
