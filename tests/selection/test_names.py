"""Names of runs, as frameworks and people give them, and what is read in each."""

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merge_avg.selection._names import Metadata, is_average, read_names, series


def read(*names, clock=None):
    """Return step, epoch and metrics of each name of a run."""
    found = read_names([Path(name) for name in names], clock)
    return [(one.step, one.epoch, dict(one.metrics)) for one in found.values()]


# How a name is made of an epoch (and of a step, 40 times as much), and whether that is read as an
# epoch, a step, or both; by itself, and in a run.
SCHEMES = [
    ("{e}epoch.pth", "epoch", "epoch"),  # ESPnet2
    ("epoch_{e}.pth", "epoch", "epoch"),  # mmengine
    ("iter_{s}.pth", "step", "step"),
    ("best_coco_bbox_mAP_epoch_{e}.pth", "epoch", "epoch"),
    ("epoch-{e}.pt", "epoch", "epoch"),  # icefall
    ("epoch{e}.pt", "epoch", "epoch"),  # Ultralytics
    ("epoch={e}-step={s}.ckpt", "both", "both"),  # Lightning
    ("model-epoch={e:02}-val_loss=0.25.ckpt", "epoch", "epoch"),
    ("model_epoch={e}.ckpt", "epoch", "epoch"),
    ("ep{e}-ba{s}-rank0.pt", "both", "both"),  # Composer
    ("checkpoint{e}.pt", "epoch", "epoch"),  # fairseq
    ("checkpoint_{e}_{s}.pt", "both", "both"),
    ("checkpoint-{e}.pth.tar", "epoch", "epoch"),  # timm
    ("model_step_{s}.pt", "step", "step"),  # OpenNMT
    ("step_{s}_seed_42.pt", "step", "step"),
    ("checkpoint_iter_{s}.pth", "step", "step"),
    ("global_step{s}", "step", "step"),  # DeepSpeed
    ("fold3_epoch{e}.pt", "epoch", "epoch"),
    ("modelEpoch{e}.pt", "epoch", "epoch"),
    ("{e}_epoch_net.pth", "epoch", "epoch"),
    ("ckpt_{e}_0.93.pth", "epoch", "epoch"),
    ("model_{e}.pth", None, "epoch"),
    ("model.{e}.pt", None, "epoch"),
    ("{e:04}.pth", None, "epoch"),
    ("{e}.pt", None, "epoch"),  # WeNet
    ("model_{e:04}.pth", None, "epoch"),
    ("model_best_{e}.pth", None, "epoch"),
    ("{e}_net_G.pth", None, "epoch"),  # pix2pix
    ("weights-{e}-0.05.pt", None, "epoch"),
    ("weights.{e}-0.05.pt", None, "epoch"),
    ("resnet50_{e}.pth", None, "epoch"),
    ("model_3_of_{e}_at_0.5.pt", None, "epoch"),
    ("epoch100_model_{e}.pt", "100", "epoch"),  # the length of the training, and the epoch
    ("bs32_lr0.1_{e}.pt", None, "epoch"),
    ("net_g_{s}00.pth", None, "step00"),  # BasicSR
    ("G_{s}00.pth", None, "step00"),  # VITS
    ("name_e{e}_s{s}.pth", None, "both"),  # RVC
    ("fold{e}.pt", None, None),
    ("model_v{e}.pt", None, None),
    ("seed-{e}.pt", None, None),
    ("model-{e}.5b.pt", None, None),
    ("epoch-{e}.5.pt", None, None),
    ("model_{e}_{s}.pt", None, None),
    ("best_f1_{e}.pt", None, None),
]


def expected(kind, e):
    step = {"step": 40 * e, "both": 40 * e, "step00": 4000 * e}.get(kind)
    return step, {"100": 100, "epoch": e, "both": e}.get(kind)


@pytest.mark.parametrize(("scheme", "alone", "run"), SCHEMES)
@settings(max_examples=25)
@given(epochs=st.sets(st.integers(1, 98), min_size=2, max_size=6).map(list))
def test_steps_and_epochs(scheme, alone, run, epochs):
    """Words tell what numbers count; where none does, the number that varies in a run counts."""
    names = [scheme.format(e=e, s=40 * e) for e in epochs]
    for name, e in zip(names, epochs, strict=True):
        assert read(name)[0][:2] == expected(alone, e)
    assert [one[:2] for one in read(*names)] == [expected(run, e) for e in epochs]


def test_a_number_without_a_word_counts_what_is_asked_for():
    """--steps takes numbers of no word for steps, and --epochs for epochs; words are believed."""
    assert [one[:2] for one in read("m_1.pt", "m_2.pt", clock="step")] == [(1, None), (2, None)]
    found = [one[:2] for one in read("G_1000.pt", "G_2000.pt", clock="epoch")]
    assert found == [(None, 1000), (None, 2000)]
    assert read("epoch_1.pt", "epoch_2.pt", clock="step")[0][:2] == (None, 1)


@pytest.mark.parametrize(
    ("names", "counts"),
    [
        (("G_0.pth", "G_1000.pth"), [(0, None), (1000, None)]),
        (("model_0004999.pth", "model_0009999.pth"), [(4999, None), (9999, None)]),  # detectron2
        (("model-100.pt", "model-200.pt"), [(None, 100), (None, 200)]),
        (("batch32_ep1.pt", "batch32_ep2.pt"), [(None, 1), (None, 2)]),
        (("step_8_epoch_1.pt", "step_8_epoch_2.pt"), [(None, 1), (None, 2)]),
        (("epoch=0-step=10.ckpt", "epoch=0-step=20.ckpt"), [(10, 0), (20, 0)]),
        (("fold1_epoch3.pt", "fold2_epoch4.pt"), [(None, 3), (None, 4)]),
        (("fold1_3.pt", "fold2_4.pt"), [(None, 3), (None, 4)]),
        (("a/last_3.pt", "b/last_3.pt"), [(None, None)] * 2),
        (("a/checkpoint3.pt", "b/checkpoint3.pt"), [(None, 3)] * 2),
        (("m_1.pt", "m_2.safetensors"), [(None, 1), (None, 2)]),
        (("a#.pt", "a1.pt"), [(None, None)] * 2),
        (("m1.2.3.pt", "m1.2.4.pt"), [(None, None)] * 2),
        (("yolov8s.pt",), [(None, None)]),
        (("vit_s_16.pt",), [(None, None)]),
        (("last.ckpt",), [(None, None)]),
        (("epoch-30-avg-2.pt", "epoch-30-avg-5.pt"), [(None, 30)] * 2),
        (("gpt-step=1e3.ckpt",), [(1000, None)]),
        (("epoch=3.0.ckpt",), [(None, 3)]),
    ],
)
def test_traps(names, counts):
    """Constant numbers, parts of sets, versions and sizes are not taken for time."""
    assert [one[:2] for one in read(*names)] == counts


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("best_model_{}_neg_loss=-0.9000.pt", {"neg_loss": -0.9}),  # ignite
        ("best_model_{}_val_f1=0.5.pt", {"val_f1": 0.5}),
        ("epoch={}-val_loss=0.5-acc=nan.ckpt", {"val_loss": 0.5}),
        ("epoch={}-val_loss_epoch=1.0.ckpt", {"val_loss_epoch": 1.0}),  # Lightning
        ("model--val_loss=1e-3-epoch={}-last.ckpt", {"val_loss": 1e-3}),  # NeMo
        ("epoch={}-val/f1=0.5".replace("/", "_"), {"val_f1": 0.5}),
        ("epoch={}-fold=2-seed=1-recall@10=0.5.pt", {"recall@10": 0.5}),
        ("checkpoint_{}-top_5_acc=0.9.pt", {"top_5_acc": 0.9}),
        ("model_{}_loss_0.25.pt", {"loss": 0.25}),
        ("model_{}_loss0.25.pt", {"loss": 0.25}),
        ("epoch_{}_acc_93.pt", {"acc": 93.0}),
        ("checkpoint.best_bleu_27.5.pt", {"bleu": 27.5}),  # fairseq
        ("best_loss_epoch_{}.pt", {}),
        ("model_{}_lr_0.1.pt", {}),
    ],
)
def test_a_metric_is_one_metric_across_epochs(name, metrics):
    """The number of the epoch, which varies, is no part of the name of a metric beside it."""
    for one in read(*(name.format(n) for n in (3, 4, 17))):
        assert {key: value for key, value in one[2].items() if not math.isnan(value)} == metrics


@given(
    st.lists(st.text("ab0123456789_-=.@eEpochstp", min_size=1, max_size=30), min_size=1, max_size=5)
)
def test_any_name_is_read(names):
    """No name is an error, and each gets an answer."""
    paths = [Path(f"x{name}y") for name in names]
    assert set(read_names(paths)) == set(paths)


def test_special_names():
    """fairseq's epoch and step, and the width of a stored EMA of EDM2, have places of their own."""
    (found,) = read_names([Path("network-snapshot-0002147-0.100.pkl")]).values()
    assert found == Metadata(2147, sigma=0.1)
    assert read("network-snapshot-000200.pkl")[0][:2] == (None, None)


def test_series():
    """Names that differ in numbers and endings only are one series."""
    assert series(Path("m_1.pt")) == series(Path("a/m_20.pth.tar")) != series(Path("m_1_ema.pt"))


@pytest.mark.parametrize(
    "name",
    """epoch-30-avg-15.pt pretrained-epoch-30-avg-9.pt avg_30.pt avg5.pt valid.acc.ave_10best.pth
    valid.acc.ave.pth train.loss.ave.best.pth checkpoint_avg5.pt checkpoint_avg_10.pt averaged.pt
    model_swa.pth swa.ckpt average_model.pt model.avg10.pt avg_last_10_checkpoint.pt modelAvg.pt
    AveragedModel.pt greedy_soup.pt averaged_epoch_10-20.pt""".split(),
)
def test_averages(name):
    """Averages that recipes make are known by a word of their names."""
    assert is_average(Path(name))


@pytest.mark.parametrize(
    "name",
    """epoch=3-avg_loss=0.1.pt avg_val_acc_0.93.pt avg_loss_3.pt loss_avg=0.3.pt avg-score=3.pt
    val_loss_avg_0.3.pt average_precision_93.pt avg_reward_200.pt model_avgpool_3.pt wave_3.pt
    save_3.pt octave.pt swan.pt model_ema_3.pt mean_teacher_3.pt epoch-30.pt""".split(),
)
def test_names_that_are_not_of_averages(name):
    """A metric that is an average, and words that only begin so, say nothing about the file."""
    assert not is_average(Path(name))
