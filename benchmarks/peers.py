"""What the forms of this package are held against beside torch's SDPA, as candidates of hf_attnswap.benchmark."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor


def _per_query_head(query: Tensor, shared: Tensor) -> Tensor:
    """`[B, Hkv, n, D]` -> `[B, H, n, D]`: neither of these knows groups of query heads."""
    return shared.repeat_interleave(query.shape[1] // shared.shape[1], dim=1)


@lru_cache(maxsize=1)
def _future(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


@dataclass(frozen=True)
class Eager:
    """Softmax written out, as the eager attention of transformers: the n x n weights exist."""

    def __call__(self, query, key, value):
        scores = torch.matmul(query, _per_query_head(query, key).transpose(2, 3)) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(_future(query.shape[2]), torch.finfo(scores.dtype).min)
        weights = weights.softmax(-1, dtype=torch.float32).to(query.dtype)
        return torch.matmul(weights, _per_query_head(query, value))

    def step(self, query, key, value) -> Callable[[], Any]:
        new = query[:, :, -1:]

        def attend():
            scores = torch.matmul(new, _per_query_head(new, key).transpose(2, 3)) * new.shape[-1] ** -0.5
            weights = scores.softmax(-1, dtype=torch.float32).to(new.dtype)
            return torch.matmul(weights, _per_query_head(new, value))

        return attend

    @staticmethod
    def nbytes(num_heads: int, length: int) -> int:
        """Of its matrices at their most, forward and backward: about five of float32."""
        return 5 * 4 * num_heads * length**2


class FastTransformers:
    """Causal linear attention with elu + 1 of pytorch-fast-transformers: its own modules around its C++ product.

    It takes `[B, n, H, D]`; views of that order cost nothing, as its own transposition undoes them.

    Raises:
        ImportError: the package is not installed.
    """

    def __init__(self):
        from fast_transformers.attention.causal_linear_attention import CausalLinearAttention
        from fast_transformers.masking import LengthMask, TriangularCausalMask
        from fast_transformers.recurrent.attention import RecurrentLinearAttention

        self.attention, self.recurrent = CausalLinearAttention(64), RecurrentLinearAttention(64)
        self.masks = cache(lambda batch, n: (TriangularCausalMask(n), LengthMask(torch.full((batch,), n))))

    def __call__(self, query, key, value):
        causal, lengths = self.masks(query.shape[0], query.shape[2])
        given = query, _per_query_head(query, key), _per_query_head(query, value)
        return self.attention(*(t.transpose(1, 2) for t in given), causal, lengths, lengths).transpose(1, 2)

    def step(self, query, key, value) -> Callable[[], Any]:
        """Its state is float32 of one size; that after one token takes as long as that after n."""
        query, *shared = (t[:, :, -1] for t in (query, key, value))
        state = None

        def attend():
            nonlocal state
            out, state = self.recurrent(query, *(_per_query_head(query, t) for t in shared), state=state)
            return out

        attend()
        return attend


class OnnxRuntime:
    """Run ONNX Runtime's LinearAttention operator, causal, with as many threads as torch has.

    It takes `[B, n, H D]`; views of that order cost nothing, as they cost nothing where models lay tensors out so.

    Args:
        whole: with the map elu + 1, the sum of the weights as one more column of the values, and the division, as
            operators of one graph; else the operator alone, undivided, which is less than attention.

    Raises:
        ImportError: onnxruntime or onnx is not installed, or onnxruntime has no such operator (before 1.32).
    """

    def __init__(self, whole: bool):
        import onnx  # noqa: F401
        import onnxruntime

        if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 32):
            raise ImportError(f"onnxruntime {onnxruntime.__version__} has no LinearAttention")
        self.whole, self.session = whole, cache(self._session)

    def __call__(self, query, key, value):
        return self._run(query, key, value)[0]

    def step(self, query, key, value) -> Callable[[], Any]:
        state = self._run(query, key, value)[1]
        new = [t[:, :, -1:] for t in (query, key, value)]
        return lambda: self._run(*new, state)

    def _run(self, query, key, value, state=None):
        """Return the output `[B, H, n, Dv]`, and the state as an array."""
        batch, heads, length, dim = query.shape
        feed = {name: t.transpose(1, 2).flatten(2).numpy() for name, t in zip("qkv", (query, key, value), strict=True)}
        feed |= {} if state is None else {"before": state}
        session = self.session(heads, key.shape[1], dim, value.shape[-1], torch.get_num_threads(), state is not None)
        out, state = session.run(None, feed)
        return torch.from_numpy(out).view(batch, length, heads, -1).transpose(1, 2), state

    def _session(self, heads, kv_heads, dim, value_dim, threads, has_state):
        import onnxruntime
        from onnx import TensorProto, helper

        node, described = helper.make_node, helper.make_tensor_value_info
        columns = value_dim + self.whole
        before = ["before"] if has_state else []
        names = ["phi_q", "phi_k", "with_ones", "sums"] if self.whole else ["q", "k", "v", "o"]
        nodes, constants = [], {}
        if self.whole:
            for name in "qk":
                nodes += [node("Elu", [name], [f"elu_{name}"]), node("Add", [f"elu_{name}", "one"], [f"phi_{name}"])]
            constants = {
                "one": 1.0, "eps": 1e-6,
                "by_kv_head": [0, 0, kv_heads, value_dim], "by_head": [0, 0, heads, columns],
                "one_behind": [0] * 7 + [1], "parts": [value_dim, 1],
                "side_by_side": [0, 0, kv_heads * columns], "joined": [0, 0, heads * value_dim],
            }  # fmt: skip
            nodes += [
                node("Reshape", ["v", "by_kv_head"], ["v_by_head"]),
                node("Pad", ["v_by_head", "one_behind", "one"], ["padded"]),
                node("Reshape", ["padded", "side_by_side"], ["with_ones"]),
            ]
        settings = {"q_num_heads": heads, "kv_num_heads": kv_heads, "update_rule": "linear", "scale": 1.0}
        *given, out = names
        nodes += [node("LinearAttention", [*given, *before], [out, "after"], domain="com.microsoft", **settings)]
        if self.whole:
            nodes += [
                node("Reshape", ["sums", "by_head"], ["sums_by_head"]),
                node("Split", ["sums_by_head", "parts"], ["numerator", "weights"], axis=-1),
                node("Add", ["weights", "eps"], ["denominator"]),
                node("Div", ["numerator", "denominator"], ["divided"]),
                node("Reshape", ["divided", "joined"], ["o"]),
            ]
        inputs = {"q": heads * dim, "k": kv_heads * dim, "v": kv_heads * value_dim}
        shapes = {name: ["B", "T", width] for name, width in inputs.items()}
        shapes |= {"before": ["B", kv_heads, dim, columns]} if has_state else {}

        def constant(name: str, x: float | list[int]):
            if isinstance(x, list):
                return helper.make_tensor(name, TensorProto.INT64, [len(x)], x)
            return helper.make_tensor(name, TensorProto.FLOAT, [], [x])

        graph = helper.make_graph(
            nodes, "attention", [described(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
            [described(name, TensorProto.FLOAT, None) for name in ("o", "after")],
            [constant(name, x) for name, x in constants.items()],
        )  # fmt: skip
        sets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        model = helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
