"""Words of a metric's name, and the direction that follows from them."""

import pytest

from merge_avg.checkpoint._metrics import direction, is_metric, words

DIRECTIONS = {
    "min": """loss val_loss val/loss valLoss eval_wer perplexity logloss log_loss val_rmse mape nll
        brier_score word_error_rate error_rate cross_entropy_loss
        dice_loss f1_loss map_loss accuracy_loss top1_err top_1_error top5-error
        neg_elbo negative_elbo neg_log_likelihood negative_log_likelihood -acc -val_accuracy""",
    "max": """acc val_acc1 acc@1 prec1 prec@1 val_top1 top-5 val_top_5 rougeL roc roc_auc elbo miou
        log_likelihood r2 r2_score F1Score mean_iou bleu4 recall@10
        neg_loss val_neg_loss negLoss neg_val_loss best_model_neg_loss minus_loss negated_loss
        negative_loss -loss -val_loss inverse_loss neg_log_loss neg_mean_squared_error neg_nll
        neg_root_mean_squared_error neg_mean_absolute_error neg_mean_absolute_percentage_error
        neg_brier_score""",
    None: """mAP score metric return glossy quux lr loss_accuracy accuracy_drop loss_scale
        loss_improvement wer_reduction error_free_rate loss_ratio acc_gap
        negative_sampling_loss hard_negative_loss false_negative_error false_negative_rate
        true_negative_rate neg_pos_ratio neg_acc loss_neg 1-acc 100-wer one_minus_accuracy""",
}
CASES = [(name, mode) for mode, names in DIRECTIONS.items() for name in names.split()]


@pytest.mark.parametrize(("name", "mode"), CASES)
def test_directions(name, mode):
    """Whole words tell the direction, a negation turns it round, and what is unclear is None."""
    assert direction(name) == mode


@pytest.mark.parametrize("name", [name for name, mode in CASES if mode is not None])
def test_what_stands_before_a_metric_keeps_its_direction(name):
    """The part of the data that a metric is of does not change what is better."""
    front, name = ("-", name[1:]) if name.startswith("-") else ("", name)
    assert direction(f"{front}valid_{name}") == direction(f"{front}{name}")


@pytest.mark.parametrize("name", DIRECTIONS["min"].split()[:13])
def test_twice_negated_is_as_before(name):
    """Each negation turns a loss round: two of them leave it as it is."""
    assert direction(f"neg_{name}") == "max"
    assert direction(f"minus_neg_{name}") == "min"


def test_words():
    """Capitals, separators and the number of a top-k tell words apart."""
    assert words("val/top-5Acc.F1Score@10") == ["val", "top5", "acc", "f1", "score", "10"]
    assert words("") == []


@pytest.mark.parametrize(
    ("name", "known"), [("best_fitness", 1), ("lr", 0), ("top_1", 1), ("glossy", 0)]
)
def test_metrics_among_other_numbers(name, known):
    """A number is a metric where a word of its name is one."""
    assert is_metric(name) == bool(known)
