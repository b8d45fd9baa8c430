"""Running statistics after averaging."""

import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from merge_avg import recalibrate_batch_norm
from merge_avg.engine._run import run
from merge_avg.options import Options
from merge_avg.plan import prepare
from merge_avg.report.report import describe


def network():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_statistics_are_those_of_the_data():
    """The statistics become those of the layer's inputs, as update_bn makes them."""
    torch.manual_seed(0)
    model = network().eval()
    twin = network().eval()
    twin.load_state_dict(model.state_dict())
    loader = [(torch.randn(32, 4) * 3 + 1, None) for _ in range(4)]
    recalibrate_batch_norm(model, loader, "cpu")
    update_bn(loader, twin)
    for name, value in twin.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    inputs = torch.cat([model[0](batch) for batch, _ in loader])
    torch.testing.assert_close(model[1].running_mean, inputs.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert not model.training


def test_a_note_says_that_they_were_averaged(tmp_path):
    """Where running statistics are averaged, a note points to the recipe; elsewhere not."""
    for name, model in (("bn", network()), ("plain", nn.Linear(4, 4))):
        paths = [tmp_path / f"{name}{number}.pt" for number in range(2)]
        for path in paths:
            torch.save(model.state_dict(), path)
        job = prepare(paths, tmp_path / f"{name}.pt", Options())
        notes = describe(job, run(job), "1")["notes"]
        found = [note for note in notes if "2 BatchNorm statistics averaged" in note]
        assert len(found) == (name == "bn")
        assert all("recalibrate_batch_norm" in note for note in found)
