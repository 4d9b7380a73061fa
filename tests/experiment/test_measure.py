from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthoreg_ext as ox
from orthoreg_ext.experiment import measure, run
from orthoreg_ext.experiment.data import Samples, load_dataset
from orthoreg_ext.experiment.models import build_model
from orthoreg_ext.experiment.record import Run
from orthoreg_ext.experiment.state import STATE_NAME, load_state, save_state
from orthoreg_ext.report.run import OLD

EPOCHS = 100  # enough for the most images


@pytest.fixture(scope="module")
def digits() -> tuple[Samples, Samples]:
    data = load_dataset("digits")
    return data.train, data.test


def net() -> nn.Module:
    return build_model("vgg", num_classes=10, image_shape=(1, 8, 8), seed=3).eval()


def test_the_sensitivity_is_the_accuracy_with_one_group_cut(
    digits: tuple[Samples, Samples],
) -> None:
    train, test = digits
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    example = train.batch(slice(0, 1))[0]
    table, note = measure.sensitivity(model, example, train, test, "l1", EPOCHS)
    assert note == "on 512 of the held-out images"
    assert table is not None
    assert table.metric == "accuracy"
    assert [group.name for group in table.groups] == [f"conv{i}" for i in range(1, 7)]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    # the same by hand: the third layer, half of it at zero
    other = copy.deepcopy(model)
    norms = other.conv3.weight.detach().abs().sum((1, 2, 3))
    gone = norms.argsort(stable=True)[: len(norms) // 2]
    read = other.conv4.weight
    with torch.no_grad():
        read[:, gone] = 0
    some = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:512]
    x, y = test.batch(some)
    right = 100 * float((other(x).argmax(1) == y).float().mean())
    assert table.groups[2].removed[1] == len(gone)
    assert table.groups[2].values[1] == pytest.approx(right, abs=1e-4)


@pytest.mark.parametrize(
    ("epochs", "images"),
    [(1, 64), (10, 128), (100, 512)],  # 1198 * 3 * 10 / 10 / (4 ratios * 7 layers) = 128.4
)
def test_the_images_are_as_many_as_the_training_allows(
    digits: tuple[Samples, Samples], monkeypatch: pytest.MonkeyPatch, epochs: int, images: int
) -> None:
    train, test = digits
    seen: list[int] = []

    def counted(model: nn.Module, samples: Samples) -> float:
        seen.append(len(samples))
        return 50.0

    monkeypatch.setattr(measure, "accuracy", counted)
    measure.sensitivity(net(), train.batch(slice(0, 1))[0], train, test, "l1", epochs)
    assert len(seen) <= 1 + 6 * len(measure.RATIOS)
    assert set(seen) == {images}


class Fixed(nn.Module):
    """Nothing of it can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x.flatten(1))


def test_a_network_that_cannot_be_cut_gives_the_reason(digits: tuple[Samples, Samples]) -> None:
    train, test = digits
    table, reason = measure.sensitivity(
        Fixed(), train.batch(slice(0, 1))[0], train, test, "l1", EPOCHS
    )
    assert table is None
    assert "\n" not in reason
    assert len(reason) > 20


def test_the_same_layer_again() -> None:
    model = net()
    name, _ = measure.correlation_matrix(model)
    assert name == "conv4"
    other, matrix = measure.correlation_matrix(model, "conv2")
    assert other == "conv2"
    rows = nn.functional.normalize(model.conv2.weight.detach().flatten(1))
    torch.testing.assert_close(matrix, (rows @ rows.T).abs(), atol=1e-5, rtol=1e-5)


def test_a_run_holds_what_its_report_draws(tiny: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(tiny, out)
    for arm in result.arms:
        assert arm.final_correlations.keys() == arm.layer_correlations.keys()
        assert (arm.sensitivity is not None) == (arm.seed == 0)
        for cut in arm.cuts:
            assert (cut.scores is not None) == (arm.seed == 0)
        if arm.seed == 0:
            assert arm.sensitivity is not None
            assert arm.sensitivity.baseline > arm.sensitivity.groups[0].values[-1]
            for cut in arm.cuts:
                assert cut.scores is not None
                assert cut.scores.criterion == arm.criterion
                removed = sum(before - after for _, before, after in cut.layers)
                assert sum(map(sum, cut.scores.gone)) == removed
                assert sum(map(sum, cut.scores.kept)) == cut.prunable[1]
    assert OLD not in (out / "report.html").read_text()
    assert result.versions["torch"] == torch.__version__
    assert result.versions["orthoreg_ext"] == ox.__version__


def test_a_run_of_an_older_version_can_be_finished(tiny: dict[str, Any], tmp_path: Path) -> None:
    tiny |= {"seeds": 1, "rounds": 1, "epochs": 1, "finetune_epochs": 1}
    out = tmp_path / "out"
    run(tiny, out)
    record, tensors = load_state(out / STATE_NAME)
    record["finished"] = False
    for arm in record["arms"]:
        for key in ("final_correlations", "sensitivity", "sensitivity_note"):
            del arm[key]
        for cut in arm["cuts"]:
            del cut["scores"]
    save_state(out / STATE_NAME, record, tensors)
    (out / "report.html").unlink()
    run({}, out, resume=True)
    assert OLD in (out / "report.html").read_text()
    found = json.loads((out / "history.json").read_text())["run"]
    assert Run.from_json(found).arms[0].sensitivity is None
