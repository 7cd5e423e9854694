"""The training loop: the order of the text, checkpoints that are whole, and the same run after resuming."""

import json
import os

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny_models import tiny, tokens

from hf_attnswap import UsageError
from hf_attnswap.training import loop
from hf_attnswap.training.batches import batches
from hf_attnswap.training.loop import find_checkpoint, next_token_loss, train, warmup_cosine

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


def test_only_the_newest_checkpoint_stays(tmp_path):
    run(output_dir=tmp_path, checkpointing_steps=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_6"]


@pytest.mark.parametrize("owner, name", [(Accelerator, "save_state"), (loop, "_flush"), (os, "replace")])
def test_the_older_checkpoint_stays_until_the_new_one_is_whole(tmp_path, monkeypatch, owner, name):
    """Whatever fails while the second checkpoint is written, the first one is there, and the run goes on from it."""
    losses, weights = run()
    function = getattr(owner, name)

    def failing(*arguments):
        if not any("partial_4" in str(argument) for argument in arguments):
            return function(*arguments)
        if name == "save_state":
            function(*arguments)
            os.truncate(tmp_path / "checkpoints" / "partial_4" / "optimizer.bin", 100)
        raise PowerCut

    with monkeypatch.context() as patch, pytest.raises(PowerCut):
        patch.setattr(owner, name, failing)
        run(output_dir=tmp_path, checkpointing_steps=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["partial_4", "step_2"]
    assert find_checkpoint("latest", tmp_path).name == "step_2"
    resumed, resumed_weights = run(output_dir=tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert resumed == losses and same(weights, resumed_weights)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_6"]


def test_latest_is_the_newest_by_number_and_never_a_partial_one(tmp_path):
    for name in ("step_9", "step_10", "partial_11", "partial_step_12"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert find_checkpoint("latest", tmp_path).name == "step_10"


def test_latest_without_a_checkpoint_starts_anew(tmp_path):
    losses, _ = run()
    (tmp_path / "training_log.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "lo')
    assert run(output_dir=tmp_path, resume_from_checkpoint="latest")[0] == losses
    assert [entry["step"] for entry in read_log(tmp_path)] == [1, 2, 3, 4, 5, 6]


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
    assert find_checkpoint("latest", tmp_path).name == "step_2"
    assert len(read_log(tmp_path)) == 3
