"""The choice of an implementation: every form of an op gives the same, and nothing is passed over in silence."""

import json
import logging
import sys
import threading

import pytest
import torch
from attention_cases import NAMES, SCALING, build, inputs
from tiny_models import tiny

from hf_attnswap import UsageError, cli, ops
from hf_attnswap.masks import Mask
from hf_attnswap.ops import backends
from hf_attnswap.ops.backends import OPS, backend, backends_of, told, watch

PORTABLE = ("torch", "reference")
SWAPPED = [name for name in NAMES if name not in ("softmax", "none")]  # these are one call of torch
FORM = '''
"""ReLU on the scores, for this test."""

import torch

from hf_attnswap.ops.heads import mix
from hf_attnswap.ops.scores.reference import score_weights, with_gain

devices = ("cpu",)
dtypes = (torch.float32,)


def unfit(query, key, value, mask, scaling, activation, gain, result_dtype):
    return None if activation.name == "relu" else f"it has no kernel for {activation.name}"


def run(query, key, value, mask, scaling, activation, gain, result_dtype):
    return with_gain(mix(score_weights(query, key, mask, scaling, activation), value), gain).to(result_dtype)
'''


def add_form(tmp_path, monkeypatch, text: str, op: str = "scores", name: str = "probe") -> None:
    """One file more in the folder of an op; `forget` undoes it."""
    (tmp_path / f"{name}.py").write_text(text)
    package = sys.modules[f"{ops.__name__}.{op}"]
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    OPS[op].discover()
    OPS[op].forms = {backend: OPS[op].forms[backend] for backend in (name, *PORTABLE)}


@pytest.fixture
def forget(monkeypatch):
    """Native forms are hidden, nothing is known of earlier tests, and nothing is left to later ones."""
    monkeypatch.setattr(backends, "_logged", set())
    for op in OPS.values():
        op.forms = {backend: op.forms[backend] for backend in PORTABLE}
    yield
    monkeypatch.undo()
    for op in OPS.values():
        op.discover()
        for name in [n for n in sys.modules if n.startswith(f"{op.package}.probe")]:
            del sys.modules[name]


@pytest.mark.parametrize("name", SWAPPED)
def test_the_reference_backend_gives_what_torch_gives(name):
    variant = build(name, heads=4)
    results, ran = {}, {}
    for chosen in ("torch", "reference"):
        tensors = [t.requires_grad_() for t in inputs(70, heads=4)]
        with backend(chosen), watch() as ran[chosen]:
            out = variant(*tensors, Mask(70, 70), SCALING)
            out.square().sum().backward()
        results[chosen] = [out, *(t.grad for t in tensors)]
    for fast, reference in zip(results["torch"], results["reference"], strict=True):
        torch.testing.assert_close(fast, reference, atol=1e-8, rtol=1e-6)
    for chosen in ran:
        assert {b for of_op in ran[chosen].values() for b in of_op} == {chosen}


@pytest.mark.parametrize("name", ("elu", "gated", "delta"))
def test_the_reference_backend_keeps_a_state(name):
    variant = build(name)
    tensors = inputs(9)
    whole = variant(*tensors, Mask(9, 9), SCALING)
    with backend("reference"), torch.no_grad():
        state = {}
        first = variant(*(t[:, :, :5] for t in tensors), Mask(5, 5), SCALING, state)
        rest = variant(*(t[:, :, 5:] for t in tensors), Mask(4, 9), SCALING, state)
    torch.testing.assert_close(torch.cat([first, rest], dim=2), whole)


def test_a_form_in_one_file_is_chosen_told_and_silent_elsewhere(tmp_path, monkeypatch, forget, caplog, capsys):
    caplog.set_level(logging.INFO)
    add_form(tmp_path, monkeypatch, FORM)
    assert backends_of("scores") == ["probe", "torch", "reference"]
    given = [t.detach().float() for t in inputs(20)]
    for name in ("relu", "elu", "window", "delta", "gated", "elu+window"):
        variant = build(name, dtype=torch.float32)
        with watch() as ran:
            out = variant(*given, Mask(20, 20), SCALING)
        assert ran == {variant.ops[0]: {"probe" if name == "relu" else "torch"}}
        torch.testing.assert_close(out, variant.reference(*given, Mask(20, 20), SCALING), atol=1e-5, rtol=1e-4)
    assert not caplog.messages
    tiny("llama").config.save_pretrained(tmp_path / "model")
    command = f"attnswap bench {tmp_path}/model --attention relu --attention elu --length 16 --rounds 1 --json"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert not stop.value.code
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["backends"] for row in rows] == [{"scores": ["probe"]}, {"linear": ["torch"]}]
    assert not caplog.messages


def test_a_form_that_cannot_serve_is_passed_over_and_said_so_once(tmp_path, monkeypatch, forget, caplog):
    caplog.set_level(logging.INFO)
    add_form(tmp_path, monkeypatch, FORM)
    with watch() as ran:
        for _ in range(2):
            build("sigmoid", dtype=torch.float32)(*(t.float() for t in inputs(9)), Mask(9, 9), SCALING)
            build("relu")(*inputs(9), Mask(9, 9), SCALING)
    assert ran == {"scores": {"torch"}} and told(ran) == "scores torch"
    assert caplog.messages == [
        "scores: backend probe is passed over: it has no kernel for sigmoid",
        "scores: backend probe is passed over: it takes torch.float32, not torch.float64",
    ]
    assert {record.levelno for record in caplog.records} == {logging.INFO}


def test_a_form_for_another_device_is_no_form_here(tmp_path, monkeypatch, forget, caplog):
    caplog.set_level(logging.INFO)
    add_form(tmp_path, monkeypatch, FORM.replace('("cpu",)', '("cuda",)'))
    with watch() as ran:
        build("relu", dtype=torch.float32)(*(t.float() for t in inputs(9)), Mask(9, 9), SCALING)
    assert ran == {"scores": {"torch"}} and not caplog.messages
    with backend("probe"), pytest.raises(NotImplementedError, match="it runs on cuda, not on cpu"):
        build("relu", dtype=torch.float32)(*(t.float() for t in inputs(9)), Mask(9, 9), SCALING)


@pytest.mark.parametrize(
    ("line", "reason"),
    (
        ("import a_library_that_is_not_there", "a_library_that_is_not_there is not installed"),
        ("available = lambda: 'the processor has no AVX-512'", "the processor has no AVX-512"),
    ),
    ids=("library", "processor"),
)
def test_a_form_that_this_machine_cannot_run_is_passed_over_with_its_reason(
    tmp_path, monkeypatch, forget, caplog, line, reason
):
    caplog.set_level(logging.INFO)
    add_form(tmp_path, monkeypatch, f"{FORM}\n{line}\n")
    given = [t.float() for t in inputs(9)]
    build("relu", dtype=torch.float32)(*given, Mask(9, 9), SCALING)
    assert caplog.messages == [f"scores: backend probe is passed over: {reason}"]
    with backend("scores=probe"), pytest.raises(NotImplementedError, match=reason):
        build("relu", dtype=torch.float32)(*given, Mask(9, 9), SCALING)


def test_what_is_forced_refuses_instead_of_passing_over(tmp_path, monkeypatch, forget, caplog):
    caplog.set_level(logging.INFO)
    add_form(tmp_path, monkeypatch, FORM)
    for text in ("probe", "scores=probe", "linear=reference, scores=probe"):
        with backend(text), pytest.raises(NotImplementedError) as error:
            build("relu")(*inputs(9), Mask(9, 9), SCALING)
        assert str(error.value) == (
            "scores: HF_ATTNSWAP_BACKEND asks for backend probe, which cannot serve this call: "
            "it takes torch.float32, not torch.float64"
        )
    with backend("probe"), watch() as ran:  # the others have no such form
        build("elu")(*inputs(9), Mask(9, 9), SCALING)
    with backend("scores=reference,linear=torch"), watch(), watch() as both:
        build("relu")(*inputs(9), Mask(9, 9), SCALING)
        build("elu")(*inputs(9), Mask(9, 9), SCALING)
        assert backends_of("scores")[0] == "reference"
    assert ran == {"linear": {"torch"}} and both == {"scores": {"reference"}, "linear": {"torch"}}
    assert not caplog.messages
    with backend("reference"), torch.no_grad(), pytest.raises(NotImplementedError, match="keeps no state"):
        build("window")(*inputs(9), Mask(9, 9), SCALING, {})


def test_an_op_without_a_form_that_serves_says_so(monkeypatch, forget):
    relu = build("relu")
    for form in OPS["scores"].forms.values():
        monkeypatch.setattr(form, "unfit", lambda *arguments: "not today")
    with pytest.raises(NotImplementedError, match="scores: no backend of torch, reference can serve this call"):
        relu(*inputs(9), Mask(9, 9), SCALING)


def test_a_form_without_run_is_refused(tmp_path, monkeypatch, forget):
    with pytest.raises(TypeError, match="probe.py has no function run"):
        add_form(tmp_path, monkeypatch, "devices = ('cpu',)\n")


def test_each_thread_chooses_and_watches_for_itself():
    """Both threads stand inside their contexts while both call."""
    relu, results, together = build("relu"), {}, threading.Barrier(3, timeout=60)

    def work(chosen):
        with backend(chosen), watch() as ran:
            for _ in range(50):
                together.wait()
                relu(*inputs(5), Mask(5, 5), SCALING)
        results[chosen] = ran

    threads = [threading.Thread(target=work, args=(chosen,)) for chosen in ("torch", "reference", None)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    usual = next(name for name, form in OPS["scores"].forms.items() if form.missing is None)
    expected = {"torch": "torch", "reference": "reference", None: usual}
    assert results == {chosen: {"scores": {ran}} for chosen, ran in expected.items()}


def test_the_variable_is_read_once_when_it_is_needed(monkeypatch, forget, capsys):
    monkeypatch.setattr(backends._Here, "forced", None)
    monkeypatch.setenv(backends.VARIABLE, "fast")
    monkeypatch.setattr(sys, "argv", ["attnswap", "ls", "relu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2 and capsys.readouterr().err.strip().endswith(
        "HF_ATTNSWAP_BACKEND=fast: no op has a backend 'fast'; expected one of reference, torch"
    )
    with pytest.raises(UsageError, match="fast"):
        build("relu")(*inputs(9), Mask(9, 9), SCALING)
    monkeypatch.setenv(backends.VARIABLE, "reference")
    with watch() as ran:
        build("relu")(*inputs(9), Mask(9, 9), SCALING)
    monkeypatch.setenv(backends.VARIABLE, "torch")
    assert ran == {"scores": {"reference"}} and backends.forced() == {"all ops": "reference"}


@pytest.mark.parametrize(
    ("text", "says"),
    (
        ("fast", "no op has a backend 'fast'; expected one of reference, torch"),
        ("scores=fast", "op scores has no backend 'fast'; expected one of reference, torch"),
        (
            "score=torch",
            "there is no op 'score'; the ops are delta, gated, gated_delta, hybrid, linear, scores, softmax, window",
        ),
        ("torch,reference", "two backends for all ops; name one"),
        ("scores=torch,scores=torch", "two backends for scores; name one"),
    ),
)
def test_what_does_not_exist_is_refused(text, says, forget):
    with pytest.raises(UsageError) as error, backend(text):
        pass
    assert str(error.value) == f"HF_ATTNSWAP_BACKEND={text}: {says}"


def test_choosing_costs_little():
    """A few microseconds; the bound is for a busy machine."""
    import timeit

    op = OPS["linear"]
    given = (torch.zeros(1),) * 12
    assert min(timeit.repeat(lambda: op._choose(given), number=1000, repeat=5)) / 1000 < 20e-6
