"""FSDP2 in the stages: weights, gradients and optimiser shared out over processes, with the result of one process."""

import copy
import json
import os
import shutil
import signal
import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from test_processes import assert_same_run, losses, torn, weights
from tiny_models import tiny
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy
from training_fixtures import forked

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.integration.swapping import swapped_modules
from hf_attnswap.training.align import (
    aligning,
    aligning_projections,
    alignment_loss,
    projection_parameters,
    trainable_parameters,
)
from hf_attnswap.training.command import main
from hf_attnswap.training.distill import distillation_loss
from hf_attnswap.training.stages.align import Align
from hf_attnswap.training.teacher import frozen

# What accelerate launch makes of examples/configs/fsdp2.yaml.
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}
STAGES = {
    "align": ("align",),
    "align with projections": ("align", "--train", "attention"),
    "align with LoRA": ("align", "--train", "attention", "--use_lora"),
    "distill": ("distill", "--hidden_weight", "1"),
    "distill with LoRA": ("distill", "--use_lora"),
    "finetune": ("finetune",),
    "finetune with LoRA": ("finetune", "--use_lora"),
}


def sharded(rank, count, port, environment, run, *arguments):
    """Train as one of some processes that share out the model; on a CPU, which accelerate has to be made to take."""
    os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1")
    os.environ |= {"MASTER_PORT": port, **environment}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    torch.accelerator.is_available = lambda: True
    run(*arguments)


def on(processes, *calls, environment=FSDP2):
    """Run `(function, its arguments)` on each process, one of `calls` for each, launched with an environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return forked(sharded, *((rank, processes, port, environment, *call) for rank, call in enumerate(calls)))


@pytest.fixture
def command(checkpoint, text):
    def build(stage, folder, *more):
        given = dict(model_name_or_path=checkpoint, train_file=text, output_dir=folder, block_size=32)
        options = [part for option, value in given.items() for part in (f"--{option}", value)]
        options += ["--attention", "hedgehog+window", "--option", "window=4", "--max_train_steps", "4"]
        options += ["--learning_rate", "1e-3", *more]
        return list(map(str, [*STAGES[stage], *options]))

    return build


def assert_near(a, b):
    assert losses(a) == pytest.approx(losses(b), rel=1e-5)
    ours, other = weights(a), weights(b)
    assert ours.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-5)


@pytest.fixture
def one_process():
    """A mesh of one process, on which parameters are DTensors too."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.device_mesh.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


TEXT = torch.arange(3, 43).view(2, 20)


def swapped():
    torch.manual_seed(0)
    return hf_attnswap.swap(tiny("llama"), "hedgehog+window", window=4)


def gradients(model, loss):
    loss.backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def plain_gradients(model, loss):
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("group", ["head", "model"])
def test_distillation_with_a_sharded_head(one_process, group):
    """Which is in a group of its own, or in that of the model, and there is given back after the forward pass."""
    plain, teacher = swapped(), frozen(tiny("llama"))
    model, sharded_teacher = copy.deepcopy(plain), copy.deepcopy(teacher)
    for each in (model, sharded_teacher):
        if group == "head":
            fully_shard([each.model.norm, each.lm_head], mesh=one_process, reshard_after_forward=True)
        fully_shard(each, mesh=one_process, reshard_after_forward=True)
    told = dict(hidden_weight=1.0, tokens_at_once=7)
    expected = distillation_loss(plain, teacher, TEXT, **told)
    found = distillation_loss(model, sharded_teacher, TEXT, **told)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    expected, found = plain_gradients(plain, expected), gradients(model, found)
    assert found.keys() == expected.keys() and "lm_head.weight" in found
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("of", ["variants", "modules"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_alignment_inside_sharded_layers(one_process, of, dtype):
    plain = swapped()
    (trainable_parameters if of == "variants" else projection_parameters)(plain)
    model = copy.deepcopy(plain)
    observing = aligning if of == "variants" else aligning_projections
    with observing(plain) as ours, observing(model) as theirs:
        policy = MixedPrecisionPolicy(param_dtype=dtype)
        units = swapped_modules(model)
        for path in units:
            unit = units[path] if of == "variants" else model.get_submodule(path)
            fully_shard(unit, mesh=one_process, mp_policy=policy)
        for layer in model.model.layers:
            fully_shard(layer, mesh=one_process, mp_policy=policy)
        fully_shard(model, mesh=one_process, mp_policy=policy)
        expected, found = alignment_loss(plain, TEXT, ours), alignment_loss(model, TEXT, theirs)
        assert found.item() == pytest.approx(expected.item(), rel=1e-6 if dtype is None else 0.1)
        expected, found = plain_gradients(plain, expected), gradients(model, found)
    assert found.keys() == expected.keys() and found
    for name, gradient in expected.items():
        near = dict(rtol=1e-4, atol=1e-7) if dtype is None else dict(rtol=0, atol=0.1 * gradient.abs().max().item())
        torch.testing.assert_close(found[name], gradient, **near)


def launch(version=2, policy=transformer_auto_wrap_policy, empty=False):
    """What an Accelerator tells of its launch."""
    plugin = SimpleNamespace(
        auto_wrap_policy=policy, cpu_ram_efficient_loading=empty, transformer_cls_names_to_wrap=None
    )
    return SimpleNamespace(
        distributed_type=DistributedType.FSDP, is_fsdp2=version == 2, state=SimpleNamespace(fsdp_plugin=plugin)
    )


@pytest.mark.parametrize(
    "options, accelerator, said",
    [
        ({"linear_branch_alone": True}, launch(), "--linear_branch_alone does not work under FSDP2"),
        ({"weights_loss": 1.0}, launch(), "--weights_loss does not work under FSDP2"),
        ({}, launch(policy=None), "needs fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ({}, launch(empty=True), "set fsdp_cpu_ram_efficient_loading: false"),
        ({}, launch(version=1), "align does not work under FSDP1, .*: set fsdp_version: 2"),
        ({"train": "attention", "use_lora": True}, launch(version=1), "align does not work under FSDP1"),
    ],
)
def test_what_is_refused(checkpoint, text, tmp_path, options, accelerator, said):
    given = dict(model_name_or_path=checkpoint, train_file=text, output_dir=tmp_path, max_train_steps=1, block_size=32)
    stage = Align(**given, **options)
    with pytest.raises(UsageError, match=said):
        if accelerator.is_fsdp2:
            stage.prepare(swapped(), torch.arange(3, 35).view(1, 32), accelerator)
        else:
            stage.run(accelerator)


@pytest.mark.long
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_as_one(command, train, tmp_path, stage):
    two = command(stage, tmp_path / "two")
    assert on(2, (main, two), (main, two)) == [0, 0]
    one = command(stage, tmp_path / "one", "--gradient_accumulation_steps", 2)
    train(one[0], one[1:])
    assert_near(tmp_path / "two", tmp_path / "one")


@pytest.mark.long
@pytest.mark.parametrize("stage", ["align", "distill", "distill with LoRA"])
def test_one_of_two_processes_is_killed(command, train, tmp_path, stage):
    """In its second checkpoint; two processes go on as if nothing had happened, and one goes on alone."""
    more = ["--checkpointing_steps", "2"]
    whole = command(stage, tmp_path / "whole", *more)
    assert on(2, (main, whole), (main, whole)) == [0, 0]
    killed = command(stage, tmp_path / "killed", *more, "--resume_from_checkpoint", "latest")
    codes = on(2, (main, killed), (torn, killed, 3))
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    assert not (tmp_path / "killed" / "model").exists()
    shutil.copytree(tmp_path / "killed", tmp_path / "alone")
    assert on(2, (main, killed), (main, killed)) == [0, 0]
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    alone = command(stage, tmp_path / "alone", *more, "--resume_from_checkpoint", "latest")
    train(alone[0], [*alone[1:], "--gradient_accumulation_steps", 2])
    assert_near(tmp_path / "alone", tmp_path / "whole")


@pytest.mark.long
def test_the_stages_of_a_recipe_follow_each_other(checkpoint, text, train, tmp_path):
    """On the same accelerator; the teacher of the second is the original, without any swapped layer."""
    recipe = dict(model_name_or_path=checkpoint, train_file=text, block_size=32, max_train_steps=2)
    recipe |= dict(attention="hedgehog+window", options={"window": 4}, learning_rate=1e-3)
    recipe["stages"] = [{"stage": name} for name in ("align", "distill", "finetune")]
    recipe["stages"][1]["teacher_name_or_path"] = checkpoint
    (tmp_path / "two.yaml").write_text(json.dumps(recipe))
    (tmp_path / "one.yaml").write_text(json.dumps(recipe | {"gradient_accumulation_steps": 2}))
    one, two = (
        ["--recipe", str(tmp_path / f"{name}.yaml"), "--output_dir", str(tmp_path / name)] for name in ("one", "two")
    )
    assert on(2, (main, two), (main, two)) == [0, 0]
    train("--recipe", one[1:])
    for stage in ("1_align", "2_distill", "3_finetune"):
        assert_near(tmp_path / "two" / stage, tmp_path / "one" / stage)
