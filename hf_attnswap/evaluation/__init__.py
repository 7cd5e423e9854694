"""Measure how good a model is, swapped or not: perplexity, tasks, checks and diagnostics."""
