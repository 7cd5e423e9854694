"""Show an estimate as tables for the terminal."""

from collections.abc import Sequence

from rich.table import Table

from .result import Estimate, Memory, Serving, Stage

_GIB = 1 << 30


def tables(found: Estimate) -> list[Table]:
    """Return two tables, of the stages of training and of serving, with what they are about above them."""
    devices = f"{found.num_devices} x {found.device}, {gib(found.device_memory)} GiB each"
    stages = _table(
        f"{found.model}: {found.parameters:,} parameters, {found.swapped}\n{devices}; {found.dtype}; each stage on "
        f"{found.tokens:,} tokens, in blocks of {found.length}, {found.batch_size} per device and step; memory in GiB "
        "per device",
        ("stage", "attention", "weights", "gradients", "optimiser", "activations", "total", "s / step", "tokens / s",
         "hours", "device hours", *_cost(found, "cost")),
        [_stage(stage) for stage in found.stages],
    )  # fmt: skip
    serving = _table(
        f"serving: prompts of {found.length} tokens, and texts of {found.length} tokens that are continued; memory in "
        "GiB of one copy of the model, tokens / s of all",
        ("work", "attention", "batch", "devices", "weights", "activations", "cache", "total", "seconds", "tokens / s",
         *_cost(found, "cost of 1M tokens")),
        [_serving(serving) for serving in found.serving],
    )  # fmt: skip
    return [stages, serving]


def notes(found: Estimate) -> list[str]:
    """Return in words what the tables leave open."""
    lines = []
    if any(stage.sharded for stage in found.stages):
        lines.append("sharded: a copy does not fit on a device, so weights, gradients and optimiser are shared (FSDP)")
    too_large = [f"{s.stage} ({s.attention})" for s in found.stages if not s.fits]
    too_large += [f"serving with {s.attention}" for s in found.serving if s.work == "prefill" and not s.batch]
    if too_large:
        lines.append(f"does not fit: {', '.join(too_large)}")
    return lines


def _cost(found: Estimate, title: str) -> tuple[str, ...]:
    return () if found.price_per_hour is None else (title,)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _stage(stage: Stage) -> list[str]:
    m = stage.memory
    total = f"{gib(m.total)}{', sharded' * stage.sharded}{', too large' * (not stage.fits)}"
    parts = [gib(part) for part in (m.weights, m.gradients, m.optimiser, m.activations)]
    times = [number(stage.step_s), number(stage.tokens_per_s), number(stage.hours), number(stage.device_hours)]
    return [stage.stage, stage.attention, *parts, total, *times, *([] if stage.cost is None else [number(stage.cost)])]


def _serving(serving: Serving) -> list[str]:
    m: Memory = serving.memory
    batch = str(serving.batch) if serving.batch else "0, too large"
    parts = [gib(part) for part in (m.weights, m.activations, m.cache, m.total)]
    times = [number(serving.seconds), number(serving.tokens_per_s)]
    cost = [] if serving.cost is None else [number(serving.cost)]
    return [serving.work, serving.attention, batch, str(serving.devices), *parts, *times, *cost]


def gib(size: float) -> str:
    """Return bytes in GiB, to three digits."""
    return number(size / _GIB)


def number(value: float) -> str:
    """Return a number to three digits, without an exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 or not value else f"{value:.1g}"
