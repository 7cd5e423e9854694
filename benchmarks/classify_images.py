"""Train a small ViT on MNIST's digits with one attention after the other, all alike, and compare them with softmax.

Every arm starts from the same weights, sees the same digits in the same order, and trains all of its weights, those of
the variant among them, from scratch. What is compared is how well an attention learns, not how well it stands in for
the softmax of a trained model.

    accelerate launch benchmarks/classify_images.py --images t10k-images-idx3-ubyte.gz \\
        --labels t10k-labels-idx1-ubyte.gz --arm none --arm relu_norm --output_dir digits
"""

import argparse
import datetime
import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from hf_attnswap import UsageError
from hf_attnswap.errors import one_line_errors
from hf_attnswap.evaluation.classification import f1, matthews
from hf_attnswap.evaluation.result import Result
from hf_attnswap.integration.swapping import describe
from hf_attnswap.launch import build_accelerator, say
from hf_attnswap.sources.files import require_empty, write_whole
from hf_attnswap.tradeoff import Arm, machine, versions
from hf_attnswap.tradeoff.arms import build
from hf_attnswap.training.batches import Batches
from hf_attnswap.training.loop import train
from hf_attnswap.training.options import positive
from hf_attnswap.training.run import progress_bar

ARMS = "none relu_norm elu hedgehog".split()
SHAPE = {
    "patch_size": 7, "num_channels": 1, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the script; what it writes to results.json."""
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
    parser.add_argument("--output_dir", type=Path, required=True, help="for results.json and results.md")
    args = parser.parse_args(argv)
    arms = [Arm.parse(text) for text in dict.fromkeys(["softmax", *(args.arm or ARMS)])]
    accelerator = build_accelerator()
    require_empty(args.output_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    training, validation = split(read_idx(args.images, 3), read_idx(args.labels, 1), args.num_eval_images)
    report: dict[str, Any] = {
        "training_images": len(training),
        "validation_images": len(validation),
        "arguments": {name: getattr(args, name) for name in (
            "num_train_epochs", "per_device_train_batch_size", "learning_rate", "num_warmup_steps", "seed"
        )},
        "model": SHAPE,
        "machine": machine(accelerator.device),
        "processes": accelerator.num_processes,
        "versions": versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "rows": [],
    }  # fmt: skip
    control: list[Result] = []
    for arm in arms:
        say(accelerator, f"{arm.label}: {len(training)} images, {args.num_train_epochs} times")
        model, losses = fit(arm, training, accelerator, args)
        found = results(predictions(model, validation), validation[:, 0].tolist())
        control = control or found
        rows = [ours.row(None if ours is other else other) for ours, other in zip(found, control, strict=True)]
        row = {"label": arm.label, "options": arm.options, "attention": describe(model), "last_loss": losses[-1]}
        report["rows"].append(row | {entry["metric"]: entry for entry in rows})
        if accelerator.is_main_process:
            write_whole(args.output_dir / "results.json", (json.dumps(report, indent=1) + "\n").encode())
            write_whole(args.output_dir / "results.md", markdown(report).encode())
    accelerator.print(markdown(report))
    return report


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


def markdown(report: dict[str, Any]) -> str:
    """The table, and how it came about."""
    columns = ("attention", "accuracy, %", "macro F1", "Matthews", "accuracy, points to softmax (95 %)",
               "F1 to softmax (95 %)", "Matthews to softmax (95 %)", "verdict")  # fmt: skip
    lines: list[Sequence[str]] = [columns, ["---"] * len(columns)]
    for row in report["rows"]:
        cells = [row["label"], f"{100 * row['accuracy']['value']:.2f}", f"{row['f1']['value']:.4f}",
                 f"{row['matthews']['value']:.4f}"]  # fmt: skip
        for name, scale, form in (("accuracy", 100, "{:+.2f}"), ("f1", 1, "{:+.4f}"), ("matthews", 1, "{:+.4f}")):
            found = row[name].get("difference")
            bounds = found and [form.format(scale * found[part]) for part in ("value", "low", "high")]
            cells.append(f"{bounds[0]} ({bounds[1]} to {bounds[2]})" if bounds else "-")
        lines.append([*cells, row["accuracy"].get("verdict", "-")])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    told, shape, device = report["arguments"], report["model"], report["machine"]
    return f"""# A small ViT on MNIST's digits

{table}

- Every arm trains from scratch, from the same weights, on {report["training_images"]:,} digits, \
{told["num_train_epochs"]} times, in batches of {told["per_device_train_batch_size"] * report["processes"]}, AdamW at \
{told["learning_rate"]:g} after {told["num_warmup_steps"]} steps of warm-up; seed {told["seed"]}.
- ViT: {shape["num_hidden_layers"]} layers, {shape["num_attention_heads"]} heads, width {shape["hidden_size"]}, \
patches of {shape["patch_size"]} x {shape["patch_size"]}; the class is read from the first token, which sees the image \
through attention alone.
- Measured on {report["validation_images"]:,} other digits. The intervals are of a bootstrap over these, paired with \
softmax's; the verdict is that of accuracy; how runs with other seeds differ is not in them.
- {device["processor"]}, {device["threads"]} thread(s), {device["device"]}, torch {report["versions"]["torch"]}, \
transformers {report["versions"]["transformers"]}, {report["date"][:10]}.
"""


if __name__ == "__main__":
    with one_line_errors("classify_images"):
        main()
