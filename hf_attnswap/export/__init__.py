"""Write converted models for programs that run without Python: `attnswap export`."""
