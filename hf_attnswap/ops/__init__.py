"""Compute attention on plain tensors `[batch, heads, sequence, dimension]`.

Each folder is one op. The folder's `__init__.py` says what the op computes and holds the function that variants call.
Every other file whose name does not begin with an underscore is a form of the op, for the backend of that name:
`reference.py` (the formula over whole matrices), `torch.py` (portable and fast), and native kernels such as `cpu.py`
and `triton.py` where there are any. `backends.py` lists the forms and chooses one for each call. The files beside the
folders are helpers that several ops share.

The letters in shapes: B texts in a batch, H query heads, Hkv key/value heads with H a multiple of Hkv, G = H / Hkv
query heads in a group, T queries, S keys, t or s of them in a tile or block, D numbers of a query or key, Dv of a
value, F features, c chunks. In costs, n is the number of tokens and d the width of a head.

Nothing in this package imports transformers or knows which variant calls. A variant describes its weights or its
feature map as an `Activation` or a `FeatureMap` (`spec.py`).
"""

import importlib
import pkgutil

for _entry in pkgutil.iter_modules(__path__):
    if _entry.ispkg:
        importlib.import_module(f"{__name__}.{_entry.name}")
