"""Measure time and memory, always beside a control in the same run."""
