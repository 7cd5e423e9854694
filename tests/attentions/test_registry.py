"""Names, options and descriptions of the variants, and a variant that is one new file."""

import json
import subprocess
import sys
import timeit

import documented
import pytest
import torch
from attention_cases import NAMES, SCALING, build, causal, inputs

import hf_attnswap
from hf_attnswap import attentions, cli
from hf_attnswap.attentions import Heads, registry
from hf_attnswap.attentions.base import Option

VARIANT = '''
from ..ops.spec import FeatureMap
from .base import Option
from .linear import LinearAttention
from .registry import register


def squares(x, floor):
    return x.square() + floor


@register
class Squares(LinearAttention):
    """phi(x) = x^2 + floor."""

    name = "squares"
    formula = "phi(q_i) S_i / (phi(q_i) z_i + eps), phi = x^2 + floor"
    cost = "O(n d^2)"
    source = "this test"
    floor = Option(0.5, "added to the squares", minimum=0.0)

    def feature_map(self):
        return FeatureMap("squares", squares, params={"floor": self.floor})
'''
# A variant on the scores, whole: what the guide shows.
SCORE_VARIANT = documented.python((documented.ROOT / "docs" / "guide" / "add_a_variant.md").read_text())[0]


def forget(name: str, module: str) -> None:
    registry._registered.pop(name, None)
    sys.modules.pop(module, None)
    vars(attentions).pop(module.rpartition(".")[2], None)


@pytest.fixture
def new_file(tmp_path, monkeypatch):
    """A folder beside the variants with one file more; the registry forgets it afterwards."""
    (tmp_path / "squares.py").write_text(VARIANT)
    monkeypatch.setattr(attentions, "__path__", [*attentions.__path__, str(tmp_path)])
    registry.load(again=True)
    yield tmp_path
    forget("squares", "hf_attnswap.attentions.squares")


@pytest.fixture
def entries(tmp_path, monkeypatch, caplog):
    """Installed distributions with one entry point each, as metadata on sys.path: one works, one does not."""
    for name, text in (("goodpkg_relu3", SCORE_VARIANT), ("badpkg_variant", "raise RuntimeError('no such year')")):
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[hf_attnswap.attentions]\n{name}_entry = {name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    registry.load(again=True)
    yield caplog.messages
    for name in ("goodpkg_relu3", "badpkg_variant"):
        forget("relu3", name)


def test_a_new_file_is_a_new_variant(new_file, monkeypatch, capsys):
    assert "squares" not in NAMES
    assert {"squares", "squares+window"} <= {cls.name for cls in hf_attnswap.available()}
    for arguments, text in ((["ls"], "squares"), (["ls", "--json"], "phi = x^2 + floor")):
        monkeypatch.setattr(sys, "argv", ["attnswap", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code in (0, None)
        assert text in capsys.readouterr().out
    for name in ("squares", "squares+window"):
        attention, given = build(name, floor=0.25), inputs(70)
        torch.testing.assert_close(
            attention(*given, causal(70), SCALING), attention.reference(*given, causal(70), SCALING)
        )


def test_a_new_file_swaps_and_saves(new_file, llama, tmp_path):
    ids = torch.arange(20)[None]
    hf_attnswap.swap(llama, "squares", layers="::2", floor=0.25)
    expected = llama(ids).logits
    llama.save_pretrained(tmp_path / "model")
    saved = json.loads((tmp_path / "model" / "config.json").read_text())["attnswap"]["swapped"]
    options = {"unrotate": False, "half_life": 0.0, "floor": 0.25}
    assert saved == [{"attention": "squares", "options": options, "kind": "causal", "layers": [0, 2]}]
    torch.testing.assert_close(
        type(llama).from_pretrained(tmp_path / "model").to(ids.device).eval()(ids).logits, expected
    )


def test_a_variant_on_the_scores_is_twenty_lines():
    assert len(SCORE_VARIANT.splitlines()) <= 20


def test_variants_of_other_packages_are_found_and_a_broken_one_is_named(entries, llama):
    """One clear warning about the broken one, and all others work."""
    assert entries == [
        "the variants of entry point badpkg_variant_entry (badpkg_variant, of badpkg_variant) are missing: "
        "RuntimeError: no such year"
    ]
    assert attentions.names() == sorted([*NAMES, "relu3"], key=attentions.names().index)
    attention, given = build("relu3", 4, 2), inputs(70, 4, 2)
    expected = attention.reference(*given, causal(70), SCALING)
    torch.testing.assert_close(attention(*given, causal(70), SCALING), expected)
    assert hf_attnswap.swap(llama, "relu3")(torch.arange(20)[None]).logits.isfinite().all()


def test_looking_a_variant_up_costs_microseconds():
    """A quarter of one on a quiet machine; the bound is for a busy one."""
    for name in ("elu", "hedgehog+window"):
        attentions.get(name)
        seconds = min(timeit.repeat(lambda name=name: attentions.get(name), number=1000, repeat=5)) / 1000
        assert seconds < 5e-6


@pytest.mark.long
def test_the_first_lookups_may_come_from_many_threads():
    code = (
        "import threading; from hf_attnswap import attentions; out = []\n"
        "work = lambda: out.append(attentions.get('hedgehog+window') is attentions.get('hedgehog+window'))\n"
        "threads = [threading.Thread(target=work) for _ in range(8)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; print(out == [True] * 8, len(attentions.names()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["True", str(len(NAMES))], run.stderr


def test_the_new_file_is_forgotten():
    assert attentions.names() == NAMES


def test_duplicate_name_raises():
    class Other(attentions.get("elu")):
        pass

    with pytest.raises(ValueError, match="'elu' is already registered by hf_attnswap.attentions.elu"):
        attentions.register(Other)
    assert attentions.get("elu") is not Other


def test_a_plain_variant_may_not_take_the_name_of_a_hybrid(monkeypatch):
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))

    class Fake(attentions.Attention):
        name = "elu+window"
        cost_class = "linear"

    with pytest.raises(ValueError, match="already"):
        attentions.register(Fake)


@pytest.mark.parametrize(
    ("wrong", "right"), (("hedghog", "hedgehog"), ("sofmax", "softmax"), ("hedgehog+windw", "hedgehog+window"))
)
def test_unknown_name_suggests(wrong, right):
    with pytest.raises(ValueError) as error:
        attentions.get(wrong)
    assert f"Unknown attention {wrong!r}. Did you mean {right!r}? Available: " in str(error.value)
    assert all(name in str(error.value) for name in NAMES)


@pytest.mark.parametrize("wrong", ("zzzzzz", "", "softmax+window", "identity+window"))
def test_unknown_name_with_nothing_near_it(wrong):
    with pytest.raises(ValueError, match="Unknown attention"):
        attentions.get(wrong)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    (
        ("window", {"windw": 8}, "window has no option 'windw'. Did you mean 'window'? Its options: window, sinks"),
        ("elu", {"window": 8}, "elu has no option 'window'. Its options: unrotate, half_life"),
        ("window", {"window": 0}, "window: window is 0; expected at least 1"),
        ("elu+window", {"sinks": -1}, "elu+window: sinks is -1; expected at least 0"),
        ("window", {"window": "8"}, "window: window is '8'; expected int, for example 64"),
        ("window", {"window": 8.0}, "window: window is 8.0; expected int, for example 64"),
        ("window", {"window": True}, "window: window is True; expected int, for example 64"),
        ("window", {"window": None}, "window: window is None; expected int, for example 64"),
        ("relu_power", {"p": 3}, "relu_power: p is 3; expected one of 1, 2, 4"),
        ("relu_power", {"shift": "mean"}, "relu_power: shift is 'mean'; expected one of max, none"),
        ("relu", {"gain": 1}, "relu: gain is 1; expected bool, for example False"),
        ("relu", {"alpha": -0.5}, "relu: alpha is -0.5; expected at least 0.0"),
        ("relu", {"alpha": float("nan")}, "relu: alpha is nan; expected at least 0.0"),
        ("relu", {"alpha": float("inf")}, "relu: alpha is inf; expected"),
        ("relu", {"alpha": 10**400}, "relu: alpha is inf; expected"),
    ),
)
def test_unfit_option(name, options, says):
    with pytest.raises(ValueError) as error:
        attentions.get(name)(Heads(4, 2, 8), **options)
    assert says in str(error.value)


@pytest.mark.parametrize("value", (float("nan"), float("-inf"), float("inf"), -(10**400)))
def test_an_option_without_a_minimum_is_finite(value):
    with pytest.raises(ValueError, match=r"mine: shift is -?(inf|nan); expected a finite number"):
        Option(0.0, "no bound").check("mine", "shift", value)


def test_an_int_is_taken_for_a_float():
    made = attentions.get("relu")(Heads(4, 2, 8), alpha=0)
    assert type(made.alpha) is float and made.option_values() == {"alpha": 0.0, "gain": False}


def test_heads_must_divide():
    with pytest.raises(ValueError, match="num_attention_heads 4 is not a multiple of num_key_value_heads 3"):
        Heads(4, 3, 8)


@pytest.mark.parametrize("name", NAMES)
def test_description_is_complete(name):
    cls = attentions.get(name)
    assert cls.name == name and cls.__doc__
    assert cls.cost_class in ("quadratic", "linear", "constant")
    for text in (cls.formula, cls.cost, cls.source):
        assert isinstance(text, str) and text.strip() and "\n" not in text
    assert cls.cost == "0" or (cls.cost.startswith("O(") and cls.cost.count("(") == cls.cost.count(")"))
    assert ("n^2" in cls.cost) == (cls.cost_class == "quadratic")
    for option, described in cls.options().items():
        assert option.isidentifier() and described.help
        assert described.check(name, option, described.default) == described.default
    assert cls.options().keys() == cls(Heads(4, 2, 8)).option_values().keys()


def test_names_are_unique_and_controls_come_first():
    assert len(set(NAMES)) == len(NAMES)
    controls = [attentions.get(name).control for name in NAMES]
    assert controls == sorted(controls, reverse=True)
    assert {"softmax", "window", "none"} == {name for name in NAMES if attentions.get(name).control}


@pytest.mark.parametrize("name", NAMES)
def test_no_parameter_is_dead(name):
    """Every parameter gets a gradient, so that training under DDP finds none that is unused."""
    attention, given = build(name), inputs(150)
    attention(*given, causal(150), SCALING).square().sum().backward()
    for parameter, tensor in attention.named_parameters():
        assert tensor.grad is not None and (tensor.grad != 0).any(), parameter
