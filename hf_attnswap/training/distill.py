"""Distil the original into the swapped model: match the next-token distribution, and if asked the hidden states.

The logits of a whole text over a whole vocabulary are the largest tensor of such a step, so they are never held at
once: the divergence and its gradient are computed together from the last hidden states, some tokens at a time.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

from ..errors import UsageError
from ..ops.heads import compute_dtype
from .batches import model_inputs, next_tokens
from .teacher import as_original

# All weights, for up to about a million tokens. RADLADS (Goldstein 2025) has 1e-5, for hundreds of millions.
DEFAULT_LEARNING_RATE = 1e-4
DEFAULT_LORA_LEARNING_RATE = 1e-4  # as LoLCATs (Zhang 2024)
# On a CPU, few enough that the logits stay in the cache; on a GPU, as many as five tensors of half a GiB hold.
TOKENS_AT_ONCE = 256
LOGITS_AT_ONCE = 1 << 27
NO_LABEL = -100


def distillation_loss(
    model: nn.Module,
    teacher: nn.Module,
    batch: Tensor | Mapping[str, Tensor],
    *,
    temperature: float = 1.0,
    hidden_weight: float = 0.0,
    label_weight: float = 0.0,
    tokens_at_once: int | None = None,
) -> Tensor:
    """Return `KL(teacher || model) T^2` plus `hidden_weight` times `1 - cos(teacher, model)`, both means over tokens.

    The KL is that of the next token, the cosine that of the hidden states. With a label weight w it is
    `(1 - w) KL + w CE` in place of the KL, with CE the cross-entropy of the token that comes next in the text.

    Args:
        model: the model that trains, as Accelerate prepared it or not.
        teacher: a frozen model of the same vocabulary, swapped or not: softmax runs in its swapped layers. Where only
            LoRA and the variants train, the unwrapped `model` itself: one copy of its weights is then in memory.
        batch: token blocks `[B, n]` (`[B, n, 2]` with separate documents), or what the model takes by name.
        temperature: T, which divides both logits (Hinton 2015).
        hidden_weight: factor of the cosine distance (DistilBERT, Sanh 2019) between the outputs of equal layers, the
            mean over layers. The cosine ignores the scale: in many models the first token is a hundred times as long as
            the others (massive activations, Sun 2024), and would dominate a squared error.
        label_weight: w, from 0 to 1 (Hinton 2015 has it beside the divergence). A token that no other follows, the last
            of a text, has the divergence alone.
        tokens_at_once: for how many tokens logits exist at a time, about five tensors `[tokens_at_once, vocabulary]`;
            as many as suit the device by default.

    Raises:
        UsageError: the weights of the teacher train; its logits are not its output embeddings applied to its last
            hidden states, as in models that cap or scale them; or as `require_weights`.
    """
    require_weights(temperature, hidden_weight, label_weight)
    own = [p for name, p in teacher.named_parameters() if not _added(name)]
    if any(p.requires_grad for p in [*own, *_head(teacher).parameters()]):
        raise UsageError(
            "the teacher's own weights train, so it would not stay the original: give a frozen copy as the teacher"
        )
    inputs = {**model_inputs(batch), "logits_to_keep": 1, "output_hidden_states": True}
    with torch.no_grad(), as_original(teacher):
        target = teacher(**inputs)
    teacher_head = _whole_head(teacher)
    _check_head(teacher_head, target)
    found = model(**inputs).hidden_states
    valid = inputs.get("attention_mask")
    loss = chunked_kl(
        _tokens(found[-1], valid),
        _tokens(target.hidden_states[-1], valid),
        _whole_head(model),
        teacher_head,
        labels=_tokens(_following(inputs), valid) if label_weight else None,
        label_weight=label_weight,
        temperature=temperature,
        tokens_at_once=tokens_at_once,
    )
    if hidden_weight:
        distances = [
            1 - F.cosine_similarity(_tokens(ours, valid).float(), _tokens(theirs, valid).float(), dim=-1).mean()
            for ours, theirs in zip(found[1:], target.hidden_states[1:], strict=True)
        ]
        loss = loss + hidden_weight * torch.stack(distances).mean()
    return loss


def require_weights(temperature: float, hidden_weight: float, label_weight: float) -> None:
    """Check the numbers that `distillation_loss` takes.

    Raises:
        UsageError: one is not finite or out of its range, or the labels have a weight beside a temperature, which is of
            the logits alone.
    """
    if not 0 < temperature < math.inf:
        raise UsageError(f"temperature is {temperature}; expected a number above 0")
    if not 0 <= hidden_weight < math.inf:
        raise UsageError(f"hidden_weight is {hidden_weight}; expected a number of at least 0")
    if not 0 <= label_weight <= 1:
        raise UsageError(f"label_weight is {label_weight}; expected a number from 0 to 1")
    if label_weight and temperature != 1:
        raise UsageError(f"label_weight is {label_weight}, and needs a temperature of 1; it is {temperature}")


def chunked_kl(
    hidden: Tensor,
    teacher_hidden: Tensor,
    head: nn.Module,
    teacher_head: nn.Module,
    *,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    temperature: float = 1.0,
    tokens_at_once: int | None = None,
) -> Tensor:
    """Return the mean over tokens of `KL(teacher || student) T^2` of the next token, computed from hidden states.

    With labels and a weight w, of `(1 - w) KL + w CE`; where the label is -100, of the KL.

    Memory is O(tokens_at_once V) in place of O(N V), for a vocabulary of V tokens. The gradient of a chunk is computed
    along with its divergence, while its logits exist, and kept as the gradient of the hidden states and of the head's
    weights, as in the fused linear cross-entropy of Liger-Kernel (Hsu 2024). So each head is applied once to each
    token. The log-softmax is computed in float32 or above.

    Args:
        hidden: last hidden states of the student, `[N, D]`.
        teacher_hidden: last hidden states of the teacher, `[N, D']`.
        head, teacher_head: modules from these hidden states to logits `[N, V]`.
        labels: the next tokens, int64 `[N]`. label_weight: w.
        temperature: T, which divides both logits.
        tokens_at_once: tokens per chunk; as many as suit the device by default.
    """
    if tokens_at_once is None:
        vocabulary = next(teacher_head.parameters()).shape[0]
        tokens_at_once = TOKENS_AT_ONCE if hidden.device.type == "cpu" else max(256, LOGITS_AT_ONCE // vocabulary)
    weights = [p for p in head.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if labels is None:
        labels = torch.full((len(hidden),), NO_LABEL, device=hidden.device)
    how = labels, label_weight, temperature, tokens_at_once
    total = _SummedKL.apply(hidden, teacher_hidden, head, teacher_head, *how, *weights)
    return total * temperature**2 / len(hidden)


class _SummedKL(torch.autograd.Function):
    """Compute the sum over tokens of `KL(teacher || student)`, whose gradient in the student's logits / T is q - p.

    Cross-entropy has the gradient q - y, so that with both, p is mixed with the labels y.
    """

    @staticmethod
    def forward(
        ctx, hidden, teacher_hidden, head, teacher_head, labels, label_weight, temperature, tokens_at_once, *weights
    ):
        total, of_hidden, of_weights = 0, [], [torch.zeros_like(w) for w in weights]
        parts = (hidden.split(tokens_at_once), teacher_hidden.split(tokens_at_once), labels.split(tokens_at_once))
        for ours, theirs, told in zip(*parts, strict=True):
            target = _log_probabilities(_logits(teacher_head, theirs), temperature)
            ours = ours.detach().requires_grad_()
            with torch.enable_grad():
                logits = _logits(head, ours)
            found = _log_probabilities(logits.detach(), temperature)
            p = target.exp()
            divergence = target.sub_(found).mul_(p).sum(-1)
            if label_weight:
                rows = (told != NO_LABEL).nonzero()[:, 0]
                told = told[rows]
                divergence[rows] = (1 - label_weight) * divergence[rows] - label_weight * found[rows, told]
                p[rows] *= 1 - label_weight
                p[rows, told] += label_weight
            total = total + divergence.sum()
            if any(ctx.needs_input_grad):
                slope = found.exp_().sub_(p).to(logits.dtype)
                own, *others = torch.autograd.grad(logits, [ours, *weights], slope)
                of_hidden.append(own)
                for so_far, more in zip(of_weights, others, strict=True):
                    so_far += more
        if of_hidden:
            ctx.temperature = temperature
            ctx.save_for_backward(torch.cat(of_hidden), *of_weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        of_hidden, *of_weights = (gradient * (grad_output / ctx.temperature) for gradient in ctx.saved_tensors)
        return of_hidden, None, None, None, None, None, None, None, *of_weights


def _log_probabilities(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(compute_dtype(logits.dtype))
    return F.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _tokens(hidden: Tensor, valid: Tensor | None) -> Tensor:
    return hidden.flatten(0, 1) if valid is None else hidden[valid.bool()]


def _following(inputs: Mapping[str, Any]) -> Tensor:
    """Return the token that follows each one, int64 `[B, n]`; -100 at the last of a text and before padding."""
    labels = next_tokens(inputs)
    valid = inputs.get("attention_mask")
    if valid is not None:
        labels = labels.masked_fill(~valid.bool(), NO_LABEL)
    return F.pad(labels[:, 1:], (0, 1), value=NO_LABEL)


def _head(model: nn.Module) -> nn.Module:
    model = getattr(model, "module", model)  # what DDP wraps
    return model.get_output_embeddings()


def _whole_head(model: nn.Module) -> nn.Module:
    """Return the head after a forward pass, under FSDP2 with whole weights: the backward pass shares out the gradient.

    The weights of the head are in its own group or in that of the model, which has them whole after its forward pass
    already, unless it is told to give them back.
    """
    head = _head(model)
    for part in (model, head):
        if isinstance(part, FSDPModule):
            part.unshard()
    return head


def _logits(head: nn.Module, hidden: Tensor) -> Tensor:
    """Apply the head without the hooks of FSDP2, which would gather and give back its weights for every chunk."""
    return head.forward(hidden) if isinstance(head, FSDPModule) else head(hidden)


def _added(name: str) -> bool:
    return ".attnswap." in name or ".lora_" in name


def _check_head(head: nn.Module, output) -> None:
    with torch.no_grad():
        found = _logits(head, output.hidden_states[-1][:, -1:]).float()
    wanted = output.logits.float()
    close = (found - wanted).abs().max() <= 1e-3 * wanted.abs().max()
    if not close and wanted.isfinite().all():
        raise UsageError(
            "the logits of the teacher are not its output embeddings applied to its last hidden states (it caps or "
            "scales them), which distillation relies on: use finetune instead"
        )
