"""The numbers of an audit as findings of the run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from groundwire import Finding
from groundwire.records import Severity
from groundwire_bias_audit.attribution.flip_attributions import NO_FLIP, FlipAttributions
from groundwire_bias_audit.attribution.shift import AttributionShift
from groundwire_bias_audit.audit.association import bias_amplification, interdependence, rare_value_ratio
from groundwire_bias_audit.audit.gate import Verdict, conclusion
from groundwire_bias_audit.audit.record import AuditRecord
from groundwire_bias_audit.output.export import plain
from groundwire_bias_audit.stream.streaming_counts import StreamingCounts, TrainingCounts

SEVERITY: dict[Verdict, Severity] = {
    Verdict.PASS: "info",
    Verdict.INSUFFICIENT: "warn",
    Verdict.DISPARITY: "fail",
}


def findings_of(
    plugin: str, variant: str, result: AuditRecord, stream: StreamingCounts, training: TrainingCounts
) -> list[Finding]:
    """Verdict, overall metrics, gaps, and what changed; codes end in ``@variant`` for other variants than the model."""
    suffix = "" if variant == "dense" else f"@{variant}"
    found = [_verdict(plugin, variant, suffix, result)]
    for code, value, text in [*_numbers(result), *_paper(result, stream, training)]:
        if not math.isnan(value):
            found.append(Finding(plugin, code + suffix, "info", value, f"{text} ({_named(variant)})."))
    if result.comparison is not None:
        found += _changes(plugin, variant, result)
    return found


def _named(variant: str) -> str:
    return "the model as it is" if variant == "dense" else f"variant {variant}"


def _verdict(plugin: str, variant: str, suffix: str, result: AuditRecord) -> Finding:
    text = f"Audit of {_named(variant)}: {result.verdict}: {result.conclusion}."
    return Finding(plugin, f"verdict{suffix}", SEVERITY[result.verdict], str(result.verdict), text)


def _numbers(result: AuditRecord) -> Iterator[tuple[str, float, str]]:
    overall = result.to_frame([], target=None)
    for name in ("accuracy", "roc_auc", "calibration_error", "uncertainty", "mean_absolute_error"):
        if name in overall:
            text = f"{name} over all rows" + (", mean over targets" if len(overall) > 1 else "")
            yield name, _mean(overall[name]), text
    if result.task in ("binary", "multilabel"):
        _, worst = result.worst_group
        yield "worst_group_accuracy", worst, "Lowest accuracy of a cell of group and label"
    largest: dict[tuple[str, str], float] = {}
    for test in result.tests:
        key = test.metric, test.attribute
        largest[key] = max(largest.get(key, -math.inf), -math.inf if math.isnan(test.gap) else test.gap)
    for (metric, attribute), gap in largest.items():
        value = math.nan if math.isinf(gap) else gap
        yield f"{metric}_gap[{attribute}]", value, f"Largest difference of {metric} between groups of {attribute}"


def _mean(values: Any) -> float:
    kept = np.asarray(values, dtype=float)
    return float(np.nanmean(kept)) if not np.isnan(kept).all() else math.nan


def _paper(result: AuditRecord, stream: StreamingCounts, training: TrainingCounts) -> Iterator[tuple[str, float, str]]:
    if result.task not in ("binary", "multilabel"):
        return
    amplified = [a for a in amplifications(result, training).values() if not math.isnan(a)]
    if amplified:
        worst = max(amplified, key=abs)
        yield "bias_amplification", worst, f"Largest of {len(amplified)} eligible bias amplifications"
    counts = result.counts.overall().confusion
    assert counts is not None
    rare = [rare_value_ratio(counts[0, t]) for t in range(counts.shape[1])]
    if not np.isnan(rare).all():
        yield "rare_value_ratio", float(np.nanmin(rare)), "Predicted over true frequency of the rarer value, the lowest"
    if stream.products is not None:
        linked = interdependence(stream.products)
        if not np.isnan(linked).all():
            yield "interdependence", float(np.nanmean(linked)), "How well other outputs predict an output (mean R^2)"


def amplifications(result: AuditRecord, training: TrainingCounts | None = None) -> dict[tuple[Any, ...], float]:
    """Bias amplification by (feature, group, target), NaN where it is not eligible."""
    found = {}
    for feature in result.features:
        counts = result.counts.of([feature])
        if counts.confusion is None or counts.groups.controls:
            continue
        total = counts.confusion.sum(axis=0)
        for g, level in enumerate(counts.groups.levels[0]):
            trained = None if training is None else training.of(feature, level)
            for t, target in enumerate(result.targets):
                inside = counts.confusion[g, t]
                cells = np.stack([total[t] - inside, inside])
                trained_cells = None if trained is None else trained[t]
                found[feature, level, target] = bias_amplification(cells, trained_cells).value
    return found


def _changes(plugin: str, variant: str, result: AuditRecord) -> Iterator[Finding]:
    assert result.comparison is not None
    comparison, suffix = result.comparison, f"@{variant}"
    rows = comparison.pairs.sum() / max(comparison.pairs.shape[1], 1)
    flips = float(comparison.flips.sum() / comparison.flips.shape[1] / rows)
    yield Finding(
        plugin, f"flip_rate{suffix}", "info", flips, f"Share of rows whose prediction changed ({_named(variant)})."
    )
    reasons = conclusion(comparison.tests, comparison.gate)
    text = f"Did a group lose in {_named(variant)}: {comparison.verdict}: {reasons}."
    severity = SEVERITY[comparison.verdict]
    yield Finding(plugin, f"change_verdict{suffix}", severity, str(comparison.verdict), text)


def nothing_audited(plugin: str, why: str) -> Finding:
    """There was nothing to audit."""
    return Finding(plugin, "audited", "warn", 0, why)


def no_variants(plugin: str) -> Finding:
    """Nobody offers variants of the model."""
    text = "No plugin of this run offers another variant of the model; variants=[0.9] prunes to 90 % sparsity."
    return Finding(plugin, "versions", "info", 0, text)


def variants_missed(plugin: str) -> Finding:
    """Variants were asked for, and no validation was known to be the last one."""
    text = (
        "Variants of the model were not audited: the training ended after a validation that was not known to be the "
        "last one. Give every_n_epochs=1, or call trainer.validate."
    )
    return Finding(plugin, "versions", "warn", 0, text)


def unmatched_variant(plugin: str, variant: str) -> Finding:
    """Rows of a variant that are not the model's."""
    text = f"The rows of {variant} could not be matched with the model's, so it was not audited."
    return Finding(plugin, f"unmatched@{variant}", "warn", variant, text)


def attribution_finding(plugin: str, variant: str, pairs: FlipAttributions | str) -> Finding:
    """The shift in a sentence, or why there is none."""
    code = f"attribution_shift@{variant}"
    if isinstance(pairs, str):
        quiet = pairs == NO_FLIP
        text = f"Attributions of variant {variant} were not compared with the model's: {pairs}."
        return Finding(plugin, code, "info" if quiet else "warn", None, text)
    shift, count = pairs.shift, pairs.shift.table["count"]
    known = shift.table["spearman"].notna() & (count > 0)
    text = f"Attributions ({shift.method}) of {int(count.sum())} samples that variant {variant} flipped: "
    if known.any():
        mean = np.average(shift.table["spearman"][known], weights=count[known])
        text += f"Spearman's correlation with the model's is {mean:.3f} on average; {_compared_with_null(shift)}."
    else:
        text += "no correlation with the model's is defined, since attributions are constant."
    return Finding(plugin, code, "info", plain(pairs.table().to_dict("records")), text)


def _compared_with_null(shift: AttributionShift) -> str:
    if not shift.interpretable:
        return "uninterpretable, since there is no null model to compare with (attribution_null)"
    outside = [str(group) for group, value in shift.table["spearman_outside"].items() if value]
    if outside:
        return f"outside the band of the null models for {', '.join(outside)}"
    undefined = shift.table["spearman"].isna().any()
    return f"within the band of the null models for every group{' where it is defined' if undefined else ''}"
