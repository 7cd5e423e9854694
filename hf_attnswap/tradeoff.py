"""Every arm of a comparison on one model: swap, align where there is something to align, measure, report.

What is measured is kept arm by arm and round by round in `output_dir/measured`, each file whole by rename, so that an
interrupted run goes on where it was when the same command is given again.
"""

import copy
import datetime
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from . import attentions
from .benchmark.generation import Run, run
from .benchmark.measure import Spread, speedup
from .config import SwapConfig
from .data import TextSource, token_blocks
from .errors import UsageError
from .evaluation.perplexity import Perplexity, perplexity, ratio
from .files import write_whole
from .patching import swap, swapped_modules
from .training.align import DEFAULT_LEARNING_RATE, aligning, alignment_loss, calibrate, trainable_parameters
from .training.batches import batches
from .training.loop import train
from .version import __version__

DEFAULT_ARMS = "softmax none window relu_norm relu_power identity elu hedgehog hedgehog+window".split()

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What a run measures. Two runs with equal settings, model and text continue one another."""

    arms: tuple[str, ...]
    context_lengths: tuple[int, ...]
    max_eval_tokens: int
    lengths: tuple[int, ...]
    rounds: int
    decode_tokens: int
    align_tokens: int
    block_size: int
    learning_rate: float = DEFAULT_LEARNING_RATE
    per_device_train_batch_size: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """One row of the comparison, from text such as "relu_power:p=8,shift=none"."""

    label: str
    attention: str
    options: dict[str, Any]

    @classmethod
    def parse(cls, text: str) -> "Arm":
        """UsageError for an unknown attention or option, or an unfit value."""
        name, _, rest = text.partition(":")
        options = parse_options([part for part in rest.split(",") if part])
        ((_, (_, values)),) = SwapConfig(name, options=options).plan([0]).items()
        return cls(text, name, values)


def parse_options(assignments: list[str]) -> dict[str, Any]:
    """`["window=64", "shift=none"]` as a dict; values are read as JSON where they are JSON, else as text."""
    options: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UsageError(f"option {assignment!r} has no value; expected name=value")
        try:
            options[name] = json.loads(value.lower() if value in ("True", "False") else value)
        except json.JSONDecodeError:
            options[name] = value
    return options


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    training_text: TextSource,
    evaluation_text: TextSource | None,
    settings: Settings,
    output_dir: Path,
    *,
    model_name: str,
    command: str,
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Measure all arms and return the report, as `hf_attnswap.report` takes it.

    Args:
        evaluation_text: held-out text; None keeps the last fifth of the training text out of training for it.

    Raises:
        UsageError: unknown arms, too little text, or an `output_dir` that holds something else.
    """
    arms = [Arm.parse(text) for text in dict.fromkeys(("softmax", *settings.arms))]
    train_blocks, eval_tokens = _texts(tokenizer, training_text, evaluation_text, settings)
    measured = _open(output_dir, settings, model_name, training_text, evaluation_text)
    results = {arm.label: _quality(arm, model, train_blocks, eval_tokens, settings, measured, progress) for arm in arms}
    runs = _speed(arms, results, model, eval_tokens, settings, measured, progress)
    return {
        "schema": "hf_attnswap.tradeoff",
        "version": 1,
        "model": _describe_model(model, model_name),
        "machine": machine(model.device),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": settings.seed,
        "data": {
            "text": training_text.name if evaluation_text is None else f"{training_text.name}, {evaluation_text.name}",
            "training_tokens": train_blocks.numel(),
            "evaluation_tokens": eval_tokens.numel(),
        },
        "arms": [_row(arm, results, runs, settings) for arm in arms],
    }


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A second model over the very same tensors, to swap without touching the first."""
    memo = {id(t): t for t in itertools.chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, memo)


def _texts(tokenizer, training_text, evaluation_text, settings: Settings) -> tuple[Tensor, Tensor]:
    longest = max(*settings.context_lengths, *settings.lengths, settings.block_size)
    blocks = token_blocks(training_text, tokenizer, settings.block_size)
    if evaluation_text is None:
        held_out = math.ceil(len(blocks) / 5)
        blocks, evaluation = blocks[:-held_out], blocks[-held_out:].reshape(-1)
    else:
        evaluation = token_blocks(evaluation_text, tokenizer, settings.block_size).reshape(-1)
    if evaluation.numel() < longest or len(blocks) == 0:
        raise UsageError(
            f"the text leaves {evaluation.numel()} tokens for evaluation and {blocks.numel()} for training; "
            f"{longest} and {settings.block_size} are needed: give more text or smaller lengths"
        )
    return blocks, evaluation


def _open(output_dir: Path, settings: Settings, model_name: str, *texts: TextSource | None) -> Path:
    """The folder of partial results, new or of a run with the same settings."""
    folder = output_dir / "measured"
    wanted = json.loads(json.dumps(asdict(settings) | {"model": model_name, "texts": [t and asdict(t) for t in texts]}))
    known = folder / "settings.json"
    if known.is_file():
        found = json.loads(known.read_text())
        for key in wanted:
            if found.get(key) != wanted[key]:
                raise UsageError(
                    f"output folder {str(output_dir)!r} holds a run with {key} = {found.get(key)!r}, "
                    f"not {wanted[key]!r}: name another folder to start anew"
                )
        return folder
    if output_dir.exists() and (output_dir.is_file() or any(output_dir.iterdir())):
        raise UsageError(f"output folder {str(output_dir)!r} is not empty and holds no earlier run: name another one")
    folder.mkdir(parents=True)
    _write_json(known, wanted)
    return folder


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, json.dumps(content, indent=1).encode())


def _file(folder: Path, arm: Arm, suffix: str) -> Path:
    return folder / (re.sub(r"[^A-Za-z0-9+=._-]", "_", arm.label) + suffix)


def _quality(arm: Arm, model, train_blocks, eval_tokens, settings: Settings, folder: Path, progress: Progress) -> dict:
    """Align and evaluate one arm, or read what an earlier run found."""
    path = _file(folder, arm, ".json")
    if path.is_file():
        progress(f"{arm.label}: already measured")
        return json.loads(path.read_text())
    result: dict[str, Any] = {"status": "measured", "reason": None, "alignment": None, "nll": {}, "new_parameters": 0}
    try:
        swapped = _build(arm, model)
        own = [p for attention in swapped_modules(swapped).values() for p in attention.parameters()]
        result["new_parameters"] = sum(p.numel() for p in own)
        if own and settings.align_tokens:
            result["alignment"] = _align(arm, swapped, train_blocks, settings, progress)
            parameters = {name: p for name, p in swapped.state_dict().items() if ".attnswap." in name}
            write_whole(_file(folder, arm, ".safetensors"), save(parameters))
        for context in settings.context_lengths:
            progress(f"{arm.label}: perplexity at context {context}")
            blocks = max(1, settings.max_eval_tokens // context)
            result["nll"][str(context)] = perplexity(swapped, eval_tokens, context, blocks).nll
        if not all(math.isfinite(x) for nll in result["nll"].values() for x in nll):
            result |= {"status": "failed", "reason": "its perplexity is not finite", "nll": {}}
    except Exception as error:
        if os.environ.get("ATTNSWAP_DEBUG"):
            raise
        result |= {"status": "failed", "reason": (str(error) or repr(error)).splitlines()[0]}
        progress(f"{arm.label}: failed: {result['reason']}")
    _write_json(path, result)
    return result


def _build(arm: Arm, model: PreTrainedModel, parameters: Path | None = None) -> PreTrainedModel:
    """A model for the arm over the weights of `model`; softmax is the model itself, not our own path."""
    if arm.attention == "softmax":
        return model
    torch.manual_seed(0)
    swapped = swap(share_weights(model), arm.attention, **arm.options)
    if parameters is not None and parameters.is_file():
        swapped.load_state_dict(load_file(parameters), strict=False)
    return swapped.eval()


def _align(arm: Arm, model: nn.Module, blocks: Tensor, settings: Settings, progress: Progress) -> dict[str, Any]:
    batch_size = settings.per_device_train_batch_size
    steps = max(1, settings.align_tokens // (batch_size * blocks.shape[1]))
    parameters = trainable_parameters(model)
    accelerator = Accelerator(cpu=next(model.parameters()).device.type == "cpu")
    started = time.perf_counter()
    calibrate(model, blocks[: 2 * batch_size])
    with aligning(model) as losses:
        history = train(
            accelerator,
            model,
            batches(blocks, batch_size, settings.seed),
            lambda model, batch: alignment_loss(model, batch, losses),
            parameters=parameters,
            learning_rate=settings.learning_rate,
            steps=steps,
            warmup=steps // 20,
            progress=lambda step, loss: progress(f"{arm.label}: alignment step {step} of {steps}, loss {loss:.4f}"),
        )
    accelerator.free_memory()
    model.eval()
    return {
        "tokens": steps * batch_size * blocks.shape[1],
        "seconds": round(time.perf_counter() - started, 1),
        "first_loss": history[0],
        "last_loss": history[-1],
    }


def _speed(arms, results, model, eval_tokens, settings: Settings, folder: Path, progress: Progress) -> dict:
    """`{length: {label: [Run or None per round]}}`; in a round the arms take turns, softmax first."""
    path = folder / "speed.json"
    done: dict[str, list[dict]] = json.loads(path.read_text()) if path.is_file() else {}
    models = {
        arm.label: _build(arm, model, _file(folder, arm, ".safetensors"))
        for arm in arms
        if results[arm.label]["status"] == "measured"
    }
    for length in settings.lengths:
        rounds = done.setdefault(str(length), [])
        prompt = eval_tokens[:length][None].to(model.device)
        while len(rounds) < settings.rounds:
            found = {}
            for label, candidate in models.items():
                progress(f"{label}: speed at {length} tokens, round {len(rounds) + 1} of {settings.rounds}")
                if not rounds:
                    run(candidate, prompt[:, :32], 1)  # what the first call allocates belongs to no length
                try:
                    found[label] = asdict(run(candidate, prompt, settings.decode_tokens))
                except (RuntimeError, NotImplementedError) as error:  # out of memory, or a refusal
                    found[label] = {"error": str(error).splitlines()[0]}
            rounds.append(found)
            _write_json(path, done)
    return done


def _row(arm: Arm, results: dict[str, dict], runs: dict, settings: Settings) -> dict[str, Any]:
    cls, result = attentions.get(arm.attention), results[arm.label]
    return {
        "label": arm.label, "attention": arm.attention, "options": arm.options, "control": cls.control,
        "formula": cls.formula, "cost": cls.cost, "cost_class": cls.cost_class, "source": cls.source,
        "new_parameters": result["new_parameters"], "status": result["status"], "reason": result["reason"],
        "alignment": result["alignment"],
        "perplexity": [
            _perplexity_row(arm, Perplexity(int(c), tuple(nll)), results) for c, nll in result["nll"].items()
        ],
        "speed": [_speed_row(arm.label, int(length), rounds) for length, rounds in runs.items()
                  if result["status"] == "measured"],
    }  # fmt: skip


def _perplexity_row(arm: Arm, found: Perplexity, results: dict[str, dict]) -> dict[str, Any]:
    control = results["softmax"]["nll"].get(str(found.context))
    compared = None
    if control and arm.label != "softmax":
        compared = dict(
            zip(("value", "low", "high"), ratio(found, Perplexity(found.context, tuple(control))), strict=True)
        )
    error = found.standard_error
    return {
        "context": found.context, "perplexity": found.perplexity, "nll": found.mean,
        "standard_error": None if math.isnan(error) else error, "tokens": found.tokens, "ratio": compared,
    }  # fmt: skip


def _speed_row(label: str, length: int, rounds: list[dict]) -> dict[str, Any]:
    errors = [r[label]["error"] for r in rounds if "error" in r.get(label, {})]
    pairs = [
        (Run(**r["softmax"]), Run(**r[label]))
        for r in rounds
        if not any("error" in r.get(name, {"error": ""}) for name in ("softmax", label))
    ]
    row: dict[str, Any] = {"length": length, "note": errors[0] if errors else None}
    row |= dict.fromkeys(
        ("prefill_s", "prefill_speedup", "decode_tokens_per_s", "decode_speedup", "peak_memory_mib", "cache_mib")
    )
    if not pairs:
        return row | {"note": row["note"] or "not measured"}
    ours, control = [o for _, o in pairs], [c for c, _ in pairs]
    row["prefill_s"] = Spread.of([r.prefill_s for r in ours]).as_dict()
    row["decode_tokens_per_s"] = Spread.of([1 / r.decode_s for r in ours]).as_dict()
    row["cache_mib"] = ours[0].cache_bytes / 2**20
    peaks = [r.peak_memory_mib for r in ours if r.peak_memory_mib is not None]
    row["peak_memory_mib"] = max(0.0, Spread.of(peaks).median) if peaks else None
    if label != "softmax":
        row["prefill_speedup"] = speedup([r.prefill_s for r in control], [r.prefill_s for r in ours]).as_dict()
        row["decode_speedup"] = speedup([r.decode_s for r in control], [r.decode_s for r in ours]).as_dict()
    return row


def _describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    config = model.config
    heads = config.num_attention_heads
    return {
        "name": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "attention_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def machine(device: torch.device) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        processor = found[1].strip() if found else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    return {
        "processor": processor,
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory, 1),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "platform": platform.platform(),
    }


def versions() -> dict[str, str]:
    return {
        "hf_attnswap": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
