"""The training loop: the order of the text, checkpoints that are whole, and the same run after resuming."""

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tiny_models import tiny, tokens

from hf_attnswap import UsageError, swap
from hf_attnswap.sources.checksums import checksums
from hf_attnswap.training import checkpoints as writing
from hf_attnswap.training.align import aligning, alignment_loss, trainable_parameters
from hf_attnswap.training.batches import batches
from hf_attnswap.training.checkpoints import find_checkpoint
from hf_attnswap.training.loop import next_token_loss, train, warmup_cosine
from hf_attnswap.training.state import RunState
from hf_attnswap.training.watch import spike

BLOCKS = tokens(16, batch=7)


def noisy_loss(model, batch):
    """The loss with some dropout, so that a resumed run needs the state of the random numbers too."""
    return next_token_loss(model, batch) * (1 + 0.1 * torch.rand(()))


def run(model=None, *, accumulation=1, batch_size=1, seed=0, loss=next_token_loss, **arguments):
    """Train a tiny model; its losses and its weights afterwards."""
    model = model or tiny()
    torch.manual_seed(0)
    losses = train(
        Accelerator(cpu=True, gradient_accumulation_steps=accumulation),
        model,
        batches(BLOCKS, batch_size, seed),
        loss,
        **dict(learning_rate=1e-2, steps=6, weight_decay=0.1) | arguments,
    )
    return losses, model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class PowerCut(Exception):
    pass


def cut_at(step):
    def progress(done, _):
        if done == step:
            raise PowerCut

    return progress


def test_every_epoch_has_every_block_in_another_order():
    loader = batches(torch.arange(7)[:, None], 1, seed=3)
    epochs = [[loader[7 * epoch + k].item() for k in range(7)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != [batches(torch.arange(7)[:, None], 1, seed=4)[k].item() for k in range(7)]


def test_batches_of_two_are_pairs_of_batches_of_one_across_epochs():
    one, two = batches(BLOCKS, 1, seed=0), batches(BLOCKS, 2, seed=0)
    for number in (0, 3, 9, 2):
        assert torch.equal(two[number], torch.cat([one[2 * number], one[2 * number + 1]]))


def test_text_that_does_not_fill_a_batch():
    with pytest.raises(UsageError, match="7 blocks, less than one batch of 8"):
        batches(BLOCKS, 8, seed=0)


def test_warmup_cosine():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, rates = warmup_cosine(optimizer, steps=10, warmup=4), []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[7] == pytest.approx(0.5) and rates[10] == pytest.approx(0.0)
    scheduler = warmup_cosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3), 10, 4, end=0.01)
    assert [scheduler.lr_lambdas[0](step) for step in (4, 7, 10)] == pytest.approx([1.0, 0.505, 0.01])
    resumed = warmup_cosine(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0), 10, 4, done=7)
    assert resumed.get_last_lr() == [rates[7]]


def test_the_loss_goes_down():
    losses, _ = run(steps=14)
    assert sum(losses[7:]) < 0.7 * sum(losses[:7])


def test_a_fixed_seed_is_the_same_run():
    losses, weights = run()
    again, weights_again = run()
    assert losses == again and same(weights, weights_again)
    assert losses != run(seed=1)[0]


def test_accumulation_is_a_larger_batch():
    losses, weights = run(batch_size=2)
    accumulated, weights_accumulated = run(accumulation=2)
    assert accumulated == pytest.approx(losses, rel=1e-5)
    assert all(torch.allclose(weights[n], weights_accumulated[n], atol=1e-5) for n in weights)
    assert losses != pytest.approx(run()[0], rel=1e-2)


def separate_documents():
    """Blocks `[7, 16, 2]` with 1, 2, 3, ... documents."""
    first = torch.zeros_like(BLOCKS)
    for row, here in enumerate(first):
        here[torch.arange(row + 1) * 2] = 1
    return torch.stack([BLOCKS, first], dim=-1)


@pytest.mark.parametrize("what", ["finetune", "align"])
def test_accumulation_is_a_larger_batch_where_documents_are_separate(monkeypatch, what):
    monkeypatch.setitem(globals(), "BLOCKS", separate_documents())
    found = []
    for shared_out in (dict(batch_size=2), dict(accumulation=2)):
        if what == "finetune":
            found.append(run(steps=3, **shared_out)[0])
            continue
        model = swap(tiny(), "hedgehog")
        trainable_parameters(model)
        with aligning(model, weights_loss=1.0) as losses:

            def loss(model, batch, losses=losses):
                return alignment_loss(model, batch, losses)

            found.append(run(model, loss=loss, steps=3, **shared_out)[0])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and found[0][0] != pytest.approx(found[0][1], rel=1e-2)


def test_new_parameters_have_a_rate_of_their_own(tmp_path):
    """Its cosine keeps the proportion; a step of AdamW changes each weight by about its rate."""
    before = swap(tiny(), "hedgehog").state_dict()
    _, after = run(swap(tiny(), "hedgehog"), steps=1, learning_rate=1e-4, weight_decay=0.0, max_grad_norm=1e9)
    _, faster = run(
        swap(tiny(), "hedgehog"), steps=1, learning_rate=1e-4, new_parameters_learning_rate=1e-2, weight_decay=0.0,
        max_grad_norm=1e9, output_dir=tmp_path, final_learning_rate=1e-5,
    )  # fmt: skip
    for name, _ in swap(tiny(), "hedgehog").named_parameters():
        assert torch.equal(after[name], faster[name]) == (".attnswap." not in name)
        rate = 1e-2 if ".attnswap." in name else 1e-4
        assert (faster[name] - before[name]).abs().max().item() == pytest.approx(rate, rel=0.05)
    (entry,) = read_log(tmp_path)
    assert (entry["learning_rate"], entry["new_parameters_learning_rate"]) == (1e-4, 1e-2)
    with pytest.raises(UsageError, match="new_parameters_learning_rate is 0.01, but no parameter of a swapped"):
        run(new_parameters_learning_rate=1e-2)


def test_resuming_with_two_rates(tmp_path):
    arguments = dict(learning_rate=1e-3, new_parameters_learning_rate=1e-2, final_learning_rate=1e-4)
    losses, weights = run(swap(tiny(), "hedgehog"), output_dir=tmp_path / "whole", **arguments)
    more = dict(arguments, output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(PowerCut):
        run(swap(tiny(), "hedgehog"), progress=cut_at(5), **more)
    resumed, resumed_weights = run(swap(tiny(), "hedgehog"), resume_from_checkpoint="latest", **more)
    assert resumed == losses and same(weights, resumed_weights)
    rates = [entry["new_parameters_learning_rate"] for entry in read_log(tmp_path)]
    assert rates == pytest.approx([10 * entry["learning_rate"] for entry in read_log(tmp_path / "whole")])
    with pytest.raises(UsageError, match="new_parameters_learning_rate = 0.01, not None"):
        run(swap(tiny(), "hedgehog"), resume_from_checkpoint="latest", **more | {"new_parameters_learning_rate": None})


@pytest.mark.parametrize("tied", [False, True])
def test_resuming_continues_the_same_run(tmp_path, tied):
    def model():
        model = tiny()
        if tied:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    losses, weights = run(model(), loss=noisy_loss)
    arguments = dict(loss=noisy_loss, output_dir=tmp_path, checkpointing_steps=2, accumulation=1)
    with pytest.raises(PowerCut):
        run(model(), progress=cut_at(5), **arguments)
    resumed, resumed_weights = run(model(), resume_from_checkpoint="latest", **arguments)
    assert resumed == losses and same(weights, resumed_weights)


def test_resuming_in_the_middle_of_an_epoch_with_accumulation(tmp_path):
    losses, weights = run(accumulation=3)
    arguments = dict(accumulation=3, output_dir=tmp_path, checkpointing_steps=1)
    with pytest.raises(PowerCut):
        run(progress=cut_at(4), **arguments)
    resumed, resumed_weights = run(resume_from_checkpoint=tmp_path / "checkpoints" / "step_3", **arguments)
    assert resumed == losses and same(weights, resumed_weights)


def test_a_run_may_go_on_with_its_batches_shared_out_otherwise(tmp_path):
    losses, _ = run(batch_size=2)
    with pytest.raises(PowerCut):
        run(batch_size=2, output_dir=tmp_path, checkpointing_steps=2, progress=cut_at(3))
    resumed, _ = run(accumulation=2, output_dir=tmp_path, resume_from_checkpoint="latest")
    assert resumed == pytest.approx(losses, rel=1e-5)
    with pytest.raises(PowerCut):
        run(batch_size=2, output_dir=tmp_path / "odd", checkpointing_steps=3, progress=cut_at(4))
    resumed, _ = run(accumulation=2, output_dir=tmp_path / "odd", resume_from_checkpoint="latest")
    assert resumed == pytest.approx(losses, rel=1e-5)


def test_a_checkpoint_holds_what_trains_and_nothing_else(tmp_path):
    model = tiny()
    model.requires_grad_(False)
    model.model.layers[0].mlp.requires_grad_(True)
    run(model, steps=1, output_dir=tmp_path, checkpointing_steps=1)
    folder = tmp_path / "checkpoints" / "step_1"
    assert load_file(folder / "trainable.safetensors").keys() == {
        f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")
    }
    everything = sum(p.numel() * p.element_size() for p in model.parameters())
    assert not any(path.stat().st_size > everything for path in folder.iterdir())


def entries(tmp_path):
    return sorted(path.name for path in (tmp_path / "checkpoints").iterdir())


def test_the_two_newest_checkpoints_stay_and_all_that_is_not_ours(tmp_path):
    """However many checkpoints are written: names do not grow, and nothing is taken for a checkpoint that is none."""
    folder = tmp_path / "checkpoints"
    theirs = ["best", "notes.txt", "partial_results", "step_4_for_the_paper", "step_last", "step_07", "step_1000"]
    for name in theirs[:1] + theirs[2:-1]:
        (folder / name).mkdir(parents=True)
        (folder / name / "weights").write_text("theirs")
    for name in ("notes.txt", "step_1000"):
        (folder / name).write_text("theirs")
    (folder / "partial_3").mkdir()  # ours, from a run that was cut off
    run(output_dir=tmp_path, checkpointing_steps=1, steps=12)
    assert entries(tmp_path) == sorted([*theirs, "step_11", "step_12"])
    assert {
        path.read_text() for name in theirs for path in (folder / name, folder / name / "weights") if path.is_file()
    }


def test_a_run_that_goes_back_leaves_no_checkpoints_of_what_it_passed_over(tmp_path):
    run(output_dir=tmp_path, checkpointing_steps=1)
    run(output_dir=tmp_path, checkpointing_steps=3, resume_from_checkpoint=tmp_path / "checkpoints" / "step_5")
    assert entries(tmp_path) == ["step_5", "step_6"]
    os.rename(tmp_path / "checkpoints" / "step_5", tmp_path / "checkpoints" / "step_2")
    shutil.copytree(tmp_path / "checkpoints" / "step_6", tmp_path / "checkpoints" / "step_9")
    writing._remove_others(tmp_path / "checkpoints", 6)
    assert entries(tmp_path) == ["step_2", "step_6"]


@pytest.mark.parametrize("owner, name", [(RunState, "save"), (writing, "_flush"), (os, "replace")])
def test_the_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, owner, name):
    """Whatever fails while the second checkpoint is written, the first one is there, and the run goes on from it."""
    losses, weights = run()
    function = getattr(owner, name)

    def failing(*arguments):
        if not any("partial_4" in str(argument) for argument in arguments):
            return function(*arguments)
        if name == "save":
            function(*arguments)
            os.truncate(tmp_path / "checkpoints" / "partial_4" / "optimizer.safetensors", 100)
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(owner, name, failing)
        run(output_dir=tmp_path, checkpointing_steps=2)
    assert entries(tmp_path) == ["partial_4", "step_2"]
    assert find_checkpoint("latest", tmp_path).folder.name == "step_2"
    resumed, resumed_weights = run(output_dir=tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert resumed == losses and same(weights, resumed_weights)
    assert entries(tmp_path) == ["step_4", "step_6"]


def test_latest_is_the_newest_by_number_and_never_a_partial_one(tmp_path):
    run(output_dir=tmp_path, checkpointing_steps=6)
    for name in ("step_9", "step_10", "partial_11", "partial_step_12", "step_last"):
        shutil.copytree(tmp_path / "checkpoints" / "step_6", tmp_path / "checkpoints" / name)
    assert find_checkpoint("latest", tmp_path).folder.name == "step_10"


def test_latest_without_a_checkpoint_starts_anew(tmp_path):
    losses, _ = run()
    (tmp_path / "training_log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    assert run(output_dir=tmp_path, resume_from_checkpoint="latest")[0] == losses
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "damage, said",
    [
        (lambda folder: os.truncate(folder / "optimizer.safetensors", 100), "optimizer.safetensors is not what was"),
        (lambda folder: (folder / "trainable.safetensors").unlink(), "trainable.safetensors is missing"),
        (lambda folder: os.truncate(folder / "run.json", 100), "run.json is not what was written: its SHA-256 is "),
        (lambda folder: os.truncate(folder / "checksums.json", 100), r"its checksums.json cannot be read \(JSONDec"),
        (lambda folder: (folder / "checksums.json").write_text("null"), r"its checksums.json cannot be read \(TypeErr"),
        (lambda folder: (folder / "checksums.json").write_text("{}"), r"its checksums.json cannot be read \(KeyError"),
        (
            lambda folder: rewrite(folder, "run.json", b'{"settings": 3, "losses": []}'),
            "its run.json has no sound 'settings'",
        ),
    ],
)
def test_a_torn_checkpoint_is_passed_over_and_said(tmp_path, caplog, damage, said):
    run(output_dir=tmp_path, checkpointing_steps=3, steps=3)
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "step_3", folder / "step_5")
    damage(folder / "step_5")
    assert find_checkpoint("latest", tmp_path).folder.name == "step_3"
    assert re.search(f"step_5' is passed over: {said}", caplog.text)
    with pytest.raises(UsageError, match=f"is not a checkpoint of this package: {said}"):
        find_checkpoint(folder / "step_5", tmp_path)


def rewrite(folder, name, content):
    """Other content in a file of a checkpoint, with the right checksum for it."""
    (folder / name).write_bytes(content)
    (folder / "checksums.json").unlink()
    (folder / "checksums.json").write_text(json.dumps(checksums(folder)))


@pytest.mark.parametrize("name", ["trainable.safetensors", "optimizer.safetensors", "process_0.json", "run.json"])
def test_a_flipped_bit_costs_the_steps_since_the_checkpoint_before(tmp_path, name, caplog):
    losses, weights = run(loss=noisy_loss)
    arguments = dict(loss=noisy_loss, output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(PowerCut):
        run(progress=cut_at(5), **arguments)
    path = tmp_path / "checkpoints" / "step_4" / name
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    resumed, resumed_weights = run(resume_from_checkpoint="latest", **arguments)
    assert f"step_4' is passed over: {name} is not what was written" in caplog.text
    assert resumed == losses and same(weights, resumed_weights)
    assert entries(tmp_path) == ["step_4", "step_6"]


class Command:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_file_of_a_checkpoint_runs_code(tmp_path, monkeypatch):
    """Not even one with the right checksum; files beside that other programs would unpickle are not looked at."""
    run(output_dir=tmp_path, checkpointing_steps=3, steps=3)
    folder, touched = tmp_path / "checkpoints" / "step_3", tmp_path / "touched"
    assert {path.suffix for path in folder.rglob("*")} == {".json", ".safetensors"}
    planted = pickle.dumps(Command(touched))
    for name in ("custom_checkpoint_0.pkl", "random_states_0.pkl", "optimizer.bin", "scheduler.bin", ".metadata"):
        (folder / name).write_bytes(planted)
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert len(run(output_dir=tmp_path, resume_from_checkpoint="latest", steps=3)[0]) == 3
    for name in ("trainable", "optimizer"):
        shutil.copytree(folder, tmp_path / name)
        rewrite(tmp_path / name, f"{name}.safetensors", planted)
        with pytest.raises(UsageError, match=f"{name}.safetensors' is not a file of tensors of this package"):
            run(resume_from_checkpoint=tmp_path / name, steps=3)
    rewrite(folder, "process_0.json", planted)
    with pytest.raises(UsageError, match="process_0.json' is not the state of a process"):
        run(resume_from_checkpoint=folder, steps=3)
    assert not touched.exists()


class Engine:
    """As DeepSpeed's, which unpickles without limits."""

    def save_checkpoint(self, folder, tag):
        torch.save({"optimizer": self.content}, Path(folder) / f"{tag}.pt")

    def load_checkpoint(self, folder, tag):
        self.content = torch.load(Path(folder) / f"{tag}.pt", weights_only=False)["optimizer"]


def test_deepspeed_reads_tensors_and_nothing_that_runs(tmp_path, monkeypatch):
    """It writes and reads its own files."""
    for name in ("runtime.fp16.loss_scaler", "runtime.zero.config", "utils.tensor_fragment"):
        classes = dict.fromkeys(("DynamicLossScaler", "LossScaler", "ZeroStageEnum", "fragment_address"), Engine)
        monkeypatch.setitem(sys.modules, f"deepspeed.{name}", SimpleNamespace(**classes))
    accelerator = SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED, device=torch.device("cpu"), process_index=0, scaler=None
    )
    engine = Engine()
    state = RunState(accelerator, engine, None)
    engine.content = BLOCKS
    state.save(tmp_path)
    engine.content = None
    state.load(tmp_path)
    assert torch.equal(engine.content, BLOCKS)
    engine.content = Command(tmp_path / "touched")
    state.save(tmp_path)
    with pytest.raises(UsageError, match="has more in its files than DeepSpeed saves, which could run code"):
        state.load(tmp_path)
    assert not (tmp_path / "touched").exists() and "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


FULL_DISK = """
import pathlib, sys
sys.path[:0] = ["tests", "tests/training"]
from test_loop import run
from hf_attnswap.errors import one_line_errors
with one_line_errors("train"):
    run(output_dir=pathlib.Path(sys.argv[1]), checkpointing_steps=2)
"""


@pytest.mark.long
def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(tmp_path):
    """On a file system of its own, which has room for one checkpoint and a half."""
    size = run(output_dir=tmp_path / "whole", checkpointing_steps=6) and sum(
        path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()
    )
    disk = tmp_path / "disk"
    disk.mkdir()
    inside = f"mount -t tmpfs -o size={int(1.5 * size)} tmpfs {disk} && {sys.executable} -c '{FULL_DISK}' {disk}; "
    inside += f"echo exit $?; ls {disk}/checkpoints"
    unshare = ["unshare", "--mount", "--map-root-user"]
    if shutil.which("unshare") is None or subprocess.run([*unshare, "mount", "-t", "tmpfs", "x", disk]).returncode:
        pytest.skip("this user may not make a file system (unshare --mount)")
    found = subprocess.run([*unshare, "sh", "-c", inside], capture_output=True, text=True, cwd=ROOT, env=with_root())
    assert found.stdout.split() == ["exit", "1", "step_2"], found.stderr
    line = found.stderr.strip().splitlines()[-1]
    assert re.search(r"train: checkpoint '.*step_4' could not be written \(.*\), with 0 MiB free there: ", line)
    assert "step_2' stays, from which the run goes on with --resume_from_checkpoint latest" in line


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UsageError, match="is not a checkpoint of this package"):
        run(resume_from_checkpoint=str(tmp_path))


@pytest.mark.parametrize(
    "change, named",
    [
        (dict(learning_rate=2e-2), "learning_rate = 0.01, not 0.02"),
        (dict(steps=8), "steps = 6, not 8"),
        (dict(seed=1), "seed = 0, not 1"),
        (dict(accumulation=2), "blocks per step = 1, not 2"),
        (dict(settings={"window": 32}), "window = None, not 32"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, change, named):
    run(output_dir=tmp_path, checkpointing_steps=6)
    with pytest.raises(UsageError, match=named):
        run(output_dir=tmp_path, resume_from_checkpoint="latest", **change)


def test_a_checkpoint_with_another_text_is_refused(tmp_path, monkeypatch):
    run(output_dir=tmp_path, checkpointing_steps=6)
    monkeypatch.setitem(globals(), "BLOCKS", BLOCKS.flip(0))
    with pytest.raises(UsageError, match="of a run with text = "):
        run(output_dir=tmp_path, resume_from_checkpoint="latest")


def test_a_checkpoint_of_other_parameters_is_refused(tmp_path):
    run(output_dir=tmp_path, checkpointing_steps=6)
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    with pytest.raises(UsageError, match="holds other parameters than this run trains"):
        run(model, output_dir=tmp_path, resume_from_checkpoint="latest")


def test_the_log_has_one_line_per_step_after_resuming(tmp_path):
    arguments = dict(output_dir=tmp_path, checkpointing_steps=2)
    with pytest.raises(PowerCut):
        run(progress=cut_at(5), **arguments)
    with (tmp_path / "training_log.jsonl").open("a") as log:
        log.write('{"step": 6, "lo')  # torn by a kill
    losses, _ = run(resume_from_checkpoint="latest", **arguments)
    entries = read_log(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5, 6]
    assert [entry["loss"] for entry in entries] == losses
    assert [entry["tokens"] for entry in entries] == [16, 32, 48, 64, 80, 96]
    assert entries[0]["learning_rate"] == 1e-2 > entries[5]["learning_rate"] > 0


ROOT = Path(__file__).parents[2]


def with_root():
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def read_log(folder):
    return [json.loads(line) for line in (folder / "training_log.jsonl").read_text().splitlines()]


def test_a_loss_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path):
    model = tiny()
    seen = []

    def loss(model, batch):
        seen.append({n: p.clone() for n, p in model.state_dict().items()})
        return next_token_loss(model, batch) * (float("nan") if len(seen) == 4 else 1)

    with pytest.raises(FloatingPointError, match="the loss is nan at step 4: lower the learning rate"):
        run(model, loss=loss, output_dir=tmp_path, checkpointing_steps=2)
    assert same(model.state_dict(), seen[-1])
    assert find_checkpoint("latest", tmp_path).folder.name == "step_2"
    assert len(read_log(tmp_path)) == 3


def test_the_place_where_a_loss_is_no_longer_finite_is_named():
    model = swap(tiny(), "relu_norm", gain=True)
    model.model.layers[1].self_attn.attnswap.head_gain = lambda: torch.full((4,), float("inf"))
    with pytest.raises(FloatingPointError, match=r"the output of model\.layers\.1\.self_attn\.attnswap \(relu_norm\)$"):
        run(model)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"is the weight model\.layers\.2\.mlp\.up_proj\.weight$"):
        run(model)


def test_a_spike_is_said_and_logged(tmp_path, caplog):
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return next_token_loss(model, batch) * (5 if len(calls) == 20 else 1)

    run(loss=loss, steps=22, learning_rate=1e-4, output_dir=tmp_path)
    assert [entry["step"] for entry in read_log(tmp_path) if "spike" in entry] == [20]
    assert re.search(r"the loss jumped to [\d.]+ at step 20, 4\.\d|5\.\d times its mean before", caplog.text)


def test_what_is_a_spike():
    steady = [1.0, 1.1] * 8
    assert spike([*steady, 2.1]) == pytest.approx(2.0)
    assert spike([*steady, 1.2]) is None
    assert spike([1.0] * 16 + [1.1]) is None  # a tenth, though many deviations
    assert spike([*steady[:15], 9.0]) is None  # too early to say
