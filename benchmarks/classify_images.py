"""Train a small ViT on MNIST's digits with one attention after the other, all alike, and compare them with softmax.

Every arm starts from the same weights, sees the same digits in the same order, and trains all of its weights, those of
the variant among them, from scratch. What is compared is how well an attention learns, not how well it stands in for
the softmax of a trained model.

    accelerate launch benchmarks/classify_images.py --images t10k-images-idx3-ubyte.gz \\
        --labels t10k-labels-idx1-ubyte.gz --arm none --arm relu_norm --output_dir digits
"""

import argparse
import gzip
import math
from collections.abc import Sequence
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from rich.console import Console
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_attnswap import UsageError, attentions
from hf_attnswap import report as reports
from hf_attnswap.config import NAME
from hf_attnswap.errors import one_line_errors
from hf_attnswap.evaluation.classification import f1, matthews
from hf_attnswap.evaluation.result import Result
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.launch import build_accelerator, say
from hf_attnswap.report import types
from hf_attnswap.report.types import Data, Report
from hf_attnswap.sources.files import require_empty
from hf_attnswap.tradeoff import Arm, describe_model, machine, now, versions
from hf_attnswap.tradeoff.arms import build
from hf_attnswap.tradeoff.rows import compared
from hf_attnswap.training.batches import Batches
from hf_attnswap.training.loop import train
from hf_attnswap.training.options import positive
from hf_attnswap.training.run import progress_bar

SETTINGS = "num_train_epochs per_device_train_batch_size learning_rate num_warmup_steps".split()
ARMS = "none relu_norm elu hedgehog".split()
SHAPE = {
    "patch_size": 7, "num_channels": 1, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> Report:
    """Run the script; return what it writes to report.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="idx file of uint8 images, gzip or not")
    parser.add_argument("--labels", type=Path, required=True, help="idx file of their labels, gzip or not")
    parser.add_argument(
        "--arm", action="append", help=f'such as "relu_power:p=8"; softmax is always there (default: {" ".join(ARMS)})'
    )
    parser.add_argument(
        "--num_eval_images", type=positive, default=2000, help="drawn, always the same; the others are to train on "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--num_train_epochs", type=positive, default=6, help="(default: %(default)s)")
    parser.add_argument("--per_device_train_batch_size", type=positive, default=64, help="(default: %(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(default: %(default)s)")
    parser.add_argument("--num_warmup_steps", type=int, default=50, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the order (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="for report.json, report.md and report.html")
    args = parser.parse_args(argv)
    arms = [Arm.parse(text) for text in dict.fromkeys(["softmax", *(args.arm or ARMS)])]
    accelerator = build_accelerator()
    require_empty(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    training, validation = split(read_idx(args.images, 3), read_idx(args.labels, 1), args.num_eval_images)
    settings = {name: getattr(args, name) for name in SETTINGS} | {"processes": accelerator.num_processes}
    rows: list[types.Arm] = []
    control: list[Result] = []
    for arm in arms:
        say(accelerator, f"{arm.label}: {len(training)} images, {args.num_train_epochs} times")
        model, losses = fit(arm, training, accelerator, args)
        measured = results(predictions(model, validation), validation[:, 0].tolist())
        control = control or measured
        rows.append(described(arm, model, losses, measured, control, args))
        report = Report(
            kind="classification",
            title="A small ViT on images of digits",
            model=describe_model(model, "ViT"),
            machine=machine(accelerator.device),
            versions=versions(),
            date=now(),
            command="python benchmarks/classify_images.py",
            seeds=[args.seed],
            data=Data(args.images.name, len(training), args.images.name, len(validation), "images"),
            arms=rows,
            settings=settings | SHAPE,
        )
        if accelerator.is_main_process:
            reports.write_all(report, args.output_dir)
    if accelerator.is_main_process:
        Console().print(reports.show(report, args.output_dir / "report.html"))
    return report


def described(
    arm: Arm, model: nn.Module, losses: list[float], measured: list[Result], control: list[Result], args
) -> types.Arm:
    """Return the arm as the report has it, its metrics beside those of `control`."""
    cls, metrics = attentions.get(arm.attention), []
    for result, other in zip(measured, control, strict=True):
        error = result.standard_error
        metric = types.Metric(
            result.task, result.metric, result.higher_is_better, result.value,
            None if math.isnan(error) else error, len(result.scores),
        )  # fmt: skip
        if result is not other:
            metric.difference = compared("softmax", result.less(other), not result.higher_is_better)
        metrics.append(metric)
    own = [p.numel() for variant in swapped_modules(model).values() for p in variant.parameters()]
    saved = (getattr(model.config, NAME, None) or {}).get("swapped") or []
    return types.Arm(
        label=arm.label, attention=arm.attention, options=arm.options, control=cls.control or arm.label == "softmax",
        formula=cls.formula, cost=cls.cost, cost_class=cls.cost_class, source=cls.source,
        swapped=[types.Group(**group) for group in saved], new_parameters=sum(own), status="measured", metrics=metrics,
        training=[
            types.Stage(
                "train", "all weights, from scratch", args.images.name, None, len(losses), args.learning_rate,
                losses[0], losses[-1],
            )
        ],
    )  # fmt: skip


def read_idx(path: Path, dimensions: int) -> Tensor:
    """A file of MNIST's format: two zero bytes, type (8: uint8), number of dimensions, their sizes, the numbers."""
    if not path.is_file():
        raise UsageError(f"{str(path)!r} does not exist")
    data = path.read_bytes()
    data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    if data[:4] != bytes([0, 0, 8, dimensions]):
        raise UsageError(f"{str(path)!r} is no idx file of uint8 with {dimensions} dimension(s)")
    sizes = [int(size) for size in numpy.frombuffer(data, ">u4", dimensions, offset=4)]
    start = 4 + 4 * dimensions
    if len(data) < start + math.prod(sizes):
        raise UsageError(f"{str(path)!r} is cut off: it says {sizes}, and has {len(data) - start} numbers")
    return torch.tensor(numpy.frombuffer(data, numpy.uint8, math.prod(sizes), start).reshape(sizes))


def split(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """To train and to validate on: the label and then the pixels of each image, uint8 `[N, 1 + height * width]`."""
    if len(images) != len(labels) or not 0 < count < len(images) or images.shape[1] != images.shape[2]:
        raise UsageError(
            f"got images {tuple(images.shape)}, {len(labels)} labels and {count} images to validate on; expected as "
            "many labels as images, square ones, and some left to train on"
        )
    rows = torch.cat([labels[:, None], images.flatten(1)], dim=1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]  # the files are sorted by hand
    return rows[:-count], rows[-count:]


def fit(
    arm: Arm, rows: Tensor, accelerator: Accelerator, args: argparse.Namespace
) -> tuple[ViTForImageClassification, list[float]]:
    """The trained model of an arm, and the loss of each step."""
    set_seed(args.seed)
    side, labels = round((rows.shape[1] - 1) ** 0.5), int(rows[:, 0].max()) + 1
    model = ViTForImageClassification(ViTConfig(image_size=side, num_labels=labels, **SHAPE))
    model = build(arm, model)
    per_step = args.per_device_train_batch_size * accelerator.num_processes
    steps = len(rows) * args.num_train_epochs // per_step
    with progress_bar(accelerator, steps, per_step, "images") as progress:
        losses = train(
            accelerator,
            model.to(accelerator.device).train(),
            Batches(rows, args.per_device_train_batch_size, args.seed),
            lambda model, batch: model(pixel_values=pixels(batch), labels=batch[:, 0]).loss,
            learning_rate=args.learning_rate,
            steps=steps,
            warmup=args.num_warmup_steps,
            progress=progress,
        )
    accelerator.free_memory()
    return model.eval(), losses


def pixels(rows: Tensor) -> Tensor:
    """float32 `[N, 1, height, width]`, -1 to 1."""
    side = round((rows.shape[1] - 1) ** 0.5)
    return rows[:, 1:].reshape(-1, 1, side, side) / 127.5 - 1


@torch.no_grad()
def predictions(model: nn.Module, rows: Tensor) -> list[int]:
    device = next(model.parameters()).device
    parts = [model(pixel_values=pixels(part.to(device).long())).logits.argmax(-1).tolist() for part in rows.split(250)]
    return [label for part in parts for label in part]


def results(predicted: Sequence[int], true: Sequence[int]) -> list[Result]:
    """One per metric, over the same images, so that arms can be paired."""
    pairs = tuple(zip(predicted, true, strict=True))
    return [
        Result("digits", "accuracy", tuple(float(p == t) for p, t in pairs)),
        Result("digits", "f1", pairs, aggregate=lambda some: f1(*zip(*some, strict=True), average="macro")),
        Result("digits", "matthews", pairs, aggregate=lambda some: matthews(*zip(*some, strict=True))),
    ]


if __name__ == "__main__":
    with one_line_errors("classify_images"):
        main()
