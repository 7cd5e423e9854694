"""Build the CPU kernels in place, for a checkout: `python -m hf_attnswap.native`."""

import sys

from . import _loaded, describe
from .build import LIBRARY, build

if __name__ == "__main__":
    reason = build()
    if reason is not None:
        sys.exit(f"the CPU kernels were not built: {reason}")
    _loaded.cache_clear()  # looked for it when it was imported
    print(f"{LIBRARY.name}: {describe()}")
