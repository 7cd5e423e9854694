"""Say how the numbers of a report came about: model, machine, versions, data, intervals, seeds, date and command."""

from . import beside, facts, tables
from .text import count, number, plain
from .types import Report


def details(report: Report) -> list[tuple[str, str]]:
    """Return (what, words), one line each; what does not apply to this kind of report is left out."""
    model, machine, data = report.model, report.machine, report.data
    heads = f"{model.num_attention_heads} heads, {model.num_key_value_heads} of keys and values"
    memory = f"{machine.cores} cores, {machine.threads} threads, {number(machine.memory_gib)} GiB"
    unit = "blocks of text" if data.unit == "tokens" else f"the {data.unit} of the evaluation"
    pairs = [
        ("model", f"{model.name}: {count(model.parameters)} parameters, {model.dtype}"),
        ("attention", f"{model.attention_layers} layers, {heads}, head dimension {model.head_dim}"),
        ("machine", f"{machine.processor}, {memory}, {machine.platform}; device {machine.device}"),
        ("versions", ", ".join(f"{key} {value}" for key, value in report.versions.items())),
        (
            "data",
            f"training: {count(data.training_size)} {data.unit} of {data.training}; evaluation: "
            f"{count(data.evaluation_size)} of {data.evaluation}",
        ),
        *_settings(report),
        (
            "intervals",
            f"95 %, paired bootstrap over {unit}; * from fewer than 500 of them"
            + ("; how runs with other seeds differ is not in them" if data.unit != "tokens" else ""),
        ),
        ("trained arms", beside.note(report)),
        ("checks", _checks(report)),
        ("speed", _speed(report)),
        ("seed" if len(report.seeds) == 1 else "seeds", ", ".join(map(str, report.seeds))),
        ("date", report.date),
        ("command", report.command),
    ]
    return [(key, plain(value)) for key, value in pairs if value]


def _settings(report: Report) -> list[tuple[str, str]]:
    """Return lines on how the arms of this kind of comparison were trained and compared."""
    told = report.settings
    if report.kind == "quality":
        words = (
            "after distill an arm is compared with its teacher (the original, or what the finetune before made of it), "
            "after finetune with softmax fine-tuned alike; over window: with the run of window trained alike"
        )
        return [("compared", words)]
    shown = ", ".join(f"{key} {value}" for key, value in told.items() if value is not None)
    return [("training of every arm", shown)] if report.kind == "classification" and shown else []


def _checks(report: Report) -> str:
    """Return lines on the checks of the swap that were made, and on the arms that fail them."""
    names = dict.fromkeys(check.name for arm in report.arms for check in arm.checks)
    if not names:
        return tables.UNMEASURED if report.kind == "tradeoff" else ""
    failed = [plain(arm.label) for arm in report.arms if not all(check.passed for check in arm.checks)]
    return f"{', '.join(names)}: " + (f"failed by {', '.join(failed)}" if failed else "passed by every arm swapped")


def _speed(report: Report) -> str:
    keys = ("prefill_s", "forward_s", "decode_tokens_per_s")
    spreads = [getattr(entry, key) for arm in report.arms for entry in arm.speed for key in keys]
    runs = sorted({spread.runs for spread in spreads if spread})
    if not runs:
        return "" if not facts.lengths(report) else tables.UNMEASURED
    median = f"median of {runs[0]} runs" if len(runs) == 1 else f"median of {runs[0]} to {runs[-1]} runs"
    prefilled = any(entry.prefill_s for arm in report.arms for entry in arm.speed)
    what = "prefill is the time to first token" if prefilled else "one input at a time"
    return f"{median}; lowest and highest run in parentheses; {what}"
