"""Align a swapped model: every swapped layer learns to reproduce the softmax output of its layer.

Teacher and student share one forward pass: where the model calls its attention, softmax runs as well, the output of
softmax flows on, and the variant is compared with softmax on the same query, key and value. No second model is in
memory, layers do not disturb each other, and only the variants' parameters get gradients (attention transfer of
LoLCATs, Zhang 2024).

Variants without parameters have nothing to learn from such a comparison. With such variants the projections around the
attention learn, so that the output of the whole module is that of the softmax module (the first step of RADLADS,
Goldstein 2025). The teacher is then a frozen copy of the attention modules, not of the model.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import Cache

from ..attentions import Attention, Heads, get
from ..errors import UsageError
from ..integration.swapping import swapped_modules
from ..masks import Mask
from ..ops.heads import compute_dtype
from .batches import model_inputs
from .teacher import frozen, softmax_flows_on

DEFAULT_LEARNING_RATE = 1e-2  # as LoLCATs
DEFAULT_PROJECTIONS_LEARNING_RATE = 1e-3  # to 1e-5, as RADLADS


class LayerLosses(dict[str, Tensor]):
    """Hold the loss of each layer in the last forward pass, a scalar by the path of the attention module.

    A loss is the squared error of the output divided by the variance of the softmax output, plus the divergence of the
    weights where that is asked for. All rows of a batch count the same, or, where `packed` is set, by their tokens; so
    the loss does not depend on how rows are batched.

    Attributes:
        valid: which tokens of the batch count, bool `[B, T]`; None for all.
        packed: whether each row of the batch holds several texts, which then count by their tokens.
    """

    valid: Tensor | None = None
    packed: bool = False

    def __init__(self):
        super().__init__()
        self._texts: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def add(self, layer: str, errors: Tensor, tokens: Tensor) -> None:
        """Add some texts of the batch to the loss of `layer`.

        Args:
            errors: error of each text, `[b]`.
            tokens: number of tokens of each text, `[b]`.
        """
        seen = self._texts.setdefault(layer, [])
        seen.append((errors, tokens if self.packed else torch.ones_like(tokens)))
        errors, weights = (torch.cat(parts) for parts in zip(*seen, strict=True))
        self[layer] = (errors * weights).sum() / weights.sum()

    def clear(self) -> None:
        """Remove the losses of all layers."""
        super().clear()
        self._texts.clear()

    def mean(self) -> Tensor:
        """Return the mean loss, in which every layer has the same weight."""
        return torch.stack(list(self.values())).mean()


@contextmanager
def aligning(model: nn.Module, linear_branch_alone: bool = False, weights_loss: float = 0.0) -> Iterator[LayerLosses]:
    """Run softmax in the swapped layers and record the losses of their variants, while the context is open.

    Yields the losses, which each forward pass fills. Call `losses.clear()` before the next forward pass.

    Args:
        linear_branch_alone: compare only the linear variant X of each `X+window`, over all keys. The window gives most
            of the output and leaves X little to learn from; LoLCATs trains X first, and adds the window then.
        weights_loss: factor of `weights_divergence`, which is added to the error of the outputs; 0 for none.

    Raises:
        UsageError: the model has no swapped layer.
    """
    losses = LayerLosses()

    def compare(layer, attention, teacher, query, key, value, mask, scaling):
        learner = attention.linear_branch if linear_branch_alone else attention
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
    """Record the losses of whole attention modules with their projections, while the context is open.

    Copies of the modules as they are now, with softmax in place of the variants, compute the output that flows on and
    that the output of each module is compared with. Open the context before anything has been trained, and before
    Accelerate prepares the model. The copies cost as much memory as the attention modules, also under FSDP2, which
    does not shard them.

    Yields the losses, as `aligning` does.

    Raises:
        UsageError: in a forward pass, the model is called with a cache.
    """
    losses = LayerLosses()
    teachers = {path: frozen(copy.deepcopy(model.get_submodule(path))) for path in swapped_modules(model)}

    def hook(path: str):
        def compare(module, args, kwargs, output):
            if any(isinstance(given, Cache) for given in kwargs.values()):
                raise UsageError("a cache holds the keys of one module, and here two run: pass use_cache=False")
            with torch.no_grad(), _taking((*args, *kwargs.values()), teachers[path]):
                target = teachers[path](*args, **kwargs)
            losses[path] = normalised_error(_output(output)[:, None], _output(target)[:, None], losses.valid)
            return target

        return compare

    with ExitStack() as stack:
        for teacher in teachers.values():
            stack.enter_context(softmax_flows_on(teacher))
        modules = {path: model.get_submodule(path) for path in teachers}
        hooks = stack.enter_context(ExitStack())

        def put_on_last(model, args):
            # FSDP2, which comes later, has hooks of its own: they have to see the output that gets a gradient.
            hooks.close()
            for path, module in modules.items():
                hooks.callback(module.register_forward_hook(hook(path), with_kwargs=True).remove)

        stack.callback(model.register_forward_pre_hook(put_on_last).remove)
        yield losses


def _taking(given: tuple, teacher: nn.Module) -> AbstractContextManager:
    """Let a teacher take what a module gets whose weights FSDP2 casts, as FSDP2 does in mixed precision."""
    hidden = next(x for x in given if torch.is_tensor(x) and x.is_floating_point())
    if hidden.dtype == next(teacher.parameters()).dtype or hidden.dtype not in (torch.bfloat16, torch.float16):
        return nullcontext()
    return torch.autocast(hidden.device.type, hidden.dtype)


def _output(returned: Tensor | tuple) -> Tensor:
    """Return the output `[B, T, D]` from what an attention module returned."""
    return returned if torch.is_tensor(returned) else returned[0]


@torch.no_grad()
def calibrate(model: nn.Module, batch: Tensor | Mapping[str, Tensor]) -> None:
    """Let every variant set its parameters from the query, key and value that its layer gets on a batch.

    Softmax gives the output of every layer meanwhile. Only some variants do anything: hybrids match the mass of their
    linear branch to that of softmax outside the window. Call the function once before the alignment, with the same
    batch in every process.

    Args:
        batch: as in `alignment_loss`.

    Raises:
        UsageError: the model has no swapped layer.
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
    """Return `|student - teacher|^2 / |teacher - its mean|^2` of each text: 0 for equality, 1 for a constant guess.

    Args:
        student, teacher: `[B, H, T, Dv]`.
        valid: bool `[B, T]`, which tokens count; None for all.

    Returns:
        float32 `[B]`.
    """
    student, teacher = student.float(), teacher.float()
    count = torch.ones_like(teacher[:, :1, :, :1]) if valid is None else valid[:, None, :, None].float()
    tokens = count.expand_as(teacher).sum((1, 2, 3), keepdim=True).clamp(min=1)
    centre = (teacher * count).sum((1, 2, 3), keepdim=True) / tokens
    error = ((student - teacher).square() * count).sum((1, 2, 3))
    spread = ((teacher - centre).square() * count).sum((1, 2, 3))
    return error / spread.clamp(min=1e-12)


def normalised_error(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean of `text_errors` over texts, a float32 scalar that does not depend on how texts are batched."""
    return text_errors(student, teacher, valid).mean()


_SOFTMAX = get("softmax")(Heads(1, 1, 1))
_SMALLEST_WEIGHT = 1e-8


def weights_divergence(attention: Attention, query: Tensor, key: Tensor, mask: Mask, scaling: float) -> Tensor:
    """Return the divergence of the attention weights from those of softmax, the mean over the rows of each text.

    The divergence of row i is `sum_j p_ij log(p_ij / w_ij)`, where p are the weights of softmax and w those of the
    variant, both divided by their row sums. The divergence is the cross-entropy by which Hedgehog (Zhang 2024) learns
    and LoLCATs (Zhang 2024) may, less the entropy of p, which has no gradient. Weights below 1e-8 count as 1e-8. Time
    and memory are O(n^2).

    Args:
        query: `[B, H, T, D]`.
        key: `[B, Hkv, S, D]`.
        mask: which keys each row may attend to.
        scaling: factor of the scores.

    Returns:
        `[B]`, in float32 or above.

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
    """Freeze the model except its variants, and return the parameters of the variants.

    Args:
        linear_branch_alone: train only the linear branch of each `X+window`.

    Raises:
        UsageError: no variant of this model has parameters, or one has no linear branch.
    """
    variants = list(swapped_modules(model).values())
    if linear_branch_alone:
        for variant in variants:
            if variant.linear_branch is None:
                raise UsageError(f"{variant.name} has no linear branch beside a window that could be aligned alone")
        variants = [variant.linear_branch for variant in variants]
    own = [p for variant in variants for p in variant.parameters()]
    if not own:
        raise UsageError(
            "the swapped attention has no parameters to align: train the projections around it (--train attention), "
            "or distil or fine-tune the model"
        )
    return _only(model, own)


def projection_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Freeze the model except its swapped attention modules, and return the parameters of these modules.

    `aligning_projections` gives the losses that train these parameters.
    """
    return _only(model, [p for path in swapped_modules(model) for p in model.get_submodule(path).parameters()])


def _only(model: nn.Module, parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def alignment_loss(model: nn.Module, batch: Tensor | Mapping[str, Tensor], losses: LayerLosses) -> Tensor:
    """Run one forward pass inside `aligning` or `aligning_projections`, and return the mean of its losses over layers.

    Args:
        batch: token blocks `[B, n]` for a language model (`[B, n, 2]` with separate documents), or what the model takes
            by name, such as `input_ids` and `attention_mask` for an encoder.
        losses: what `aligning` or `aligning_projections` yields.
    """
    inputs = model_inputs(batch, last_logits_only=True)
    losses.clear()
    losses.valid, losses.packed = inputs.get("attention_mask"), inputs.get("position_ids") is not None
    model(**inputs)
    losses.valid, losses.packed = None, False  # they are of this batch
    return losses.mean()
