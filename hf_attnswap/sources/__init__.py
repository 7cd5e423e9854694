"""Where models, texts and tokens come from, and how files appear whole."""
