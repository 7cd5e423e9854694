"""Train swapped models: losses and steps as functions, and a resumable loop on Accelerate."""
