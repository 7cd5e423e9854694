"""DeepSpeed's ZeRO in the stages, on two CPU processes, with the result of one process."""

import importlib.util

import pytest
from test_fsdp2 import assert_near, command, on  # noqa: F401

from hf_attnswap.training.command import main

# What accelerate launch makes of examples/configs/deepspeed_zero2.yaml; the last keeps DeepSpeed off a GPU.
ZERO = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "DS_ACCELERATOR": "cpu",
}
STAGES = ("align", "align with LoRA", "distill", "distill with LoRA", "finetune", "finetune with LoRA")

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]


def by_gloo(arguments):
    """Train without DeepSpeed's own exchange over shared memory, which it would compile first."""
    import deepspeed

    deepspeed.ops.__compatible_ops__.clear()
    main(arguments)


def zero(stage):
    return ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


@pytest.mark.parametrize("shards", [2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(command, train, tmp_path, stage, shards):  # noqa: F811
    two = command(stage, tmp_path / "two")
    assert on(2, (by_gloo, two), (by_gloo, two), environment=zero(shards)) == [0, 0]
    one = command(stage, tmp_path / "one", "--gradient_accumulation_steps", 2)
    train(one[0], one[1:])
    assert_near(tmp_path / "two", tmp_path / "one")
