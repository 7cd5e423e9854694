"""Functions of the graphs that an export writes, in the words of ONNX; they need the package onnxscript."""

from onnxscript import opset21 as op
from onnxscript import script
from onnxscript.values import Opset

from ..ops.nodes import DOMAIN

CHUNK = 64
LOWEST = -3.4028234663852886e38


@script(Opset(DOMAIN, 1), default_opset=op)
def BandedSoftmax(q, k, v, valid, old_key, old_value, count, window: int, sinks: int, scaling: float):
    """Return the parts of a softmax over the last `window` keys and the first `sinks`, and what to remember.

    `ops/banded.py` has the shapes. One function serves a whole text (chunks of up to 64 rows, each over its tokens and
    the w before them) and one token (a chunk of one row). Padding stands before the first token of a text, so that
    nothing has to be sorted. In shapes, m is the number of sinks, c the number of chunks, r the rows of each, and a
    chunk sees the m sinks and t = r + w - 1 slots.
    """
    w = op.Constant(value_int=window)
    m = op.Constant(value_int=sinks)
    factor = op.Constant(value_float=scaling)
    first_recent = op.Reshape(m, [-1])
    last_recent = op.Neg(op.Reshape(w, [-1]))
    length = op.Shape(k, start=2, end=3)
    end = op.Constant(value_ints=[9223372036854775807])
    dim = op.Shape(k, start=3, end=4)
    value_dim = op.Shape(v, start=3, end=4)
    # The position of row i in its text is i + before; that of slot u, of the last w tokens and the new ones, is w less.
    valid_tokens = op.ReduceSum(op.Cast(valid, to=7), [1], keepdims=1)
    before = op.Unsqueeze(count, [1]) + valid_tokens - length

    # The token of a sink stands among the new ones, unless it is there already.
    sink = op.Range(0, m, 1)
    source = op.Unsqueeze(op.Max(op.Min(sink - before, length - 1), 0), [1, 3])
    known = op.Unsqueeze(op.Less(sink, op.Unsqueeze(count, [1])), [1, 3])
    old_sink_key = op.Slice(old_key, [0], first_recent, [2])
    old_sink_value = op.Slice(old_value, [0], first_recent, [2])
    new_sink_key = op.GatherElements(k, op.Expand(source, op.Shape(old_sink_key)), axis=2)
    new_sink_value = op.GatherElements(v, op.Expand(source, op.Shape(old_sink_value)), axis=2)
    sink_key = op.Where(known, old_sink_key, new_sink_key)
    sink_value = op.Where(known, old_sink_value, new_sink_value)
    key = op.Concat(sink_key, op.Slice(old_key, first_recent, end, [2]), k, axis=2)
    value = op.Concat(sink_value, op.Slice(old_value, first_recent, end, [2]), v, axis=2)

    # Row i stands in slot w + i, and sees the slots from i + 1 to there.
    size = op.Min(length, CHUNK)
    chunks = (length + size - 1) / size
    more = chunks * size - length
    width = size + w - 1
    row = op.Unsqueeze(op.Range(0, op.Squeeze(size), 1), [1])
    start = op.Unsqueeze(op.Range(0, op.Squeeze(chunks), 1), [1]) * size
    column = op.Range(0, op.Squeeze(width), 1)
    slot = start + column + 1
    band = op.And(op.GreaterOrEqual(column, row), op.Less(column, row + w))
    position = op.Unsqueeze(slot - w, [0]) + op.Unsqueeze(before, [2])
    near = op.And(band, op.Unsqueeze(op.GreaterOrEqual(position, m), [2]))
    own = op.Unsqueeze(start, [0, 3]) + op.Unsqueeze(row, [0, 1]) + op.Unsqueeze(before, [2, 3])
    seen = op.Unsqueeze(op.Concat(op.LessOrEqual(sink, own), near, axis=-1), [1, 3])
    sinks_of_chunks = op.Expand(op.Unsqueeze(sink, [0]), op.Concat(chunks, [1], axis=0))
    last = op.Shape(key, start=2, end=3) - 1
    columns = op.Min(op.Concat(sinks_of_chunks, slot + m, axis=1), last)

    nothing = op.Constant(value_ints=[0, 0, 0, 0, 0, 0, 0, 0])
    rows = op.Pad(q * factor, op.Concat(nothing, more, [0], axis=0))
    rows = op.Reshape(rows, op.Concat([0, 0, 0], chunks, size, dim, axis=0))
    rows = op.Reshape(op.Transpose(rows, perm=[0, 1, 3, 2, 4, 5]), op.Concat([0, 0, 0, -1], dim, axis=0))
    seen_key = op.Transpose(op.Gather(key, columns, axis=2), perm=[0, 1, 2, 4, 3])
    by_rows = op.Concat([0, 0, 0, -1], size, width + m, axis=0)
    s = op.Where(seen, op.Reshape(op.MatMul(rows, seen_key), by_rows), LOWEST)
    peak = op.ReduceMax(s, [-1])
    e = op.Exp(s - peak)
    total = op.ReduceSum(e, [-1])
    joined = op.Reshape(e, op.Concat([0, 0, 0, -1], width + m, axis=0))
    mixed = op.MatMul(joined, op.Gather(value, columns, axis=2))
    mixed = op.Reshape(mixed, op.Concat([0, 0, 0, -1], size, value_dim, axis=0))

    numerator = op.Reshape(op.Transpose(mixed, perm=[0, 1, 3, 2, 4, 5]), op.Concat([0, 0, 0, -1], value_dim, axis=0))
    denominator = op.Reshape(op.Transpose(total, perm=[0, 1, 3, 2, 4, 5]), [0, 0, 0, -1, 1])
    maximum = op.Reshape(op.Transpose(peak, perm=[0, 1, 3, 2, 4, 5]), [0, 0, 0, -1, 1])
    numerator = op.Slice(numerator, [0], length, [3])
    denominator = op.Slice(denominator, [0], length, [3])
    maximum = op.Slice(maximum, [0], length, [3])
    new_key = op.Concat(sink_key, op.Slice(key, last_recent, end, [2]), axis=2)
    new_value = op.Concat(sink_value, op.Slice(value, last_recent, end, [2]), axis=2)
    return numerator, denominator, maximum, new_key, new_value


FUNCTIONS = {"BandedSoftmax": BandedSoftmax}
