"""The audit inside Lightning: scores of the passes that happen anyway, and of every variant that somebody offers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from groundwire import Fields, Finding, Plugin, Problem, RunContext, Section, Variant, hookimpl
from groundwire.distributed import gathered
from groundwire_bias_audit.attribution.flip_attributions import (
    FlipAttributions,
    Method,
    checked_attribution,
    explain_variants,
    null_problems,
)
from groundwire_bias_audit.audit.gate import Gate, checked_gate
from groundwire_bias_audit.output.findings import (
    attribution_finding,
    findings_of,
    no_variants,
    nothing_audited,
    unmatched_variant,
    variants_missed,
)
from groundwire_bias_audit.output.run_report import RunReport
from groundwire_bias_audit.result import AuditResult
from groundwire_bias_audit.stream.recorder import Recorder, loader_of
from groundwire_bias_audit.stream.samples import Samples
from groundwire_bias_audit.stream.schedule import last, variants_due
from groundwire_bias_audit.stream.scored_rows import ScoredRows
from groundwire_bias_audit.stream.sensitive_features import GroupReader
from groundwire_bias_audit.stream.streaming_counts import StreamingCounts, TrainingCounts
from groundwire_bias_audit.stream.variants import (
    DENSE,
    VariantPasses,
    checked_baseline,
    checked_variants,
    requested,
)


class BiasAudit(Plugin):
    """Audit the model, and every other variant of it, by group at the end of validation and test.

    The model's scores are those of the validation or test pass that happens anyway. Variants (pruned ones, or
    anything else that plugins offer) cost one pass each and are compared with the model row by row.

    Args:
        groups: Sensitive features: None (the batch's ``groups``), names of batch keys or data set attributes, a table
            by sample id (DataFrame, Series, mapping, path of a CSV or Parquet file with a column ``id``), or
            ``callable(batch)``.
        variants: True for the variants that plugins of the run offer, False for none, or a list of sparsities (pruned
            by ``torch.nn.utils.prune``) and :class:`groundwire.Variant`.
        every_n_epochs: Evaluate variants at the validations of every n-th epoch, too. By default only where a
            validation may be the last one, by ``max_epochs``, ``max_steps`` or the patience of an ``EarlyStopping``; in
            ``trainer.validate`` and ``trainer.test`` always. The model itself is audited in every validation.
        gate: When a gap is a disparity.
        baseline: What variants are compared with: the model itself by default, or a variant by its name or sparsity, or
            the scores of an earlier model as an array by data set index (the model itself is then compared with them,
            too).
        threshold: Predicted 1 where P(y=1) is at least this.
        task: "binary", "multiclass", "multilabel" or "regression"; guessed from scores and labels by default.
        max_groups: Most values of a feature.
        listed: Rows in the lists of flips and of susceptible samples.
        attribution: Also compare where the model and each variant look at samples that the variant flipped, in the last
            pass that evaluates variants: "auto" (Grad-CAM at the last convolution, else input x gradient), "gradcam",
            "input_x_gradient", "integrated_gradients" or "occlusion". Needs a data set with an index, and variants.
        attribution_samples: Most such samples of each group, drawn at random.
        attribution_null: Checkpoints of the same model without compression (of other seeds, or fine-tuned), to tell a
            shift from what any two models differ by. Without one the shift is shown as uninterpretable.
        name: Name of this audit; two audits in one run need different ones.

    Attributes:
        results: The latest results: ``results[stage][variant]``, the model itself as "dense".

    Raises:
        ValueError: An argument is out of its range.
        TypeError: ``gate`` is no Gate, or ``baseline`` is neither a variant nor scores.
        PluginError: The table of groups cannot be used.

    Example:
        >>> BiasAudit(groups="sex", variants=[0.5, 0.9]).variants
        (0.5, 0.9)
    """

    name = "bias_audit"
    needs_ids = True

    def __init__(
        self,
        groups: Any = None,
        variants: bool | Sequence[float | Variant] = True,
        every_n_epochs: int | None = None,
        gate: Gate = Gate(),  # noqa: B008 - a Gate is immutable
        baseline: Any = None,
        *,
        threshold: float = 0.5,
        task: str | None = None,
        max_groups: int = 100,
        listed: int = 100,
        attribution: Method | None = None,
        attribution_samples: int = 16,
        attribution_null: Sequence[str | Path] | str | Path = (),
        name: str | None = None,
    ) -> None:
        if every_n_epochs is not None and (not isinstance(every_n_epochs, int) or every_n_epochs < 1):
            raise ValueError(f"every_n_epochs must be a whole number of at least 1 or None, got {every_n_epochs!r}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold!r}")
        self.groups, self.every_n_epochs, self.baseline = groups, every_n_epochs, checked_baseline(baseline)
        self.variants = checked_variants(variants)
        self.gate = checked_gate(gate)
        self.attribution, self.attribution_samples = attribution, attribution_samples
        self.attribution_null = checked_attribution(attribution, attribution_samples, attribution_null)
        self.threshold, self.task, self.max_groups, self.listed = threshold, task, max_groups, listed
        if name is not None:
            self.name = name
        self._reader = GroupReader(groups)
        self.results: dict[str, dict[str, AuditResult]] = {}
        self._forget()

    def _forget(self) -> None:
        self._recorder = Recorder(self._reader, self.threshold, self.task, self.max_groups)
        self._training = TrainingCounts()
        self._report = RunReport()
        self._run: RunContext | None = None
        self._due = False  # whether variants are evaluated in this pass; the same on all ranks
        self._audited: set[str] = set()  # what this run saw: the model, and variants of it

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles take neither rows nor the run along."""
        kept = {key: value for key, value in vars(self).items() if not key.startswith("_") and key != "results"}
        return kept | ({"_name": self.name} if self.name != type(self).name else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A fresh audit with the same arguments."""
        state.pop("_name", None)
        self.__dict__.update(state)
        self._reader, self.results = GroupReader(self.groups), {}
        self._forget()

    # Lightning's hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Start afresh."""
        self._forget()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the run; results stay."""
        self._forget()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Lightning does not call ``teardown`` when a step raises."""
        self._forget()

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """A new pass."""
        if not trainer.sanity_checking:
            self._begin(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """A new pass."""
        self._begin(trainer)

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Remember which loader the batch is from; missing groups are told in the sanity check, not an epoch later."""
        self._recorder.batch_starts(batch, dataloader_idx)
        if trainer.sanity_checking and self._run is not None:
            self._recorder.features(self._run.fields(batch), self._run)

    on_test_batch_start = on_validation_batch_start

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Association of labels and groups in the training data, from the first epoch."""
        if trainer.current_epoch == 0 and self._run is not None:
            self._training.take(self._reader, batch, self._run)

    def _begin(self, trainer: Any) -> None:
        self._due = self._wants_variants and variants_due(trainer, self.every_n_epochs)
        self._recorder.begin(keep=self._due or self.baseline is not None)

    @property
    def _wants_variants(self) -> bool:
        return self.variants is not False and self.variants != ()

    # groundwire's hooks

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """The baseline and the null models must exist."""
        self._run = run
        if not run.ready:
            return []
        return self._baseline_problems(run) + null_problems(self.name, run.module, self.attribution_null)

    def _baseline_problems(self, run: RunContext) -> list[Problem]:
        if not isinstance(self.baseline, str) or self.baseline == DENSE:
            return []
        names = [variant.name for variant in self._offered(run)]
        if self.baseline in names:
            return []
        return [Problem(self.name, f"baseline is {self.baseline!r}, and the variants are {names}", "name one of them")]

    @hookimpl
    def gw_scores(self, scores: Tensor, fields: Fields, stage: str, variant: str | None, run: RunContext) -> None:
        """Keep the scores of the model, or of the variant that this audit evaluates."""
        self._recorder.take(scores, fields, variant, run)

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Audit the model, then every variant when it is due."""
        if run.stage not in ("validate", "test") or self._recorder.dense is None:
            return self._training_findings(run)
        dense, rows = self._recorder.dense, self._recorder.dense.scored_rows()
        whole = dense.stream.merged(lambda value: gathered(run.trainer, value))
        if whole.shape is None:
            return [nothing_audited(self.name, "No row was audited: the pass had no scores.")]
        variants = VariantPasses({DENSE: rows}, {DENSE: whole})
        results = {DENSE: self._result(whole, run)}
        found = findings_of(self.name, DENSE, results[DENSE], whole, self._training)
        reference = None
        if self._due or not isinstance(self.baseline, str | None):
            more, reference = self._compare(run, variants, results)
            found += more
        self.results[run.stage] = results
        self._audited |= {"model", "variants"} if self._due else {"model"}
        samples = Samples(run, lambda number: loader_of(run, number))
        self._report.add_results(run, results, variants.rows_by_variant, reference, samples, self.listed)
        if last(run.trainer):
            self._report.add_examples(run, dense.examples, samples)
            found += self._explained(run, variants.rows_by_variant, results[DENSE], samples)
        self._recorder.dense = None
        return found

    def _compare(
        self, run: RunContext, variants: VariantPasses, results: dict[str, AuditResult]
    ) -> tuple[list[Finding], ScoredRows | None]:
        found = []
        offered = self._offered(run) if self._due else []
        if self.variants is True and not offered and self._due:
            found.append(no_variants(self.name))
        for variant in offered:
            if not variants.add(run, variant, self._recorder):
                found.append(unmatched_variant(self.name, variant.name))
        changes, reference = variants.changes(run, self.baseline, self.threshold, results[DENSE], self.gate)
        for name, change in changes.items():
            results[name] = self._result(variants.streams[name], run, change)
            if name != DENSE or change is not None:
                found += findings_of(self.name, name, results[name], variants.streams[name], self._training)
        return found, reference

    def _explained(
        self, run: RunContext, rows_by_variant: dict[str, ScoredRows | None], dense: AuditResult, samples: Samples
    ) -> list[Finding]:
        """Attribution pairs; the same findings on all processes."""
        if self.attribution is None or not self._due:
            return []
        pairs = explain_variants(
            run, self._offered(run), rows_by_variant, dense.features, samples, method=self.attribution,
            per_group=self.attribution_samples, null=self.attribution_null,
        )  # fmt: skip
        self._report.add_attributions(
            run.stage, {v: pair for v, pair in pairs.items() if isinstance(pair, FlipAttributions)}
        )
        found = [attribution_finding(self.name, variant, pair) for variant, pair in pairs.items()]
        return list(gathered(run.trainer, found)[0])

    def _training_findings(self, run: RunContext) -> list[Finding]:
        """At the end of a fit: was there anything that should have been audited and was not?"""
        if run.stage != "train":
            return []
        if "model" not in self._audited:
            text = "Nothing was audited: the run had neither validation nor test data."
            return [nothing_audited(self.name, text)]
        if "variants" in self._audited or not self._wants_variants or not self._offered(run):
            return []
        found = variants_missed(self.name)
        if run.trainer.is_global_zero:
            warnings.warn(f"{self.name}: {found.message}", stacklevel=2)
        return [found]

    def _result(self, stream: StreamingCounts, run: RunContext, comparison: Any = None) -> AuditResult:
        epoch = run.trainer.current_epoch if str(run.trainer.state.fn.value) == "fit" else None
        meta = {"stage": run.stage, "epoch": epoch, "module": type(run.module).__qualname__}
        return AuditResult(stream.group_counts(), self.gate, comparison, meta=meta)

    def _offered(self, run: RunContext) -> list[Variant]:
        return run.variants() if self.variants is True else requested(run.module, self.variants or ())

    @hookimpl
    def gw_section(self, findings: list[Finding], run: RunContext) -> Section | None:
        """Groups, curves, flips."""
        return self._report.section()

    @hookimpl
    def gw_report(self, report: Any, run: RunContext) -> None:
        """The results as JSON and the lists as CSV, next to the page."""
        self._report.write(self.name, report.path)

    @hookimpl
    def gw_provenance(self) -> dict[str, Any]:
        """Return what the latest audit concluded."""
        return {
            "verdicts": {
                f"{stage}/{variant}": str(result.verdict)
                for stage, results in self.results.items()
                for variant, result in results.items()
            }
        }
