"""Metrics by their names: which words are metrics, and whether lower or higher is better."""

from __future__ import annotations

import re

from merge_avg.options import Mode

# Words have to match whole, as a "glossy" metric is not a loss. A word that is missing costs the
# user a --mode, and one too many the best checkpoint: those that may mean either are not here.
_LOWER = re.compile(
    r"(log)?loss(es)?|err|errors?|perplexity|ppl|wer|cer|eer|fid|fvd|lpips|r?mse|r?msle|mae|s?mape"
    r"|nll|bpc|bpb|bpd|brier|deviance|cost"
)
_LIKELY = r"(log)?likelihood|elbo"
_HIGHER = re.compile(
    r"acc\d*|accuracy|bleu\d*|f[12]|fscore|aucs?|auroc|roc|auprc|map\d*|m?iou|dice|jaccard|psnr|ssim"
    r"|rouge\w*|top\d+|prec\d*|precision|recall\d*|r2|fitness|ndcg|mrr|kappa|mcc|reward|success|"
    + _LIKELY
)
_METRIC = re.compile(rf"(scores?|metrics?|returns?|{_LOWER.pattern}|{_HIGHER.pattern})\d?")
_TURNED = re.compile(r"neg(ative|ated)?|minus|inv(erse)?|reciprocal")
# What is made of a metric: no direction follows from the name.
_UNCLEAR = re.compile(
    r"free|improve\w*|gains?|drops?|gap|delta|diff\w*|chang\w*|reduc\w*|decreas\w*|increas\w*|declin\w*"
    r"|degrad\w*|ratio|scale|weights?|std|var|variance|slope|saved|complement|inverted|non?|without"
)
# Beside a negation every word has to be known: neg_log_loss is the loss turned round, but
# negative_sampling_loss and false_negative_error are what they say.
_KNOWN = re.compile(
    rf"log|mean|median|max|avg|average|root|squared?|abs(olute)?|percentage|rate|poisson|gamma|cross"
    rf"|entropy|word|val|valid(ation)?|train(ing)?|test|eval|dev|best|model|{_METRIC.pattern}"
    rf"|{_TURNED.pattern}"
)


def words(name: str) -> list[str]:
    """Return the words of a name, in lower case; val/topK, valTopK and val_top_k have the same."""
    name = re.sub(r"(?i)(?<![a-z])top[-_](?=\d)", "top", name)
    parts = re.split(r"[^A-Za-z0-9]+|(?<=[a-z0-9])(?=[A-Z])", name)
    return [part.lower() for part in parts if part]


def is_metric(name: str) -> bool:
    """Return whether a word of a name is that of a metric, in any letter case: mAP, mIoU."""
    return any(map(_METRIC.fullmatch, (*words(name), *words(name.lower()))))


def turned(name: str) -> int:
    """Return how often a name turns the direction of a metric round, as in neg_loss and -loss."""
    signed = name.strip().startswith("-")
    return sum(bool(_TURNED.fullmatch(word)) for word in words(name)) + signed


def direction(metric: str) -> Mode | None:
    """Return whether lower or higher is better for a metric; None where its name does not tell."""
    found = words(metric)
    lower, higher = (list(filter(one.fullmatch, found)) for one in (_LOWER, _HIGHER))
    if lower and found[-1] == lower[-1]:  # dice_loss, top1_err: made of what is better high
        higher = []
    # 1-loss and 100-wer are differences.
    difference = re.match(r"\s*\d+\.?\d*\s*-", metric)
    if bool(lower) == bool(higher) or difference or any(map(_UNCLEAR.fullmatch, found)):
        return None
    if turns := turned(metric):
        behind = found[found.index((lower or higher)[0]) :]
        # neg_acc may well be the accuracy on negatives.
        sure = lower or metric.strip().startswith("-") or re.fullmatch(_LIKELY, higher[0])
        if not sure or turned("_".join(behind)) or not all(map(_KNOWN.fullmatch, found)):
            return None
    return "min" if bool(lower) == (turns % 2 == 0) else "max"
