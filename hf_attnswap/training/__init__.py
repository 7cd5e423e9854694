"""Training of swapped models: losses and steps as functions, a resumable loop on Accelerate."""
