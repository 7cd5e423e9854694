"""Arms that keep some groups on softmax, measured, told and drawn."""

import json

import pytest
from test_tradeoff import Letters, settings, text  # noqa: F401 (a fixture)
from tiny_models import tiny

from hf_attnswap import report
from hf_attnswap.report.facts import swapped_layers, swapped_share, window_control
from hf_attnswap.sources.plans import write_plan
from hf_attnswap.tradeoff import Arm, measure

KEPT = "hedgehog+window:window=4,sinks=1,keep=[0.1,2.0]"


@pytest.fixture(scope="module")
def measured(text, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("plans")
    plan = write_plan(folder / "quarter.yaml", Arm.parse("window:window=4,keep=[0.0,0.1,1.0]").swap, tiny())
    asked = settings(arms=("softmax", "none", str(plan), KEPT), align_tokens=64, train_lengths=())
    return measure(tiny(), Letters(), text, None, asked, folder / "out", model_name="tiny", command="test"), folder


def test_what_is_swapped_and_what_keeps_softmax(measured):
    arms = {arm.label: arm for arm in measured[0].arms}
    plan, kept = arms["quarter"], arms[KEPT]
    assert all(arm.status == "measured" and not arm.control for arm in (plan, kept)), plan.reason or kept.reason
    assert plan.cost.endswith("softmax in 3 of 6 key/value groups") and plan.cost_class == "quadratic"
    assert (plan.swapped[0].layers, plan.swapped[0].groups) == ([2], ["1.1"])
    assert (swapped_layers(plan), swapped_share(measured[0], plan)) == (2, 0.5)
    assert kept.new_parameters > 0 and kept.alignment.tokens == 64
    cache = {arm.label: arm.speed[-1].cache_mib for arm in measured[0].arms}
    assert 0 < cache["quarter"] < cache["softmax"]


def test_a_plan_is_no_control_of_itself(measured):
    plan = next(arm for arm in measured[0].arms if arm.label == "quarter")
    assert plan.attention == "window" and window_control(measured[0], plan) is None


def test_it_is_told_and_drawn(measured):
    found, folder = measured
    written = report.write_all(found, folder / "report")
    assert json.loads((folder / "report" / "report.json").read_text())
    said = next(path for path in written if path.suffix == ".md").read_text()
    assert "quarter" in said and "softmax in 3 of 6 key/value groups" in said
