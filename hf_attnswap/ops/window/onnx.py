"""Write window attention as a call of the function BandedSoftmax of an ONNX graph."""

from ..banded import banded_softmax
from ..nodes import unfit  # noqa: F401


def run(query, key, value, scaling, window, sinks, valid, state, keep_state, reach):
    """Return what `window_attention` returns, the state with all its slots; takes the arguments in order."""
    (numerator, denominator, _), after = banded_softmax(query, key, value, scaling, window, sinks, valid, state)
    return (numerator / denominator).to(query.dtype), after if keep_state else None
