"""Tokens on disk: a corpus is tokenised once, and need not fit in memory."""

import hashlib
import json
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .files import whole_file


def default_folder() -> Path:
    """Return the folder for tokens, beside what `datasets` caches (HF_DATASETS_CACHE)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "attnswap_tokens"


def fingerprint(tokenizer: PreTrainedTokenizerBase, **what: Any) -> str:
    """Return a name that is the same for the same tokenizer and the same `what`, which is JSON."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    everything = json.dumps([type(tokenizer).__name__, vocabulary, what], sort_keys=True)
    return hashlib.sha256(everything.encode()).hexdigest()[:32]


def cached(path: Path, chunks: Iterable[array | np.ndarray]) -> Tensor:
    """Return the numbers of `chunks`, int32 `[n]`, memory-mapped from `path`.

    Where that file is missing, `chunks` is read and the file appears whole.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as stream:
            for chunk in chunks:
                chunk.tofile(stream)
    if path.stat().st_size == 0:
        return torch.empty(0, dtype=torch.int32)
    return torch.from_numpy(np.memmap(path, dtype=np.int32, mode="c"))  # "c": torch warns of what it cannot write to
