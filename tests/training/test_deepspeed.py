"""DeepSpeed's ZeRO-2 in the stages, on two CPU processes, with the result of one process."""

import importlib.util
import os
import signal

import pytest
from test_fsdp2 import assert_near, command, on  # noqa: F401
from test_processes import assert_same_run

from hf_attnswap import UsageError
from hf_attnswap.training.command import main
from hf_attnswap.training.state import RunState

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


def killed_in_a_checkpoint(arguments):
    """Train up to the second checkpoint, which this process does not write."""
    save, calls = RunState.save, []

    def torn(state, folder):
        calls.append(folder)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        save(state, folder)

    RunState.save = torn
    by_gloo(arguments)


def refused(arguments):
    with pytest.raises(UsageError, match="zero_stage 3"):
        main(arguments)


def zero(stage):
    return ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(command, train, tmp_path, stage):  # noqa: F811
    two = command(stage, tmp_path / "two")
    assert on(2, (by_gloo, two), (by_gloo, two), environment=zero(2)) == [0, 0]
    one = command(stage, tmp_path / "one", "--gradient_accumulation_steps", 2)
    train(one[0], one[1:])
    assert_near(tmp_path / "two", tmp_path / "one")


def test_a_run_that_was_killed_goes_on(command, tmp_path):  # noqa: F811
    """Rank 1 in its second checkpoint."""
    more = ["--checkpointing_steps", "2"]
    whole = command("finetune", tmp_path / "whole", *more)
    assert on(2, (by_gloo, whole), (by_gloo, whole), environment=zero(2)) == [0, 0]
    killed = command("finetune", tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")
    codes = on(2, (by_gloo, killed), (killed_in_a_checkpoint, killed), environment=zero(2))
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert on(2, (by_gloo, killed), (by_gloo, killed), environment=zero(2)) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_zero_3_is_refused(command, tmp_path):  # noqa: F811
    arguments = command("finetune", tmp_path / "out")
    assert on(2, (refused, arguments), (refused, arguments), environment=zero(3)) == [0, 0]
