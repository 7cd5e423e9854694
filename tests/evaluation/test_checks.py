"""Every variant passes; swaps that are broken on purpose do not, each by the check that is there for it."""

import pytest
import torch
from accelerate import cpu_offload
from tiny_models import randomise, tiny, tokens

import hf_attnswap
from hf_attnswap import tradeoff
from hf_attnswap.attentions import registry
from hf_attnswap.attentions.elu import Elu
from hf_attnswap.attentions.relu import Relu
from hf_attnswap.evaluation.checks import check_swap
from hf_attnswap.evaluation.distribution import distribution_facts
from hf_attnswap.evaluation.perplexity import perplexity
from hf_attnswap.integration import attention as attention_function
from hf_attnswap.masks import Mask

TEXT = tokens(64, batch=1)
NAMES = ("causal", "padding", "state", "definition", "seam")


def failures(name):
    model = randomise(hf_attnswap.swap(tiny(), name))
    return [check.name for check in check_swap(tiny(), model, TEXT) if not check.passed]


@pytest.mark.parametrize("name", [name for name in registry.names() if name != "performer"])
def test_what_is_right_passes(name):
    checks = check_swap(tiny(), randomise(hf_attnswap.swap(tiny(), name)), TEXT)
    assert [check.name for check in checks] == list(NAMES)
    assert [(check.name, check.worst, check.says) for check in checks if not check.passed] == []


@pytest.mark.parametrize("name", ("gated", "hedgehog+window"))
def test_what_is_offloaded_passes(name):
    model = cpu_offload(randomise(hf_attnswap.swap(tiny(), name)), torch.device("cpu"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert [check.says for check in check_swap(tiny(), model, TEXT) if not check.passed] == []
    assert perplexity(model, TEXT.reshape(-1), 16).tokens > 0
    assert len(distribution_facts(model, TEXT[:, :16])) == 3


def without_mask(cls):
    def forward(self, query, key, value, mask, scaling, state=None):
        return cls.forward(self, query, key, value, Mask(query.shape[2], key.shape[2], causal=False), scaling, None)

    return forward


def without_state(cls):
    def forward(self, query, key, value, mask, scaling, state=None):
        if state is not None:
            mask, state = Mask(query.shape[2], key.shape[2]), {}
        return cls.forward(self, query, key, value, mask, scaling, state)

    return forward


def wrong_scale(cls):
    def forward(self, query, key, value, mask, scaling, state=None):
        return cls.forward(self, query, key, value, mask, 2 * scaling, state)

    return forward


BROKEN = [
    (Relu, without_mask, {"causal", "padding", "state", "definition"}),
    (Elu, without_mask, {"causal", "padding", "state", "definition"}),
    (Elu, without_state, {"state"}),
    (Relu, wrong_scale, {"definition"}),
]


@pytest.fixture
def broken(monkeypatch):
    """`broken(Elu, without_state)` breaks that variant; its name."""

    def make(cls, how):
        kind = type(f"Broken{cls.__name__}", (cls,), {"name": f"broken_{cls.name}", "forward": how(cls)})
        registry.names()
        monkeypatch.setitem(registry._registered, kind.name, kind)
        return kind.name

    return make


@pytest.mark.parametrize(("cls", "how", "caught_by"), BROKEN)
def test_a_broken_variant_is_caught(broken, cls, how, caught_by):
    assert set(failures(broken(cls, how))) == caught_by


@pytest.mark.parametrize("change", ("scale", "mask"))
def test_a_broken_seam_is_caught(monkeypatch, change):
    attend = attention_function.attend

    def wrong(attention, query, key, value, mask, scaling, layer=None):
        if change == "scale":
            return attend(attention, query, key, value, mask, 2 * scaling, layer)
        return attend(attention, query, key, value, Mask(query.shape[2], key.shape[2], causal=False), scaling, layer)

    monkeypatch.setattr(attention_function, "attend", wrong)
    assert "seam" in failures("relu_norm")


def test_what_raises_is_a_failure_with_its_reason(broken):
    def refuses(cls):
        def forward(self, query, key, value, mask, scaling, state=None):
            if mask.valid is not None:
                raise NotImplementedError("no padding")
            return cls.forward(self, query, key, value, mask, scaling, state)

        return forward

    model = hf_attnswap.swap(tiny(), broken(Relu, refuses))
    (check,) = [check for check in check_swap(tiny(), model, TEXT) if not check.passed]
    assert check.name == "padding" and check.says.startswith("padding changes what a text says: ")
    assert "no padding" in check.says


@pytest.mark.parametrize(("cls", "how", "caught_by"), BROKEN)
def test_the_report_shows_no_number_of_a_broken_swap(broken, cls, how, caught_by, tmp_path):
    from tradeoff.test_tradeoff import Letters, settings

    from hf_attnswap.sources.texts import TextSource

    path = tmp_path / "text.txt"
    path.write_text("The cat sat on the mat, and then it went out into the rain. " * 30)
    name = broken(cls, how)
    found = tradeoff.measure(
        tiny(), Letters(), TextSource(str(path)), None,
        settings(arms=("softmax", name), lengths=(16,), train_lengths=()),
        tmp_path / "out", model_name="tiny", command="test",
    )  # fmt: skip
    softmax, arm = found.arms
    assert softmax.status == "measured" and arm.status == "failed"
    assert arm.perplexity == arm.speed == []
    first = next(check for check in arm.checks if not check.passed)
    assert arm.reason.startswith(f"it fails the check '{first.name}': ")
    assert {check.name for check in arm.checks if not check.passed} == caught_by
    words = hf_attnswap.report.summary.summary(found)
    assert any(paragraph.startswith(f"Failed: {name}") for paragraph in words)


def test_bfloat16_has_its_own_limit():
    original, model = tiny().bfloat16(), hf_attnswap.swap(tiny(), "relu_norm").bfloat16()
    assert all(check.passed and check.limit == 0.1 for check in check_swap(original, model, TEXT))
    assert torch.isfinite(torch.tensor([check.worst for check in check_swap(original, model, TEXT)])).all()
