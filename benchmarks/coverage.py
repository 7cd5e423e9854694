"""Which model types of transformers hf_attnswap swaps: every one is built as a tiny random model, swapped and run.

Each type runs before and after, in a process of its own. It counts as covered only if every attention module ran the
variant, `softmax` through the same seam gives the output of the unswapped model (so masks, biases and scales arrive
whole), the variant changes the output, and `restore` brings the first output back bit for bit. Two more things are
noted of each: whether a variant with parameters runs, and whether a text in two parts, the second with the cache that
the first has left, gives what it gives at once. Features that released models switch on (shared keys and values,
sliding windows, ...) are on. A type is wrong where one of these gives other numbers or an error that is no refusal.

    python benchmarks/coverage.py --output_dir coverage
    python benchmarks/coverage.py --output_dir coverage --attention elu --model_types llama,bert,t5,clip
"""

import argparse
import collections
import json
import logging
import multiprocessing
import re
import resource
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_architectures import model_types, tiny_model
from tiny_caches import second_part, text_of, whole_output
from tiny_inputs import Run, forward, reach, senses
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

import hf_attnswap
from hf_attnswap.config import NAME
from hf_attnswap.errors import UsageError, one_line_errors
from hf_attnswap.integration.attention import attnswap_attention
from hf_attnswap.sources.files import write_whole

FAMILIES = ("decoder-only", "encoder", "encoder-decoder", "vision", "audio", "multimodal")
VERDICTS = {
    "covered": "every attention module ran the variant",
    "partly": "some did; the others are refused or were not reached, with the reason",
    "refused": "none can, with the reason",
    "wrong": "hf_attnswap did something else than it said",
    "no attention": "the model has no attention module",
    "not run": "no input was found that reaches its attention",
    "not built": "no tiny model could be built, or its process was stopped",
}
TOLERANCE = 1e-3  # of the largest output: softmax in another order of operations stays far below, a lost mask does not
MEMORY = 12 * 2**30
PARAMETERS, STATEFUL = "rela", "elu"  # variants with parameters for each head, and with a state


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attention", default="relu_norm", help="see `attnswap ls` (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="for coverage.json and coverage.md")
    parser.add_argument("--model_types", help="comma-separated (default: all that an auto class builds)")
    parser.add_argument("--keep", action="store_true", help="keep the other types of the coverage.json that is there")
    parser.add_argument("--time_limit", type=float, default=120, help="seconds for one type (default: %(default)s)")
    parser.add_argument("--num_processes", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print coverage.json in place of the table")
    args = parser.parse_args(argv)
    known = model_types()
    chosen = args.model_types.split(",") if args.model_types else list(known)
    for model_type in chosen:
        if model_type not in known:
            raise UsageError(f"no auto class of transformers {transformers.__version__} builds {model_type!r}")
    if args.attention not in {variant.name for variant in hf_attnswap.available()}:
        raise UsageError(f"unknown attention {args.attention!r}: see `attnswap ls`")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    report = {"attention": args.attention, "transformers": transformers.__version__, "types": []}
    if args.keep:
        before = json.loads((args.output_dir / "coverage.json").read_text())
        if any(before[key] != report[key] for key in ("attention", "transformers")):
            raise UsageError(
                f"coverage.json in {args.output_dir} is of another attention or transformers: leave out --keep"
            )
        report["types"] = [record for record in before["types"] if record["model_type"] not in chosen]
    kept = len(report["types"])
    for record in in_processes(chosen, known, args.attention, args.time_limit, args.num_processes):
        report["types"].append(record)
        report["types"].sort(key=lambda r: list(known).index(r["model_type"]))
        if not args.json:
            done = f"{len(report['types']) - kept}/{len(chosen)}"
            print(f"{done} {record['model_type']}: {record['verdict']} ({record['seconds']} s)", flush=True)
        write_whole(args.output_dir / "coverage.json", json.dumps(report, indent=1).encode())
    text = markdown(report)
    write_whole(args.output_dir / "coverage.md", text.encode())
    print(json.dumps(report, indent=1) if args.json else text)


def in_processes(
    chosen: Sequence[str], known: Mapping[str, Any], attention: str, time_limit: float, num_processes: int
) -> Iterator[dict[str, Any]]:
    """One record per type as they come; a type that crashes or hangs loses its own record only."""
    context = multiprocessing.get_context("fork")  # the imports are shared
    waiting = list(chosen)
    running: dict[Connection, tuple[str, multiprocessing.Process, float]] = {}
    while waiting or running:
        while waiting and len(running) < num_processes:
            model_type = waiting.pop(0)
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=child, args=(theirs, model_type, known[model_type], attention))
            process.start()
            theirs.close()
            running[ours] = model_type, process, time.monotonic()
        ready = wait(list(running), timeout=1)
        for pipe, (model_type, process, started) in list(running.items()):
            seconds = round(time.monotonic() - started, 1)
            if pipe not in ready and seconds < time_limit:
                continue
            record = {"model_type": model_type, "family": None, "verdict": "not built"}
            try:
                record |= pipe.recv() if pipe in ready else {"note": f"stopped after {time_limit:g} seconds"}
            except EOFError:
                process.join()
                record["note"] = f"its process ended with exit code {process.exitcode}"
            process.kill()
            process.join()
            del running[pipe]
            yield record | {"seconds": seconds}


def child(pipe: Connection, model_type: str, mappings: list[Any], attention: str) -> None:
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    try:
        model = tiny_model(model_type, mappings)
    except BaseException as error:
        pipe.send({"note": one_line(error)})
        return
    try:
        pipe.send(examine(model, attention))
    except Exception as error:
        pipe.send({"class": type(model).__name__, "verdict": "wrong", "note": one_line(error)})


def examine(model: PreTrainedModel, attention: str) -> dict[str, Any]:
    """What becomes of one model: the record without its type."""
    found = {entry.name: entry for entry in hf_attnswap.inspect(model)}
    record: dict[str, Any] = {
        "class": type(model).__name__,
        "family": family(model, [entry.kind for entry in found.values()]),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "modules": len(found),
        "swapped": 0,
        "ran": 0,
        "reasons": {},
    }
    if not found:
        return record | {"verdict": "no attention"}
    runs, errors = reach(model, {name: model.get_submodule(name) for name in found})
    reached = set().union(*(run.reached for run in runs))
    reasons = {name: entry.reason for name, entry in found.items() if entry.reason}
    for name in found.keys() - reached - reasons.keys():
        reasons[name] = f"no input was found that reaches it ({'; '.join(errors.values()) or 'none fits'})"
    record["runs"] = [f"{run.part or 'whole model'}: {', '.join(run.inputs)}" for run in runs]
    before = [results(model, run) for run in runs]
    kinds = sorted({entry.kind for entry in found.values() if not entry.reason})
    swappable = [kind for kind in kinds if not any(e.reason for e in found.values() if e.kind == kind)]
    for entry in found.values():
        if entry.kind in kinds and entry.kind not in swappable:
            reasons.setdefault(entry.name, f"other {entry.kind} attention of the model cannot be swapped")
    wrong, ran, failed = [], set(), set()
    if swappable:
        for variant in ("softmax", attention):
            result = swapped_runs(model, variant, swappable, runs, before)
            if isinstance(result, str):
                wrong.append(result)
                break
            record[f"difference_{variant}"] = result.pop("difference")
            ran = result.pop("ran")
            record |= {k: v for k, v in result.items() if k in ("swapped", "keywords")}
            wrong += result["wrong"]
            failed |= result["failed"]
            for name, reason in result["refused"].items():
                reasons.setdefault(name, reason)
            if variant == "softmax" and attention != "softmax" and result["refused"]:
                wrong.append(f"softmax itself is refused: {next(iter(result['refused'].values()))}")
        for name in sorted(found.keys() - ran - reasons.keys() - failed):
            wrong.append(f"{name} was swapped and ran, but not the variant")
        record["with_parameters"] = with_parameters(model, swappable, runs)
        record["cache"] = with_cache(model, attention, swappable, runs)
        for what, said in [("parameters", record["with_parameters"]), *record["cache"].items()]:
            wrong += [f"{what}: {said.removeprefix('wrong: ')}"] if said.startswith("wrong: ") else []
    record["ran"] = len(ran)
    record["reasons"] = dict(collections.Counter(reasons.values()).most_common())
    if wrong:
        return record | {"verdict": "wrong", "note": "; ".join(dict.fromkeys(wrong))}
    if len(ran) == len(found):
        return record | {"verdict": "covered"}
    if ran:
        return record | {"verdict": "partly"}
    return record | {"verdict": "refused" if any(found[n].reason for n in found) or reached else "not run"}


def swapped_runs(
    model: PreTrainedModel,
    variant: str,
    kinds: Sequence[str],
    runs: Sequence[Run],
    before: Sequence[Mapping[str, Tensor]],
) -> dict[str, Any] | str:
    """Swap, run and restore; an error that is not a refusal comes back as one line."""
    try:
        hf_attnswap.swap(model, variant, kinds=kinds)
    except UsageError as error:
        everything = {entry.name: str(error) for entry in hf_attnswap.inspect(model)}
        return {"ran": set(), "refused": everything, "failed": set(), "wrong": [], "difference": None}
    except Exception as error:
        return f"swap to {variant}: {one_line(error)}"
    variants = {name: module.attnswap for name, module in model.named_modules() if hasattr(module, NAME)}
    ran: set[str] = set()
    for name, module in variants.items():
        module.register_forward_hook(lambda *call, name=name: ran.add(name))
    keywords = collections.defaultdict(set)

    def recording(module, query, key, value, attention_mask, **kwargs):
        for keyword, given in kwargs.items():
            keywords[keyword].add(type(given).__name__)
        return attnswap_attention(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, recording)
    refused, failed, wrong, differences = {}, set(), [], []
    for run, expected in zip(runs, before, strict=True):
        own = run.reached & variants.keys()
        already = set(ran)
        ran.clear()
        try:
            differences.append(difference(expected, results(model, run)))
        except NotImplementedError as error:
            refused |= dict.fromkeys(own, str(error).partition(": ")[2] or str(error))
        except Exception as error:
            failed |= own
            wrong.append(f"{variant}, {run.part or 'whole model'}: {one_line(error)}")
        else:
            if variant == "softmax" and differences[-1] > TOLERANCE:
                wrong.append(f"softmax through the seam changes {run.part or 'the output'} by {differences[-1]:.1e}")
            if variant != "softmax" and own and differences[-1] < TOLERANCE:
                wrong.append(f"{variant} changes {run.part or 'the output'} by {differences[-1]:.1e} only")
        ran |= already
    hf_attnswap.restore(model)
    AttentionInterface.register(NAME, attnswap_attention)
    for run, expected in zip(runs, before, strict=True):
        if difference(expected, results(model, run)) != 0:
            wrong.append(f"restore does not bring back the output of {run.part or 'the model'}")
    return {
        "swapped": len(variants),
        "ran": ran - refused.keys(),
        "refused": refused,
        "failed": failed,
        "wrong": wrong,
        "difference": max(differences, default=None),
        "keywords": {keyword: sorted(kinds) for keyword, kinds in sorted(keywords.items())},
    }


def attempt(model: PreTrainedModel, variant: str, kinds: Sequence[str], check: Callable[[], str]) -> str:
    """What `check` says of a swapped model; or a refusal, or an error that is none, in words."""
    try:
        hf_attnswap.swap(model, variant, kinds=kinds)
    except UsageError as error:
        return f"refused: {one_line(error)}"
    try:
        return check()
    except NotImplementedError as error:
        return f"refused: {one_line(error)}"
    except Exception as error:
        return f"wrong: {one_line(error)}"
    finally:
        hf_attnswap.restore(model)


def with_parameters(model: PreTrainedModel, kinds: Sequence[str], runs: Sequence[Run]) -> str:
    """Whether a variant with parameters for each head runs, in words."""

    def check() -> str:
        for run in runs:
            if not all(tensor.isfinite().all() for tensor in results(model, run).values()):
                return "wrong: numbers that are not finite"
        return "ran"

    return attempt(model, PARAMETERS, kinds, check)


def with_cache(model: PreTrainedModel, attention: str, kinds: Sequence[str], runs: Sequence[Run]) -> dict[str, str]:
    """For softmax, the variant and a stateful one: whether a cache gives what the text gives at once, in words.

    Nothing where no run has a text, or the unswapped model itself does not go on with its cache.
    """
    found = next(((run, text) for run in runs if (text := text_of(model, run))), None)
    if found is None:
        return {}
    run, text = found

    def apart() -> float:
        ours = second_part(model, run, text)
        return difference({"": whole_output(forward(model, run), run, text)}, {"": ours}) if ours is not None else 1.0

    try:
        if not apart() < TOLERANCE:
            return {}
    except Exception:
        return {}

    def check() -> str:
        return "equal" if (off := apart()) < TOLERANCE else f"wrong: the text in two parts differs by {off:.1e}"

    return {f"cache, {name}": attempt(model, name, kinds, check) for name in ("softmax", attention, STATEFUL)}


def results(model: PreTrainedModel, run: Run) -> dict[str, Tensor]:
    """The tensors of a forward, without the rows of padding, which nobody reads."""
    found, mask = tensors(forward(model, run)), run.inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        return found
    return {path: t[mask.bool()] if t.shape[:2] == mask.shape else t for path, t in found.items()}


def tensors(output: Any, path: str = "") -> dict[str, Tensor]:
    """All floating-point tensors of an output by their place in it; caches and attention weights aside."""
    if isinstance(output, Tensor):
        return {path: output.detach().float()} if output.is_floating_point() else {}
    if isinstance(output, (list, tuple)):
        output = dict(enumerate(output))
    found = {}
    for key, value in output.items() if isinstance(output, Mapping) else ():
        if not re.search("past_key_values|attentions|attn", str(key)):
            found |= tensors(value, f"{path}.{key}")
    return found


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor; infinite where shapes or NaNs differ."""
    largest = 0.0
    for path in expected.keys() & found.keys():
        a, b = expected[path].double(), found[path].double()
        if a.shape != b.shape or not torch.equal(a.isfinite(), b.isfinite()):
            return float("inf")
        a, b = a.nan_to_num(0, 0, 0), b.nan_to_num(0, 0, 0)
        if a.numel():
            largest = max(largest, ((a - b).abs().max() / a.abs().max().clamp(min=1e-12)).item())
    return largest


def family(model: PreTrainedModel, kinds: Sequence[str]) -> str:
    """By what a model takes: several of text, sight and sound, or one of them; text by its decoder and its masks."""
    takes = senses(model)
    if len(takes) > 1:
        return "multimodal"
    if takes != {"text"}:
        return takes.pop()
    if model.config.is_encoder_decoder:
        return "encoder-decoder"
    return "decoder-only" if set(kinds) <= {"causal"} else "encoder"


def one_line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [""])[0]
    text = re.sub(r"/\S*site-packages/", "", text)  # where this machine has its packages is nobody's business
    return f"{type(error).__name__}: {text[:300]}"


def noted(types: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many of the types that were examined take parameters and go on with a cache, and who refuses."""
    lines = []
    for what in ("with_parameters", "cache"):
        said: dict[str, list[str]] = collections.defaultdict(list)
        for record in types:
            found = record.get(what, {})
            for name, text in (found if isinstance(found, dict) else {"parameters": found}).items():
                said[f"{name}: {text.partition(':')[0]}"].append(record["model_type"])
        for text, names in sorted(said.items()):
            listed = "" if text.endswith(("ran", "equal")) else f" ({', '.join(names)})"
            lines.append(f"- {text}: {len(names)}{listed}")
    return lines


def markdown(report: dict[str, Any]) -> str:
    types = report["types"]
    rows = {name: [r for r in types if r["family"] == name] for name in FAMILIES}
    rows["not built"] = [r for r in types if r["family"] is None]
    lines = [
        f"# Model types of transformers {report['transformers']} with `{report['attention']}`",
        "",
        *(f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()),
        "",
        "| family | types | " + " | ".join(VERDICTS) + " |",
        "|---" * (len(VERDICTS) + 2) + "|",
    ]
    for name, own in [*rows.items(), ("all", types)]:
        counts = [sum(r["verdict"] == verdict for r in own) for verdict in VERDICTS]
        lines.append(f"| {name} | {len(own)} | " + " | ".join(map(str, counts)) + " |")
    lines += ["", *noted(types)]
    lines += ["", "A family is " + family.__doc__.splitlines()[0][0].lower() + family.__doc__.splitlines()[0][1:], ""]
    for name, own in rows.items():
        covered = [r["model_type"] for r in own if r["verdict"] == "covered"]
        if covered:
            lines += [f"## Covered, {name} ({len(covered)})", "", ", ".join(covered), ""]
    for verdict in list(VERDICTS)[1:]:
        own = [r for r in types if r["verdict"] == verdict]
        if own:
            lines += [f"## {verdict.capitalize()} ({len(own)})", ""]
        for r in own:
            ran = f" {r['ran']} of {r['modules']} modules ran;" if verdict == "partly" else ""
            why = "; ".join(filter(None, [r.get("note"), *r.get("reasons", {})])) or r.get("class", "")
            lines.append(f"- {r['model_type']}:{ran} {why}")
        lines += [""] if own else []
    return "\n".join(lines)


if __name__ == "__main__":
    with one_line_errors("coverage"):
        main()
