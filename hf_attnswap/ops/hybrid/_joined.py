"""Join the branches of the hybrid with a gradient, where each has been computed by kernels."""

import torch
from torch import Tensor

from .reference import NO_MASS, log_of_mass, one_for_none


def joined(out: Tensor, lse: Tensor, numerator: Tensor, den: Tensor, log_scale: Tensor) -> Tensor:
    """Return the output of both branches, `[B, H, T, Dv]`.

    Args:
        out, lse: output of the softmax, `[B, H, T, Dv]`, and log of its mass, `[B, H, T]`. numerator, den: of the
            linear branch. log_scale: `[B, H, T]`, log of the factor of the linear branch.
    """
    none = den <= NO_MASS
    mass = (log_scale + log_of_mass(den)).masked_fill(none, torch.finfo(den.dtype).min)
    lead = (lse - mass)[..., None]
    return out * torch.sigmoid(lead) + numerator * (torch.sigmoid(-lead) / one_for_none(den)[..., None])
