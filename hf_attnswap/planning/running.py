"""Run a planning: score and search, choose how many groups are kept, verify by real swaps, and write what was found."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
from ..evaluation.course import Course, Progress
from ..integration.objectives import learned_positions, objective, require_positions
from ..integration.swapping import swapped_modules
from ..sources.lock import alone_in
from ..sources.texts import TextSource
from . import costs, verify
from .arms import Wanted, wanted_arms
from .budgets import LENGTH, Budget, parse_budgets
from .choosing import fewest_groups, most_groups
from .files import write_all
from .gates import gradient, swapped_everywhere
from .groups import find_groups
from .kept import Kept
from .losses import Texts
from .outcome import Arm, Bound, Outcome
from .search import KINDS, advance, new_search, order
from .settings import Settings, streams
from .verify import HeldOut

GRADIENT = 5  # forward passes that a gradient takes as long as
COPIES = 2  # held-out texts that are written twice
TRIES = 3  # plans whose measured speed may miss what the times of layers promised


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_text: TextSource,
    held_out_text: TextSource | None,
    settings: Settings,
    output_dir: Path | None,
    observe: Callable[[Progress], None] = lambda progress: None,
) -> Outcome:
    """Plan, as `hf_attnswap.plan` describes it.

    Raises:
        UsageError: as `hf_attnswap.plan`.
    """
    with nullcontext() if output_dir is None else alone_in(output_dir):
        planning = _Planning(model, tokenizer, training_text, held_out_text, settings, output_dir, observe)
        outcome = planning.outcome()
        if output_dir is not None:
            write_all(outcome, model, output_dir)
        return outcome


class _Planning:
    """Hold what all steps of one run need. Each step is kept as soon as it is done, and not done twice."""

    def __init__(self, model, tokenizer, training_text, held_out_text, settings: Settings, output_dir, observe):
        if swapped_modules(model):
            raise UsageError(
                "the model is swapped, and a plan is made for its softmax: call hf_attnswap.restore(model)"
            )
        if settings.steps < 1 or settings.texts < 1:
            raise UsageError(f"steps is {settings.steps} and texts is {settings.texts}; expected 1 or more of both")
        self.model, self.settings = model, settings
        self.budgets = parse_budgets(settings.budget)
        self.groups = find_groups(model, settings.attention, settings.options, settings.kinds)
        with swapped_everywhere(model, self.groups):
            pass  # which says what cannot be swapped, before anything runs
        self.texts = Texts.of(model, tokenizer, settings.context_length)
        self._check_budgets()
        self.training, held_out = streams(tokenizer, training_text, held_out_text, self.texts, settings)
        self.held_out = HeldOut.of(self.texts, held_out, settings.texts, COPIES)
        self.kept = Kept(output_dir, self._identity(training_text, held_out_text))
        self.course = self._course(observe)

    def _check_budgets(self) -> None:
        """Raise UsageError where a budget asks for what the model does not have."""
        for budget in self.budgets:
            if budget.what == "groups":
                budget.count(len(self.groups))
            if budget.what == "ppl" and not self.texts.tells_tokens:
                raise UsageError(f"{type(self.model).__name__} predicts no tokens, so there is no budget of perplexity")
            if budget.what == "cache":
                costs.require_cache(self.model, self.groups)
            if budget.what == "prefill":
                costs.require_prefill(self.model)
            if budget.length:
                require_positions(self.model, budget.length, f"budget {budget.text!r}")

    def _identity(self, *texts: TextSource | None) -> dict[str, Any]:
        weights = next(p for p in self.model.parameters() if p.dim() > 1).detach().flatten()[:4096].float().cpu()
        digest = hashlib.sha256(weights.numpy().tobytes()).hexdigest()[:16]
        model = {"class": type(self.model).__name__, "groups": list(self.groups.names), "weights": digest}
        read = [None if text is None else text.identity() for text in texts]
        return {**asdict(self.settings), "model": model, "texts": read}

    def _course(self, observe) -> Course:
        """Return the course of the run, in texts read."""
        search = self.kept.get("search")
        done = GRADIENT * (search["step"] if search else 0)
        per_arm = len(self.held_out.plain) + len(self.held_out.twice)
        total = GRADIENT * self.settings.steps + per_arm * 16
        if self.kept.folder is not None:
            done += per_arm * len(list(self.kept.folder.glob("arm_*.json")))
        return Course(observe, total * self.texts.length, done * self.texts.length)

    def outcome(self) -> Outcome:
        """Do what is not done yet, and return what was found."""
        search = self._searched()
        found = order(search)
        count = self._count(found)
        speeds: dict[int, float] = {}
        for budget in self.budgets:
            if budget.what == "prefill":
                count, speeds[budget.length] = self._fast_enough(found, count, budget)
        wanted = wanted_arms(self.groups, found, search["scores"], count)
        arms = self._measured(wanted)
        bounds = tuple(self._bound(budget, found[:count], arms[0], speeds) for budget in self.budgets)
        softmax = self._measure(None, "softmax")
        names = self.groups.names
        return Outcome(
            config=self.groups.config(found[:count]),
            total=len(names),
            bounds=bounds,
            arms=tuple(arms),
            softmax_copy=_mean(softmax["twice"]),
            ratios=self.texts.tells_tokens,
            cache_length=self._cache_length(),
            prefill_length=next((b.length for b in self.budgets if b.what == "prefill"), None),
            scores={
                "gate gradient": dict(zip(names, search["scores"], strict=True)),
                "gate": dict(zip(names, search["gates"], strict=True)),
            },
        )

    def _searched(self) -> dict[str, Any]:
        """Return the search after all its steps."""
        search = self.kept.get("search") or new_search(len(self.groups))
        if search["step"] >= self.settings.steps:
            return search
        has_groups = any(budget.what != "ppl" for budget in self.budgets)
        neutral = list(range(len(self.groups)))
        count = most_groups(self.budgets, neutral, self._cost) if has_groups else max(1, len(self.groups) // 4)
        kinds = KINDS if self.texts.tells_tokens else KINDS[:1]
        room = len(self.training) - self.texts.own
        with swapped_everywhere(self.model, self.groups):
            while search["step"] < self.settings.steps:
                step = search["step"]
                self.course.say(f"gradient {step + 1} of {self.settings.steps}")
                generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + step)
                at = int(torch.randint(room + 1, (1,), generator=generator))

                def take(kind: str, gates: Tensor, at: int = at, step: int = step) -> tuple[float, Tensor]:
                    make = self.texts.plain if kind == "plain" else self.texts.twice
                    return gradient(self.model, self.groups, gates, make(self.training, at, seed=step))

                search = self.kept.put("search", advance(search, count, take, kinds))
                self.course.advance(GRADIENT * self.texts.length)
        return search

    def _count(self, found: Sequence[int]) -> int:
        """Return how many groups the plan keeps."""
        most = most_groups(self.budgets, found, self._cost)
        for budget in self.budgets:
            if budget.what == "ppl":
                return fewest_groups(most, lambda count, b=budget: b.met(self._ratio(found[:count])))
        return most

    def _fast_enough(self, found: Sequence[int], count: int, budget: Budget) -> tuple[int, float]:
        """Return how many groups a plan may keep that is as fast as it has to be, measured, and its speed."""
        for left in reversed(range(TRIES)):
            measured = self._speed(found[:count], budget.length)
            if budget.met(measured) or left == 0 or count == 1:
                break
            promised = self._cost(budget, found[:count])
            asked = Budget(budget.what, budget.bound * promised / measured, budget.length, budget.text)
            count = min(count - 1, most_groups([asked], found[: count + 1], self._cost))
        return count, measured

    def _cost(self, budget: Budget, kept: Sequence[int]) -> float:
        if budget.what == "cache":
            return costs.cache_share(self.groups, kept, self._cache(budget.length))
        return costs.prefill_speed(self.groups, kept, self._prefill(budget.length))

    def _cache(self, length: int) -> dict[str, int]:
        name = f"cache_{length}"
        return self.kept.get(name) or self.kept.put(name, costs.cache_bytes(self.model, self.groups, length))

    def _prefill(self, length: int) -> dict[str, Any]:
        name = f"prefill_{length}"
        return self.kept.get(name) or self.kept.put(
            name, costs.prefill_seconds(self.model, self.groups, length, say=self.course.say)
        )

    def _speed(self, kept: Sequence[int], length: int) -> float:
        name = f"speed_{length}_{_named(kept)}"
        found = self.kept.get(name)
        if found is None:
            self.course.say(f"speed of the plan at {length} tokens")
            found = self.kept.put(name, costs.measured_speed(self.model, self.groups, kept, length))
        return found

    def _cache_length(self) -> int | None:
        """Return at how many tokens the cache of the arms is compared; None for models that keep none."""
        if objective(self.model) != "next tokens" or "causal" not in self.groups.kinds:
            return None
        asked = next((budget.length for budget in self.budgets if budget.length), LENGTH)
        return min(asked, learned_positions(self.model) or asked)

    def _measure(self, kept: Sequence[int] | None, label: str) -> dict[str, Any]:
        name = "arm_softmax" if kept is None else f"arm_{_named(kept)}"
        found = self.kept.get(name)
        if found is None:
            self.course.say(f"measuring {label}")
            found = self.kept.put(name, verify.measure(self.model, self.groups, kept, self.held_out))
            self.course.advance((len(self.held_out.plain) + len(self.held_out.twice)) * self.texts.length)
        return found

    def _damage(self, kept: Sequence[int], label: str) -> list[float]:
        softmax = self._measure(None, "softmax")
        return verify.damage(self._measure(kept, label), softmax, self.held_out)

    def _ratio(self, kept: Sequence[int]) -> float:
        damage = self._damage(kept, f"{len(kept)} groups")
        return verify.as_ratio(verify.between(damage, [0.0] * len(damage)))["value"]

    def _measured(self, wanted: Sequence[Wanted]) -> list[Arm]:
        """Return the arms, measured."""
        damages = {arm.name: self._damage(arm.kept, arm.name) for arm in wanted}
        shown: Callable = verify.as_ratio if self.texts.tells_tokens else verify.as_difference
        length = self._cache_length()
        speeds = [budget for budget in self.budgets if budget.what == "prefill"]
        arms = []
        for arm in wanted:
            damage, over = damages[arm.name], None
            if arm.rival is not None:
                compared = verify.between(damage, damages[arm.rival])
                # Worse than the plan is what the plan wins by.
                verdict = verify.between(damages[arm.rival], damage).verdict(lower_is_better=True)
                over = shown(compared) | {"verdict": verdict}
            arms.append(
                Arm(
                    name=arm.name,
                    kept=tuple(self.groups.names[place] for place in sorted(arm.kept)),
                    damage=shown(verify.between(damage, [0.0] * len(damage))),
                    over_plan=over,
                    copy=_mean(self._measure(arm.kept, arm.name)["twice"]),
                    cache=None if length is None else costs.cache_share(self.groups, arm.kept, self._cache(length)),
                    prefill=self._cost(speeds[0], arm.kept) if speeds else None,
                )
            )
        return arms

    def _bound(self, budget: Budget, kept: Sequence[int], arm: Arm, speeds: dict[int, float]) -> Bound:
        if budget.what == "groups":
            return Bound(budget.text, len(kept), True, None)
        if budget.what == "ppl":
            value = arm.damage["value"]
        elif budget.what == "prefill":
            value = speeds[budget.length]
        else:
            value = self._cost(budget, kept)
        met = budget.met(value)
        miss = None if met else f"No plan meets the budget; the nearest has {budget.misses(value)}."
        return Bound(budget.text, value, met, miss)


def _named(kept: Sequence[int]) -> str:
    return hashlib.sha256(json.dumps(sorted(kept)).encode()).hexdigest()[:16]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
