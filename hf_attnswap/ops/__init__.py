"""The computations behind the variants, on tensors `[batch, heads, sequence, dimension]`.

Each folder is one op: `__init__.py` says what the op computes and is what variants call; every other file whose name
does not begin with an underscore is a form of the op for the backend of that name: `reference.py` (the formula over
whole matrices), `torch.py` (portable and fast), and native kernels such as `cpu.py` and `triton.py` where there are
any. `backends.py` finds the forms and chooses. The files beside the folders are helpers that several ops share.

Nothing in this package knows transformers or which variant calls. What a variant has to say about its weights or its
feature map comes as an `Activation` or a `FeatureMap` (`spec.py`).
"""

import importlib
import pkgutil

from . import backends

for _entry in pkgutil.iter_modules(__path__):
    if _entry.ispkg:
        importlib.import_module(f"{__name__}.{_entry.name}")
backends.read_environment()
