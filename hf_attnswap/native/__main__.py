"""Build the CPU kernels in place, for a checkout: `python -m hf_attnswap.native`.

`--sanitize` builds them with AddressSanitizer and UndefinedBehaviorSanitizer, for `make sanitize`.
"""

import sys

from . import _loaded, describe
from .build import LIBRARY, SANITIZERS, build

if __name__ == "__main__":
    reason = build(flags=SANITIZERS if sys.argv[1:] == ["--sanitize"] else [])
    if reason is not None:
        sys.exit(f"the CPU kernels were not built: {reason}")
    if sys.argv[1:] != ["--sanitize"]:  # these cannot be loaded without the sanitizers' library
        _loaded.cache_clear()  # looked for it when it was imported
        print(f"{LIBRARY.name}: {describe()}")
