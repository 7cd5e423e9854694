"""Swapped models that are pickled, copied, handed to another process, or offloaded by accelerate."""

import copy
import io
import multiprocessing

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_and_dispatch
from attention_cases import NAMES, small_options
from tiny_models import randomise, tiny, tokens

import hf_attnswap
from hf_attnswap.integration.swapping import swapped_modules

IDS, CPU = tokens(20), torch.device("cpu")


def swapped(name: str):
    return randomise(hf_attnswap.swap(tiny(), name, **small_options(name)))


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", (through_a_file, copy.deepcopy))
@pytest.mark.parametrize("name", NAMES)
def test_another_object_is_the_same_model(name, again):
    model = swapped(name)
    expected, found = logits(model), again(model)
    assert torch.equal(logits(found), expected)
    before, after = swapped_modules(model), swapped_modules(found)
    assert [type(v) for v in before.values()] == [type(v) for v in after.values()]
    assert not set(map(id, before.values())) & set(map(id, after.values()))
    hf_attnswap.restore(found)
    assert not any(module._forward_pre_hooks for module in found.modules())
    assert torch.equal(logits(model), expected)


def answer(model, pipe):
    torch.set_num_threads(1)
    pipe.send(logits(model))


@pytest.mark.long
def test_another_process_gets_the_model():
    model = swapped("hedgehog+window")
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=answer, args=(model, theirs))
    process.start()
    assert ours.poll(300)
    torch.testing.assert_close(ours.recv(), logits(model))
    process.join(30)


def on_disk(model, folder):
    last = {f"model.layers.{i}": "disk" for i in (1, 2)}
    device_map = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", **last}
    return device_map | {"model.norm": "cpu", "lm_head": "cpu"}


def checkpointed(model, folder):
    model.save_pretrained(folder / "model")
    fresh = swapped(next(iter(swapped_modules(model).values())).name)
    offload = folder / "offload"
    return load_checkpoint_and_dispatch(fresh, folder / "model", on_disk(model, folder), offload_folder=offload)


OFFLOADS = {
    "cpu": lambda model, folder: cpu_offload(model, CPU),
    "cpu with buffers": lambda model, folder: cpu_offload(model, CPU, offload_buffers=True),
    "disk": lambda model, folder: disk_offload(model, folder, CPU),
    "dispatched": lambda model, folder: dispatch_model(model, on_disk(model, folder), offload_dir=folder),
    "from a checkpoint": checkpointed,
}


WAYS = [*((name, "cpu with buffers") for name in NAMES), *(("t2r+window", how) for how in OFFLOADS)]


@pytest.mark.parametrize(("name", "how"), WAYS)
def test_weights_that_are_offloaded_come_in(name, how, tmp_path):
    model = swapped(name)
    expected = logits(model)
    found = OFFLOADS[how](model, tmp_path)
    assert any(parameter.is_meta for parameter in found.parameters())
    torch.testing.assert_close(logits(found), expected, rtol=1e-4, atol=1e-4)
    written = found.generate(IDS[:, :8], max_new_tokens=4, do_sample=False)
    assert torch.equal(written, swapped(name).generate(IDS[:, :8], max_new_tokens=4, do_sample=False))


@torch.no_grad()
def test_weights_of_attention_under_offloading():
    for name in ("hedgehog", "relu_power"):
        model = swapped(name)
        given = dict(output_attentions=True, use_cache=False)
        expected = model(IDS, **given).attentions
        for found, wanted in zip(cpu_offload(model, CPU)(IDS, **given).attentions, expected, strict=True):
            torch.testing.assert_close(found, wanted)
    with pytest.raises(NotImplementedError, match="not supported while the parameters of the layer are offloaded"):
        cpu_offload(swapped("hedgehog+window"), CPU)(IDS, **given)
