"""How good a model is: perplexity, with its uncertainty."""
