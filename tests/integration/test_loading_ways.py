"""A saved conversion under every way of loading: placements, dtypes, adapters, damaged files, earlier formats."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attention_cases import NAMES, small_options
from safetensors.torch import load_file, save_file
from tiny_models import randomise, tiny, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import hf_attnswap
from hf_attnswap import UsageError
from hf_attnswap.plans import FORMAT_VERSION
from hf_attnswap.sources.models import gguf_source, load_any

IDS = tokens(20)
ON_DISK = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
    "model.layers.2": "disk", "model.norm": "cpu", "lm_head": "cpu",
}  # fmt: skip


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """A conversion with trained parameters in many shards, and its logits."""
    model = randomise(hf_attnswap.swap(tiny(), "hedgehog+window", window=8, sinks=2))
    folder = tmp_path_factory.mktemp("hybrid") / "model"
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder, logits(model)


@pytest.fixture
def one_file(hybrid, tmp_path) -> Path:
    """The same, in one file of weights that a test may damage."""
    AutoModelForCausalLM.from_pretrained(hybrid[0]).save_pretrained(tmp_path / "one")
    return tmp_path / "one"


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_comes_back_in_shards_on_any_device_map(name, tmp_path):
    model = randomise(hf_attnswap.swap(tiny(), name, layers="1:", **small_options(name)))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", output_loading_info=True)
    assert not any(info.values())
    assert [entry.swapped for entry in hf_attnswap.inspect(again)] == [None, name, name]
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ("hedgehog+window", "t2r", "gated", "performer", "sigmoid", "delta"))
def test_disk_offload(name, tmp_path):
    model = randomise(hf_attnswap.swap(tiny(), name, **small_options(name)))
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=ON_DISK, offload_folder=tmp_path / "offload"
    )
    assert any(parameter.device.type == "meta" for parameter in again.parameters())
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)
    again.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("plan", ({"0": "hedgehog+window", "1.0": "gated", "2": "t2r"}, {"1": "elu", "2.1": "delta"}))
def test_a_swap_of_a_model_whose_layers_are_offloaded(plan, tmp_path):
    """The new parameters stay where their layer runs."""
    tiny().save_pretrained(tmp_path / "model")
    placed = dict(device_map=ON_DISK, offload_folder=tmp_path / "offload", dtype=torch.float32)
    model = hf_attnswap.swap(AutoModelForCausalLM.from_pretrained(tmp_path / "model", **placed), layers=plan)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert {parameter.device.type for path, parameter in model.named_parameters() if ".attnswap." in path} == {"cpu"}
    torch.testing.assert_close(logits(model), logits(hf_attnswap.swap(tiny(), layers=plan)), rtol=1e-5, atol=1e-5)
    hf_attnswap.restore(model)
    torch.testing.assert_close(logits(model), logits(tiny()), rtol=1e-5, atol=1e-5)


def test_new_parameters_are_on_the_device_and_in_the_dtype_of_their_layer():
    """Of layers on two devices, of which meta stands for a GPU, one with quantised weights."""
    model = tiny()
    model.model.layers[1].to(device="meta", dtype=torch.bfloat16)
    model.model.layers[2].to("meta")
    for projection in (m for m in model.model.layers[2].self_attn.modules() if isinstance(m, torch.nn.Linear)):
        packed = torch.empty(projection.weight.numel() // 2, 1, dtype=torch.uint8, device="meta")
        projection.weight = torch.nn.Parameter(packed, requires_grad=False)
    hf_attnswap.swap(model, layers={"0.1": "hedgehog+window", "1.0": "gated", "2.0": "hedgehog"})
    found = {}
    for path, tensor in model.state_dict().items():
        if ".attnswap." in path and tensor.is_floating_point():
            found.setdefault(int(path.split(".")[2]), set()).add((tensor.device.type, tensor.dtype))
    float32 = torch.float32
    assert found == {0: {("cpu", float32)}, 1: {("meta", torch.bfloat16)}, 2: {("meta", float32)}}


def test_empty_weights_and_accelerate(one_file, hybrid):
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(one_file))
    assert all(parameter.device.type == "meta" for parameter in model.parameters())
    model = load_checkpoint_and_dispatch(model, str(one_file), device_map={"": "cpu"})
    torch.testing.assert_close(logits(model), hybrid[1], rtol=1e-5, atol=1e-5)


def test_float16_and_bfloat16_are_saved_as_they_are(hybrid, tmp_path):
    for dtype in (torch.float16, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(hybrid[0], dtype=dtype)
        model.save_pretrained(tmp_path / str(dtype))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(dtype), dtype="auto")
        assert {parameter.dtype for parameter in again.parameters()} == {dtype}
        assert torch.equal(logits(again), logits(model))


def test_gradient_checkpointing_gives_the_gradients(hybrid):
    model = AutoModelForCausalLM.from_pretrained(hybrid[0]).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
        model.gradient_checkpointing_enable()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)
        assert gradient.any() or ".attnswap." not in name


def test_adapters_apart_and_merged(hybrid, tmp_path):
    """LoRA, and the variants' own parameters as modules to save."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(hybrid[0])
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["attnswap"])
    model = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    expected = logits(model)
    assert (expected - hybrid[1]).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    apart = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hybrid[0]), tmp_path / "adapter")
    torch.testing.assert_close(logits(apart), expected, rtol=1e-4, atol=1e-4)
    through_transformers = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(through_transformers), expected, rtol=1e-4, atol=1e-4)
    apart.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)


SHARDED = """
import sys, torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
import hf_attnswap
from transformers import AutoModelForCausalLM
source, target = sys.argv[1:]
torch.set_num_threads(1)
dist.init_process_group("gloo")
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
model = AutoModelForCausalLM.from_pretrained(source).train()
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
ids = torch.arange(3, 43).view(2, 20)
before = model(ids, use_cache=False).logits.detach()
model(ids, labels=ids, use_cache=False).loss.backward()
torch.optim.SGD(model.parameters(), lr=0.1).step()
with torch.no_grad():
    after = model.eval()(ids, use_cache=False).logits
state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if dist.get_rank() == 0:
    model.save_pretrained(target, state_dict=state, max_shard_size="20KB")
    torch.save((ids, before, after), f"{target}.pt")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.long
def test_the_state_of_an_fsdp2_model_on_two_processes(hybrid, tmp_path):
    """Trained for a step while it is sharded, gathered, saved and loaded whole."""
    script, saved = tmp_path / "sharded.py", tmp_path / "saved"
    script.write_text(SHARDED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(Path(hf_attnswap.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*launch, str(hybrid[0]), str(saved)], capture_output=True, text=True, timeout=500, env=environment
    )
    assert run.returncode == 0, run.stderr
    ids, before, after = torch.load(f"{saved}.pt")
    again, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not any(info.values())
    assert [entry.swapped for entry in hf_attnswap.inspect(again)] == ["hedgehog+window"] * 3
    with torch.no_grad():
        found = again.eval()(ids).logits
    torch.testing.assert_close(found, after, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 0.01
    changed, old = again.state_dict(), AutoModelForCausalLM.from_pretrained(hybrid[0]).state_dict()
    assert any(not torch.equal(changed[name], old[name]) for name in old if ".attnswap." in name)


def test_the_model_that_a_gguf_file_was_made_from(tmp_path):
    gguf = pytest.importorskip("gguf")

    def written(**said) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for key, value in said.items():
            writer.add_string(f"general.{key.replace('__', '.')}", value)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return str(path)

    parent = {"base_model__0__repo_url": "https://huggingface.co/org/parent", "name": "Some Model"}
    assert gguf_source(written(**parent)) is None
    assert gguf_source(written(source__repo_url="https://huggingface.co/org/name", **parent)) == "org/name"
    assert gguf_source(written(repo_url="https://huggingface.co/org/name-GGUF")) == "org/name"
    assert gguf_source(written(source__huggingface__repository="org/other")) == "org/other"
    assert gguf_source(written(repo_url="https://github.com/org/name")) is None


def test_convert_restore_convert_and_save_again(hybrid, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(hybrid[0])
    with pytest.raises(UsageError, match="already swapped"):
        hf_attnswap.swap(model, "relu")
    hf_attnswap.swap(hf_attnswap.restore(model), "relu_power", p=4).save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(logits(again), logits(hf_attnswap.swap(tiny(), "relu_power", p=4)))


def edit_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


MIX, QUERY = "model.layers.0.self_attn.attnswap.log_mix", "model.layers.1.self_attn.q_proj.weight"
EDITS = {
    "config: less layers": (edit_config, lambda c: c["attnswap"]["swapped"][0].update(layers=[0, 1])),
    "config: other variant": (edit_config, lambda c: c["attnswap"]["swapped"][0].update(attention="elu", options={})),
    "config: other heads": (edit_config, lambda c: c.update(num_attention_heads=8)),
    "config: nothing swapped": (edit_config, lambda c: [c.pop(key) for key in ("attnswap", "attn_implementation")]),
    "weights: less": (edit_weights, lambda w: w.pop(MIX)),
    "weights: less of the model": (edit_weights, lambda w: w.pop(QUERY)),
    "weights: more": (edit_weights, lambda w: w.update({MIX + "2": w[MIX].clone()})),
    "weights: other shape": (edit_weights, lambda w: w.update({MIX: w[MIX][:1].clone()})),
}


@pytest.mark.parametrize("edit", EDITS)
def test_config_and_weights_that_disagree(one_file, edit):
    where, change = EDITS[edit]
    where(one_file, change)
    with pytest.raises(UsageError, match="config.json and weights do not belong together: model.layers") as error:
        AutoModelForCausalLM.from_pretrained(one_file)
    assert str(one_file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("keep", (0, 5, 300, -3))
@pytest.mark.parametrize("file", ("config.json", "model.safetensors"))
def test_truncated_files(one_file, file, keep):
    path = one_file / file
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match="cannot load the model") as error:
        load_any(str(one_file))
    assert "\n" not in str(error.value)


def test_a_missing_shard(hybrid, tmp_path):
    folder = shutil.copytree(hybrid[0], tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UsageError, match=shard.name):
        load_any(str(folder))


@pytest.mark.parametrize("name", ("os.system", "hf_attnswap.attentions.relu", "__import__('os')", "../relu"))
def test_names_are_looked_up_not_imported(one_file, name):
    edit_config(one_file, lambda config: config["attnswap"]["swapped"][0].update(attention=name))
    with pytest.raises(UsageError, match="Unknown attention"):
        AutoModelForCausalLM.from_pretrained(one_file)


def test_pickled_weights_are_refused_unless_allowed(tmp_path):
    model = tiny()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match="Pickled weights are refused, unless you trust them and pass --allow_pickle"):
        load_any(str(tmp_path))
    torch.testing.assert_close(logits(load_any(str(tmp_path), allow_pickle=True)[0]), logits(model))


def test_a_conversion_saved_earlier_still_loads():
    folder = Path(__file__).parents[1] / "fixtures" / f"format_{FORMAT_VERSION}"
    expected = json.loads((folder / "expected.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        found = model(torch.tensor(expected["input_ids"])).logits[0, -1]
    torch.testing.assert_close(found, torch.tensor(expected["last_logits"]), rtol=1e-4, atol=1e-4)
    softmax = hf_attnswap.restore(model)
    with torch.no_grad():
        assert (softmax(torch.tensor(expected["input_ids"])).logits[0, -1] - found).abs().max() > 0.1
