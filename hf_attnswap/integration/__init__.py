"""All that touches transformers: its calls, its masks, its caches, its models as they are built, saved and loaded."""
