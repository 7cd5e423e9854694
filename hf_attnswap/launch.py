"""The accelerator of an example script, the check that it runs as the launcher was asked to, and what it prints."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env, set_seed
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from hf_attnswap import UsageError
from hf_attnswap.sources.files import require_empty


def build_accelerator(gradient_accumulation_steps: int = 1, **arguments: Any) -> Accelerator:
    """An Accelerator, on the CPU where there is no other device.

    Raises:
        UsageError: it does not run as the launcher was asked to. Processes that do not know of each other would each
            train alone, and write over one another.
    """
    # The plugin, because Accelerator(gradient_accumulation_steps=) fails on the "auto" of a DeepSpeed config.
    plugin = GradientAccumulationPlugin(num_steps=gradient_accumulation_steps, sync_with_dataloader=False)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_plugin=plugin, **arguments
    )
    environment, processes = os.environ, accelerator.num_processes
    asked = environment.get("WORLD_SIZE", "1")
    if "WORLD_SIZE" not in environment and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys():
        # What `accelerate launch` leaves behind when it starts one process in place of several (accelerate#2741).
        asked = "several"
    if asked != str(processes):
        raise UsageError(
            f"the launcher was asked for {asked} processes, and this runs as {processes}: to run several on the CPU, "
            "use accelerate launch --config_file examples/configs/multi_cpu.yaml, or torchrun"
        )
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        wanted = parse_flag_from_env(f"ACCELERATE_USE_{kind.value}")
        if wanted and accelerator.distributed_type != kind:
            raise UsageError(
                f"the launcher was asked for {kind.value}, and this runs as {accelerator.distributed_type.value}"
            )
    if not accelerator.is_main_process:
        disable_progress_bar()
    return accelerator


def start(args: argparse.Namespace) -> Accelerator:
    """The accelerator of a training script, after its output folder and its trackers are found to be fit."""
    accelerator = build_accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=args.report_to if args.with_tracking else None,
        project_dir=args.output_dir,
    )
    require_empty(args.output_dir / "model" if args.resume_from_checkpoint else args.output_dir)
    accelerator.wait_for_everyone()  # before one process writes into the folder that another finds empty
    if args.with_tracking and not accelerator.log_with:
        raise UsageError(f"report_to is {args.report_to!r}, but no such tracker is installed")
    set_seed(args.seed)
    return accelerator


def run_script(
    parser: argparse.ArgumentParser,
    stage: Callable[[argparse.Namespace, Accelerator], Any],
    argv: Sequence[str] | None = None,
) -> Any:
    """Parse the arguments, run the stage on the accelerator that they ask for, and end the processes' group."""
    args = parser.parse_args(argv)
    accelerator = start(args)
    found = stage(args, accelerator)
    accelerator.end_training()
    return found


def unit_bar(accelerator: Accelerator, total: int, initial: int = 0, unit: str = "tokens") -> tqdm:
    """Units done, units per second and time left; seldom redrawn where stderr is a file."""
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.2 if sys.stderr.isatty() else 30,
        disable=not accelerator.is_main_process,
    )


def say(accelerator: Accelerator, line: str) -> None:
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)
