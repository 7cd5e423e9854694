"""Describe what a run was made with: the model, the machine, the versions."""

import datetime
import os
import platform
import re
import sys
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel

from .. import __version__
from ..report.types import Machine, Model


def describe_model(model: PreTrainedModel, name: str) -> Model:
    """Return the shape of `model`, under the name that the report gives it."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    return Model(
        name=name,
        parameters=sum(p.numel() for p in model.parameters()),
        attention_layers=config.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def machine(device: torch.device) -> Machine:
    """Return the processor, memory, device and platform that this process runs on."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.M)
        processor = found[1].strip() if found else processor
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0.0
    return Machine(
        processor=processor,
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gib=round(memory, 1),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        platform=platform.platform(),
    )


def now() -> str:
    """Return the date and time of a report in UTC, in ISO 8601 to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that the numbers depend on, by name."""
    return {
        "hf_attnswap": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }
