"""Run an exported graph by onnxruntime, as a program without torch would."""

import numpy as np
import onnxruntime


class Graph:
    """Hold a session of a model, in a file or in memory; `reads` feeds tokens and carries what is remembered."""

    def __init__(self, model: str | bytes):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
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
