"""What planning found: the plan, whether it meets its budgets, and what stands beside it."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from ..config import SwapConfig
from ..statistics import VERDICTS

Interval = dict[str, Any]  # value, low, high, items, few; low and high are None for few items


@dataclass(frozen=True)
class Arm:
    """Describe one choice of groups, measured by a real swap on held-out text.

    Attributes:
        name: how the groups were chosen.
        kept: their names.
        damage: perplexity over softmax's; of models that tell no tokens the squared distance of their answers from
            softmax's, over the square of these.
        over_plan: perplexity over that of the plan of as many groups, on the same texts (or the difference of
            distances); None for plans, and where no plan has as many groups.
        copy: loss on the second half of texts that are written twice, nats per token; None where there are none.
        cache: bytes of the cache over softmax's; None for models that keep none.
        prefill: how many times as fast as softmax a prompt is read, by the times of layers; None where not asked for.
    """

    name: str
    kept: tuple[str, ...]
    damage: Interval
    over_plan: Interval | None = None
    copy: float | None = None
    cache: float | None = None
    prefill: float | None = None


@dataclass(frozen=True)
class Bound:
    """Hold one budget, what the plan has in its place, whether that meets it, and in words by how much it misses."""

    budget: str
    value: float
    met: bool
    miss: str | None


@dataclass(frozen=True)
class Outcome:
    """Hold a plan and all that was measured to find and to judge it.

    Attributes:
        config: the plan, for `swap(model, config)`.
        total: key/value groups of the model among which the plan chooses.
        bounds: the budgets.
        arms: the plan first, then what it has to beat at as many groups, then the same at other numbers of groups.
        softmax_copy: loss of softmax on texts that are written twice; None where there are none.
        ratios: whether the damage is a ratio of perplexities.
        cache_length: tokens at which `Arm.cache` holds.
        prefill_length: tokens at which `Arm.prefill` holds.
        scores: by name, the score of each group by its gate gradient, and the gate at which its search ended.
    """

    config: SwapConfig
    total: int
    bounds: tuple[Bound, ...]
    arms: tuple[Arm, ...]
    softmax_copy: float | None
    ratios: bool
    cache_length: int | None
    prefill_length: int | None
    scores: dict[str, dict[str, float]]

    @property
    def plan(self) -> Arm:
        """Return the arm of the plan."""
        return self.arms[0]

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """Return the arms as a table for the terminal."""
        plan = self.plan
        table = Table(
            title=f"{len(plan.kept)} of {self.total} key/value groups keep softmax, elsewhere {self.elsewhere}"
        )
        titles = ["kept", "groups", "ppl ratio" if self.ratios else "distance", "over the plan"]
        optional = {
            "copy": self.softmax_copy is not None,
            "cache": self.cache_length is not None,
            "prefill": self.prefill_length is not None,
        }
        for title in [*titles, *(name for name, there in optional.items() if there)]:
            table.add_column(title, justify="left" if title == "kept" else "right", overflow="fold")
        for arm in self.arms:
            cells = [arm.name, str(len(arm.kept)), shown(arm.damage), shown(arm.over_plan)]
            for name, there in optional.items():
                value = getattr(arm, name)
                if there:
                    cells.append("" if value is None else f"{value:.3g}")
            table.add_row(*cells)
        return table

    @property
    def elsewhere(self) -> str:
        """Return in words what stands where softmax is not kept."""
        options = ", ".join(f"{name}={value}" for name, value in self.config.options.items())
        return f"{self.config.attention} {options}".strip()

    def lines(self) -> list[str]:
        """Return what the numbers say, in sentences."""
        said = [f"The plan keeps {', '.join(self.plan.kept)}."]
        said += [bound.miss for bound in self.bounds if bound.miss]
        rivals = [arm for arm in self.arms if arm.over_plan is not None]
        for verdict, words in zip(VERDICTS, ("is better than", "cannot be told from", "is worse than"), strict=True):
            names = [arm.name for arm in rivals if (arm.over_plan or {}).get("verdict") == verdict]
            if names:
                said.append(f"At as many groups the plan {words} {', '.join(names)}.")
        return said


def shown(found: Interval | None) -> str:
    """Return a number with its interval; nothing for None."""
    if found is None:
        return ""
    if found["low"] is None:
        return f"{found['value']:.4g}"
    return f"{found['value']:.4g} ({found['low']:.4g} to {found['high']:.4g}){'*' if found['few'] else ''}"
