"""Alignment: every swapped layer learns to reproduce the softmax output of its layer.

Teacher and student share one forward pass: where the model calls its attention, softmax runs as well, its result
flows on, and the variant is compared with it on the same query, key and value. No second model is in memory, layers
do not disturb each other, and only the variants' parameters get gradients (attention transfer of LoLCATs, Zhang 2024).

Variants without parameters have nothing to learn there. For them the projections around the attention learn, so that
the output of the whole module is that of the softmax module (the first step of RADLADS, Goldstein 2025). There the
teacher is a frozen copy of the attention modules, not of the model.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import Cache

from ..attentions import Attention, Heads, get
from ..attentions.hybrid import Hybrid
from ..errors import UsageError
from ..integration.swapping import swapped_modules
from ..masks import Mask
from ..ops.heads import compute_dtype
from .batches import model_inputs
from .teacher import frozen, softmax_flows_on

DEFAULT_LEARNING_RATE = 1e-2  # as LoLCATs
DEFAULT_PROJECTIONS_LEARNING_RATE = 1e-3  # to 1e-5, as RADLADS


class LayerLosses(dict[str, Tensor]):
    """Loss of each layer, by the path of its module, in the last forward pass: mean squared error over the variance of
    the softmax output, and the divergence of the weights where that is asked for.

    Attributes:
        valid: which tokens of the batch count, `[B, T]`; None for all.
        packed: whether the rows of the batch hold several texts each, which then count by their tokens. Else all rows
            count the same. Either way it does not matter how rows are batched.
    """

    valid: Tensor | None = None
    packed: bool = False

    def __init__(self):
        super().__init__()
        self._texts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, layer: str, errors: Tensor, tokens: Tensor) -> None:
        """Bring in some texts of the batch: their errors and their numbers of tokens, `[b]` each."""
        seen = self._texts.setdefault(layer, [])
        seen.append((errors, tokens if self.packed else torch.ones_like(tokens)))
        errors, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
        self[layer] = (errors * weights).sum() / weights.sum()

    def clear(self) -> None:
        super().clear()
        self._texts.clear()

    def mean(self) -> Tensor:
        """The same weight for every layer."""
        return torch.stack(list(self.values())).mean()


@contextmanager
def aligning(model: nn.Module, linear_branch_alone: bool = False, weights_loss: float = 0.0) -> Iterator[LayerLosses]:
    """While this is open, a forward pass runs softmax everywhere and fills the losses of the swapped layers.

    Call `losses.clear()` before the next forward pass.

    Args:
        linear_branch_alone: of each `X+window`, compare the linear variant X over all keys. The window gives most of
            the output and leaves X little to learn from; LoLCATs trains X first, and adds the window then.
        weights_loss: how many times `weights_divergence` is added to the error of the outputs.
    """
    losses = LayerLosses()

    def compare(layer, attention, teacher, query, key, value, mask, scaling):
        learner = attention.linear if linear_branch_alone else attention
        student = learner(query, key, value, mask, scaling)
        valid = mask.new_tokens()
        errors = text_errors(student, teacher, valid)
        if weights_loss:
            errors = errors + weights_loss * weights_divergence(learner, query, key, mask, scaling)
        losses.add(layer, errors, torch.full_like(errors, query.shape[2]) if valid is None else valid.sum(1))

    with softmax_flows_on(model, compare):
        yield losses


@contextmanager
def aligning_projections(model: nn.Module) -> Iterator[LayerLosses]:
    """As `aligning`, of whole attention modules with their projections: copies of them as they are now, with softmax
    in place of the variants, give what flows on and what the output of each module is compared with.

    Costs the memory of these copies. To be opened before anything has been trained.
    """
    losses = LayerLosses()
    teachers = {path: frozen(copy.deepcopy(model.get_submodule(path))) for path in swapped_modules(model)}

    def hook(path: str):
        def compare(module, args, kwargs, output):
            if any(isinstance(given, Cache) for given in kwargs.values()):
                raise UsageError("a cache holds the keys of one module, and here two run: pass use_cache=False")
            with torch.no_grad():
                target = teachers[path](*args, **kwargs)
            losses[path] = normalised_error(_output(output)[:, None], _output(target)[:, None], losses.valid)
            return target

        return compare

    with ExitStack() as stack:
        for path, teacher in teachers.items():
            stack.enter_context(softmax_flows_on(teacher))
            handle = model.get_submodule(path).register_forward_hook(hook(path), with_kwargs=True)
            stack.callback(handle.remove)
        yield losses


def _output(returned: Tensor | tuple) -> Tensor:
    """`[B, T, D]`, of what an attention module returns."""
    return returned if torch.is_tensor(returned) else returned[0]


@torch.no_grad()
def calibrate(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> None:
    """Let every variant set its parameters from what its layer sees on a batch, as in `alignment_loss`.

    For the variants that know how (hybrids match the mass of their linear branch to softmax's outside the window);
    done once before the alignment, on the same batch in every process.
    """

    def show(layer, attention, teacher, query, key, value, mask, scaling):
        attention.calibrate(query, key, value, mask, scaling)

    device = next(model.parameters()).device
    with softmax_flows_on(model, show):
        model(
            **{
                name: x.to(device) if torch.is_tensor(x) else x
                for name, x in model_inputs(batch, last_logits_only=True).items()
            }
        )


def text_errors(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """`|student - teacher|^2 / |teacher - its mean|^2` of each text, `[B]`: 1 for a constant guess, 0 for equality.

    student, teacher: `[B, H, T, Dv]`; valid: bool `[B, T]`, or None where all tokens count. Float32.
    """
    student, teacher = student.float(), teacher.float()
    count = torch.ones_like(teacher[:, :1, :, :1]) if valid is None else valid[:, None, :, None].float()
    tokens = count.expand_as(teacher).sum((1, 2, 3), keepdim=True).clamp(min=1)
    centre = (teacher * count).sum((1, 2, 3), keepdim=True) / tokens
    error = ((student - teacher).square() * count).sum((1, 2, 3))
    spread = ((teacher - centre).square() * count).sum((1, 2, 3))
    return error / spread.clamp(min=1e-12)


def normalised_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """The mean of `text_errors`, so that it does not matter how texts are batched."""
    return text_errors(student, teacher, valid).mean()


_SOFTMAX = get("softmax")(Heads(1, 1, 1))
_SMALLEST_WEIGHT = 1e-8


def weights_divergence(attention: Attention, query: Tensor, key: Tensor, mask: Mask, scaling: float) -> Tensor:
    """`sum_j p_ij log(p_ij / w_ij)`, the mean over the rows i of each text, `[B]`; p is softmax's weights, w the
    variant's, rows brought to sum one.

    That is the cross-entropy by which Hedgehog (Zhang 2024) learns and LoLCATs (Zhang 2024) may, less the entropy of p,
    which trains nothing. O(n^2) time and memory. Weights below 1e-8 count as that.

    Args:
        query: `[B, H, T, D]`; key: `[B, Hkv, S, D]`. Computes in float32 or above.

    Raises:
        UsageError: the variant has negative weights.
    """
    query, key = (t.to(compute_dtype(t.dtype)) for t in (query, key))
    with torch.no_grad():
        p = _SOFTMAX.weights(query, key, mask, scaling)
    weights = attention.weights(query, key, mask, scaling)
    if (weights < 0).any():
        raise UsageError(f"{attention.name} has negative weights, which have no cross-entropy: leave weights_loss out")
    p, w = (t / t.sum(-1, keepdim=True).clamp(min=_SMALLEST_WEIGHT) for t in (p, weights))
    rows = (p * (p.clamp(min=_SMALLEST_WEIGHT) / w.clamp(min=_SMALLEST_WEIGHT)).log()).sum(-1)
    valid = mask.new_tokens()
    count = torch.ones_like(rows) if valid is None else valid[:, None].to(rows.dtype).expand_as(rows)
    return (rows * count).sum((1, 2)) / count.sum((1, 2)).clamp(min=1)


def trainable_parameters(model: nn.Module, linear_branch_alone: bool = False) -> list[nn.Parameter]:
    """Freeze the model but for its variants, or for their linear branches, and return the parameters of these.

    Raises:
        UsageError: no variant of this model has parameters, or one has no linear branch.
    """
    variants = list(swapped_modules(model).values())
    if linear_branch_alone:
        for variant in variants:
            if not isinstance(variant, Hybrid):
                raise UsageError(f"{variant.name} has no linear branch beside a window that could be aligned alone")
        variants = [variant.linear for variant in variants]
    own = [p for variant in variants for p in variant.parameters()]
    if not own:
        raise UsageError(
            "the swapped attention has no parameters to align: train the projections around it (--train attention), "
            "or distil or fine-tune the model"
        )
    return _only(model, own)


def projection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model but for its swapped attention modules, and return their parameters, for
    `aligning_projections`."""
    return _only(model, [p for path in swapped_modules(model) for p in model.get_submodule(path).parameters()])


def _only(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def alignment_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor], losses: LayerLosses) -> Tensor:
    """One forward pass inside `aligning` or `aligning_projections`, and the mean of its losses over layers.

    Args:
        batch: token blocks `[B, n]` for a language model, or what the model takes by name, such as `input_ids` and
            `attention_mask` for an encoder.
    """
    inputs = model_inputs(batch, last_logits_only=True)
    losses.clear()
    losses.valid, losses.packed = inputs.get("attention_mask"), inputs.get("position_ids") is not None
    model(**inputs)
    losses.valid, losses.packed = None, False  # they are of this batch
    return losses.mean()
