"""`python -m hf_attnswap` is `attnswap`."""

from .cli import main

if __name__ == "__main__":
    main()
