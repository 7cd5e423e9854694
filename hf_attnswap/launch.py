"""Build the accelerator of a program that `accelerate launch` or torchrun may start, and print its messages."""

import os
import sys
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, GradientAccumulationPlugin, parse_flag_from_env
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from .errors import UsageError


def build_accelerator(gradient_accumulation_steps: int = 1, **arguments: Any) -> Accelerator:
    """Return an Accelerator that runs as its launcher was asked to, on the CPU where there is no other device.

    Args:
        gradient_accumulation_steps: how many batches of each process make one optimiser step.
        arguments: further arguments of `accelerate.Accelerator`.

    Raises:
        UsageError: the accelerator has another number of processes or another kind of sharding than the launcher was
            asked for. Processes that do not know of each other would each train alone, and write over one another. Or
            the launcher was asked for tensor, context or sequence parallelism, or for DeepSpeed's ZeRO-3.
    """
    for kind in ("tp", "cp", "sp"):  # before accelerate looks for what each of them needs
        size = os.environ.get(f"PARALLELISM_CONFIG_{kind.upper()}_SIZE", "1")
        if parse_flag_from_env("ACCELERATE_USE_PARALLELISM_CONFIG") and size != "1":
            raise UsageError(
                f"the launcher was asked for {kind}_size {size}, and processes here share out texts and, under FSDP2, "
                f"weights, neither the heads of a layer nor the tokens of a text: leave {kind}_size at 1"
            )
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
            "use torchrun --nproc_per_node, or accelerate launch with a config of distributed_type: MULTI_GPU, which "
            "takes gloo where there is no GPU"
        )
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        wanted = parse_flag_from_env(f"ACCELERATE_USE_{kind.value}")
        if wanted and accelerator.distributed_type != kind:
            raise UsageError(
                f"the launcher was asked for {kind.value}, and this runs as {accelerator.distributed_type.value}"
            )
    require_whole_weights(accelerator)
    if not accelerator.is_main_process:
        disable_progress_bar()
    return accelerator


def require_whole_weights(accelerator: Accelerator) -> None:
    """Raise UsageError under DeepSpeed's ZeRO-3.

    It gathers the weights of a module while that module is called. Those of a feature map are handed to the op, and an
    alignment and a distillation use weights of other modules as well.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        if accelerator.state.deepspeed_plugin.zero_stage == 3:
            raise UsageError(
                "the launcher was asked for DeepSpeed's zero_stage 3, under which the weights of variants are empty "
                "when they are used: set zero_stage: 2, or shard the weights by FSDP2 (examples/configs/fsdp2.yaml)"
            )


def unit_bar(accelerator: Accelerator, total: int, initial: int = 0, unit: str = "tokens") -> tqdm:
    """Return a progress bar that shows units done, units per second and time left, on the main process only.

    Where stderr is a file and no terminal, the bar is redrawn at most every 30 seconds.

    Args:
        total: units of the whole work.
        initial: units that were done before.
        unit: what the units are called.
    """
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
    """Print `line` to stderr, once for all processes."""
    if accelerator.is_main_process:
        print(line, file=sys.stderr, flush=True)
