"""What of a run a checkpoint holds: tensors as safetensors, the rest as JSON, so that reading it runs no code."""

import json
import logging
import os
import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ..errors import UsageError
from .shards import Parts, save_parts

logger = logging.getLogger(__name__)
_ENGINE = "engine"  # the folder that DeepSpeed writes its own files to


@dataclass(frozen=True, eq=False)
class RunState:
    """Save and load the weights that train, their optimiser, and the random numbers of each process.

    Frozen weights are those of the model that the run began with, and learning rates follow from the number of steps.

    Attributes:
        model, optimizer: as `accelerator` has prepared them.
    """

    accelerator: Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def save(self, folder: Path) -> None:
        """Write what this process holds to `folder`; every process calls this.

        Raises:
            OSError, SafetensorError: it could not be written.
        """
        accelerator = self.accelerator
        scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
        own = {"random": _random_state(accelerator.device), "scaler": scaler}
        (folder / f"process_{accelerator.process_index}.json").write_text(json.dumps(own))
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.model.save_checkpoint(str(folder), _ENGINE)
        elif accelerator.distributed_type == DistributedType.FSDP:
            part = f"-{accelerator.process_index + 1:05}-of-{accelerator.num_processes:05}"
            save_parts(self._weights(), folder / f"trainable{part}.safetensors")
            save_parts(self._moments(), folder / f"optimizer{part}.safetensors")
        elif accelerator.is_main_process:
            save_parts(self._weights(), folder / "trainable.safetensors")
            save_parts(self._moments(), folder / "optimizer.safetensors")

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote, on as many processes as then or on others.

        Raises:
            UsageError: the folder holds other parameters than this run trains, or a file that is not what it should be.
        """
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            try:
                with _no_code_in_pickles():
                    self.model.load_checkpoint(str(folder), _ENGINE)
            except pickle.UnpicklingError:
                raise UsageError(
                    f"checkpoint {str(folder)!r} has more in its files than DeepSpeed saves, which could run code: "
                    "resume from another"
                ) from None
        else:
            self._load_tensors(folder)
        self._load_numbers(folder)

    def _weights(self) -> dict[str, Tensor]:
        """The parameters that train, by names that do not depend on the number of processes."""
        plain = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return {name: parameter for name, parameter in plain.named_parameters() if parameter.requires_grad}

    def _moments(self) -> dict[str, Tensor]:
        """What the optimiser keeps of each parameter, as `name.exp_avg`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self._weights().items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }

    def _load_tensors(self, folder: Path) -> None:
        others = UsageError(f"checkpoint {str(folder)!r} holds other parameters than this run trains")
        weights = self._weights()
        with Parts(sorted(folder.glob("trainable*.safetensors"))) as saved:
            if saved.shapes() != {name: tuple(parameter.shape) for name, parameter in weights.items()}:
                raise others
            for name, parameter in weights.items():
                saved.read_into(name, parameter)
        fused = self.optimizer.param_groups[0]["fused"]
        with Parts(sorted(folder.glob("optimizer*.safetensors"))) as saved:
            for whole, shape in saved.shapes().items():
                name, _, key = whole.rpartition(".")
                if name not in weights or shape not in ((), tuple(weights[name].shape)):
                    raise others
                parameter = weights[name]
                if key == "step":  # the fused kernel wants it beside the parameter
                    value = torch.zeros((), device=parameter.device if fused else "cpu")
                else:
                    value = torch.zeros_like(parameter)
                saved.read_into(whole, value)
                self.optimizer.state[parameter][key] = value

    def _load_numbers(self, folder: Path) -> None:
        """Take over the random numbers of this process, and how a loss in float16 is scaled."""
        process = self.accelerator.process_index
        path = folder / f"process_{process}.json"
        own = path.is_file()
        if not own:
            logger.warning("checkpoint %r has no random numbers of process %d: it takes new ones", str(folder), process)
            path = folder / "process_0.json"
        try:
            saved = json.loads(path.read_text())
            if own:
                _set_random_state(saved["random"], self.accelerator.device)
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
        except (OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"{str(path)!r} is not the state of a process: {error!r}") from None


def require_checkpoints(accelerator: Accelerator) -> None:
    """Raise UsageError where a run of this kind cannot be kept in checkpoints: FSDP1, which flattens parameters."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise UsageError("checkpoints are not written under FSDP1: set fsdp_version: 2 in the config of the launch")


def _random_state(device: torch.device) -> dict[str, Any]:
    name, keys, *rest = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": torch.get_rng_state().tolist(),
    }
    if device.type != "cpu":
        states["device"] = torch.get_device_module(device).get_rng_state().tolist()
    return states


def _set_random_state(states: dict[str, Any], device: torch.device) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    if device.type != "cpu" and "device" in states:
        torch.get_device_module(device).set_rng_state(torch.tensor(states["device"], dtype=torch.uint8))


@contextmanager
def _no_code_in_pickles() -> Iterator[None]:
    """Keep DeepSpeed, which unpickles its own files, to tensors, plain values and the few classes that it saves."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variable = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch asks it whatever weights_only a caller gives
    before = os.environ.get(variable)
    os.environ[variable] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before
