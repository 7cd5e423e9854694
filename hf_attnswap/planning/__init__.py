"""Find which key/value groups of a model should keep softmax, within a budget: see `plan`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

if TYPE_CHECKING:
    from ..evaluation.course import Progress
    from .outcome import Outcome


def plan(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_file: str | Path,
    budget: str | Sequence[str],
    *,
    validation_file: str | Path | None = None,
    output_dir: str | Path | None = None,
    attention: str = "window",
    kinds: Sequence[str] = ("causal", "bidirectional"),
    context_length: int = 1024,
    steps: int = 28,
    texts: int = 8,
    seed: int = 0,
    observe: "Callable[[Progress], None]" = lambda progress: None,
    **options: Any,
) -> "Outcome":
    """Find which key/value groups of a model keep softmax within a budget, and measure the plan by real swaps.

    `swap(model, outcome.config)` then swaps the model by the plan; this function leaves the model as it was.

    Args:
        model: a model of transformers that is not swapped and reads text, in eval mode.
        tokenizer: its tokenizer.
        train_file: text to plan on (.txt, .json, .jsonl, .parquet, .csv, .tsv); nothing is trained.
        budget: one or several of "groups=1/4" or "groups=22" (how many keep softmax), "ppl<=1.02" (perplexity over
            softmax's, untrained, on the held-out text), "cache<=0.3 at 8192" (bytes over softmax's) and
            "prefill>=1.5 at 8192" (times as fast as softmax). With a bound on the perplexity the plan keeps as few
            groups as meet it, else as many as the others allow. A budget that no plan meets gives the nearest plan.
        validation_file: held-out text; where it is None, the last fifth of the other text is held out.
        output_dir: where plan.yaml, pareto.json and the plots go. A call that was interrupted goes on there.
        attention: the variant that stands where softmax is not kept; its options may follow (`window=128`).
        kinds: which attention, as in `swap`. Layers with a sliding window keep what they are.
        context_length: tokens of a text. steps: gradients of the search.
        texts: held-out texts; an interval needs 8. seed: of the places in the text.
        observe: called at every step with what is done.

    Returns:
        The plan as a `SwapConfig` (`config`), whether it meets the budgets (`bounds`), and what it was measured beside
        (`arms`): every n-th layer, the best layers and random groups at as many groups, and everything swapped.

    Raises:
        UsageError: an unknown budget; text that is too short; lengths beyond the model's; a model that cannot be
            swapped; or an output folder with something else in it. All before anything runs.
    """
    from ..sources.texts import TextSource
    from .running import run
    from .settings import Settings

    settings = Settings.of(budget, attention, options, kinds, context_length, steps, texts, seed)
    held_out = None if validation_file is None else TextSource(str(validation_file))
    folder = None if output_dir is None else Path(output_dir)
    return run(model, tokenizer, TextSource(str(train_file)), held_out, settings, folder, observe)
