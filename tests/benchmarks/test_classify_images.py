"""Digits: the file format, the split, the metrics of an arm beside scikit-learn, and a run from files to table."""

import gzip

import numpy
import pytest
import torch

from hf_attnswap import UsageError
from hf_attnswap.report import read, to_json


@pytest.fixture
def images(script):
    return script("benchmarks/classify_images")


def idx(path, numbers, kind=8):
    sizes = b"".join(size.to_bytes(4, "big") for size in numbers.shape)
    data = bytes([0, 0, kind, numbers.ndim]) + sizes + numbers.astype("uint8").tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.fixture
def digits(tmp_path):
    """300 images of 14 x 14 in three classes: where the bright half is tells the class."""
    draw = numpy.random.default_rng(0)
    labels = draw.integers(0, 3, 300)
    pictures = draw.integers(0, 60, (300, 14, 14))
    pictures[labels == 0, :7] += 180
    pictures[labels == 1, 7:] += 180
    return idx(tmp_path / "images.gz", pictures), idx(tmp_path / "labels.gz", labels), pictures, labels


def test_files_are_read_as_they_were_written(images, digits, tmp_path):
    path, labels_path, pictures, labels = digits
    assert (images.read_idx(path, 3).numpy() == pictures).all()
    assert images.read_idx(labels_path, 1).tolist() == labels.tolist()
    assert images.read_idx(idx(tmp_path / "plain", labels), 1).tolist() == labels.tolist()
    (tmp_path / "short").write_bytes((tmp_path / "plain").read_bytes()[:-1])
    wrong = {
        (tmp_path / "short", 1): "is cut off: it says \\[300\\], and has 299",
        (path, 1): "no idx file of uint8 with 1",
        (idx(tmp_path / "wide", labels, kind=9), 1): "no idx file",
        (tmp_path / "none", 3): "does not exist",
    }
    for given, says in wrong.items():
        with pytest.raises(UsageError, match=says):
            images.read_idx(*given)


def test_the_split_is_always_the_same_and_shares_nothing(images):
    pictures, labels = (
        torch.arange(100, dtype=torch.uint8).repeat_interleave(4).view(100, 2, 2),
        torch.zeros(100).byte(),
    )
    training, validation = images.split(pictures, labels, 30)
    assert training.shape == (70, 5) and validation.shape == (30, 5)
    assert sorted(training[:, 1].tolist() + validation[:, 1].tolist()) == list(range(100))
    assert validation.tolist() == images.split(pictures, labels, 30)[1].tolist() != training[:30].tolist()
    with pytest.raises(UsageError, match="expected as many labels as images"):
        images.split(pictures, labels[1:], 30)
    assert images.pixels(torch.tensor([[7, 0, 255, 0, 255]])).tolist() == [[[[-1, 1], [-1, 1]]]]


def test_metrics_are_those_of_scikit_learn(images):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = torch.Generator().manual_seed(0)
    true = torch.randint(4, (200,), generator=draw)
    said = torch.where(torch.rand(200, generator=draw) < 0.7, true, torch.randint(4, (200,), generator=draw))
    found = {result.metric: result.value for result in images.results(said.tolist(), true.tolist())}
    assert found == pytest.approx(
        {
            "accuracy": sklearn.accuracy_score(true, said),
            "f1": sklearn.f1_score(true, said, average="macro"),
            "matthews": sklearn.matthews_corrcoef(true, said),
        }
    )


@pytest.mark.long
def test_every_arm_is_trained_and_compared(images, digits, tmp_path, capsys):
    out = tmp_path / "out"
    told = [
        "--images",
        str(digits[0]),
        "--labels",
        str(digits[1]),
        "--num_eval_images",
        "100",
        "--output_dir",
        str(out),
    ]
    report = images.main(
        [*told, "--arm", "none", "--arm", "hedgehog", "--num_train_epochs", "3", "--per_device_train_batch_size", "8"]
    )
    assert to_json(read(out / "report.json")) == to_json(report)
    softmax, none, hedgehog = ({metric.metric: metric for metric in arm.metrics} for arm in report.arms)
    assert [arm.label for arm in report.arms] == ["softmax", "none", "hedgehog"] and report.data.unit == "images"
    (group,) = report.arms[2].swapped
    assert (group.attention, group.kind, group.layers) == ("hedgehog", "bidirectional", [0, 1])
    assert softmax["accuracy"].difference is None
    # Without attention the first token knows nothing of the image, and says one class.
    assert none["accuracy"].value < 0.5 and none["matthews"].value == 0
    assert none["accuracy"].difference.verdict == "worse"
    assert softmax["accuracy"].value > 0.9 and hedgehog["accuracy"].value > 0.9
    for name in ("accuracy", "f1", "matthews"):
        found = none[name]
        assert found.difference.value == pytest.approx(found.value - softmax[name].value)
        assert found.difference.low <= found.difference.value <= found.difference.high < 0
    page = (out / "report.md").read_text()
    assert "| none (control) | " in page and "training: 200 images" in page and "digits: f1 (100 items)" in page
    assert "Keeps most: hedgehog" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is not empty"):
        images.main(told)
