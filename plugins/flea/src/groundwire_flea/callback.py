"""FLEA inside Lightning: choose once the sources to train on, before the first batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from groundwire import Finding, Plugin, Problem, RunContext, Section, TrainData, hookimpl
from groundwire_flea.distances.sources import FAIRNESS, Fairness
from groundwire_flea.inputs.embedding import resolve_embed
from groundwire_flea.loader_filter import LoaderFilter, apply_result
from groundwire_flea.report import section
from groundwire_flea.result import SavedResult
from groundwire_flea.selection import MODES, Mode, check_n_clean


class FLEA(Plugin):
    """Train on the data sources that agree with most others, and drop those that would make the model unfair or wrong.

    FLEA (Iofinova, Konstantinov, Lampert, 2022) compares all sources before training and keeps the K that are closest
    to each other. Validation and test data stay as they are. The decision is stored in checkpoints: a resumed run
    trains on the same rows.

    Args:
        source: Where a row's source is: a key of the row, a position in it, an attribute of the data set, a list with
            one value for each row, or a function of a batch. When left out, the batch's field ``source``, or the parts
            of a ConcatDataset.
        groups: Where a row's sensitive group is, likewise; when left out, the batch's field ``groups``.
        n_clean: How many sources are assumed clean: int, or float for a fraction; when left out, more than half.
        fairness: "demographic_parity", "equal_opportunity" or "equalized_odds".
        mode: "filter" drops the other sources; "weights" draws them seldom (no guarantee); "report" only reports.
        embed: For inputs that are no table: a module or function from inputs to features, or the name of a part of
            the LightningModule. Features are reduced to 30 principal components.
        seed: Of the permutations and of the choice of rows.
        always_keep: Sources that you vouch for.
        count_copies_once: Count sources that are near copies of each other as one, and train on one of them.
        keep_unsuspicious: Keep more than ``n_clean`` sources where a permutation test finds nothing suspicious.
        permutations: For p-values in the report; 0 for none.
        max_rows_per_source: Compare at most so many rows of a source; None for all.
        append_sensitive: Let the compared classifiers see the group, as published.
        n_jobs: Number of joblib's workers.

    Raises:
        ValueError: An argument is out of its range.
        TypeError: ``n_clean`` is a bool or no number.

    Example:
        >>> FLEA(source="hospital", groups="sex", n_clean=0.8).n_clean
        0.8
    """

    name = "flea"

    def __init__(
        self,
        source: Any = None,
        groups: Any = None,
        n_clean: int | float | None = None,
        fairness: Fairness = "demographic_parity",
        mode: Mode = "filter",
        embed: Any = None,
        seed: int = 0,
        *,
        always_keep: Sequence[int | str] = (),
        count_copies_once: bool = False,
        keep_unsuspicious: bool = False,
        permutations: int = 20,
        max_rows_per_source: int | None = 2000,
        append_sensitive: bool = True,
        n_jobs: int | None = None,
    ) -> None:
        for name, value, allowed in (("fairness", fairness, FAIRNESS), ("mode", mode, MODES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} -> choose one of {', '.join(map(repr, allowed))}")
        check_n_clean(n_clean)
        self.source, self.groups, self.n_clean, self.fairness = source, groups, n_clean, fairness
        self.mode, self.embed, self.seed, self.always_keep = mode, embed, seed, always_keep
        self.count_copies_once = count_copies_once
        self.keep_unsuspicious, self.permutations = keep_unsuspicious, permutations
        self.max_rows_per_source, self.append_sensitive, self.n_jobs = max_rows_per_source, append_sensitive, n_jobs
        #: What was decided in the latest fit, or restored from a checkpoint.
        self.decision: SavedResult | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Another fit, another decision; that of a checkpoint is restored after this."""
        if stage == "fit":
            self.decision = None

    @hookimpl
    def gw_check(self, run: RunContext) -> list[Problem]:
        """A part of the module that does not exist yet is looked for again when it does."""
        if run.ready and isinstance(self.embed, str) and run.trainer.state.fn == "fit":
            try:
                resolve_embed(self.embed, run.module)
            except ValueError as error:
                return [Problem(self.name, *str(error).split(" -> "))]
        return []

    @hookimpl
    def gw_train_data(self, data: TrainData, run: RunContext) -> None:
        """Rank 0 reads and decides; all ranks train on the same rows."""
        self.decision, rows = self.loader_filter.decide(run.trainer, data.loader, self.decision, run.fields, run.module)
        apply_result(self.decision, rows, self.mode, data)
        # At once, not only when training is over.
        scores = {f"q/{source}": q for source, q in zip(self.decision.sources, self.decision.q, strict=True)}
        run.send({**scores, "kept": float(sum(self.decision.kept))})

    @property
    def loader_filter(self) -> LoaderFilter:
        """The filter with these arguments."""
        options = {
            "n_clean": self.n_clean,
            "fairness": self.fairness,
            "mode": self.mode,
            "append_sensitive": self.append_sensitive,
            "always_keep": self.always_keep,
            "count_copies_once": self.count_copies_once,
            "keep_unsuspicious": self.keep_unsuspicious,
            "permutations": self.permutations,
            "random_state": self.seed,
            "n_jobs": self.n_jobs,
        }
        return LoaderFilter(self.source, self.groups, self.embed, self.max_rows_per_source, options)

    def state_dict(self) -> dict[str, Any]:
        """The decision, in plain types."""
        return {} if self.decision is None else {"decision": self.decision.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The decision of the run that is resumed."""
        state = state_dict.get("decision")
        self.decision = None if state is None else SavedResult.from_state(state)

    @hookimpl
    def gw_findings(self, run: RunContext) -> list[Finding]:
        """Report the decision once, at the end of training."""
        if self.decision is None or run.stage != "train":
            return []
        d = self.decision
        action = {"filter": "trained on", "weights": "weighted 1", "report": "would be trained on"}[self.mode]
        dropped = ", ".join(map(str, d.named(False))) or "none"
        text = f"{sum(d.kept)} of {len(d.kept)} sources {action}: {', '.join(map(str, d.named(True)))}; not: {dropped}."
        bound = (
            f"An adversary with {len(d.kept) - d.n_clean} of {len(d.kept)} sources could force unfairness of this "
            "order on any learner that does not filter (1: any)."
        )
        scores = {str(source): q for source, q in zip(d.sources, d.q, strict=True)}
        return [
            Finding(self.name, "kept", "info", sum(d.kept), text),
            Finding(self.name, "scores", "info", scores, "Score q of each source: the larger, the stranger."),
            Finding(self.name, "unfiltered_bound", "info", d.bound, bound),
            *(Finding(self.name, code, "warn", value, message) for code, message, value in d.cautions),
        ]

    @hookimpl
    def gw_section(self) -> Section | None:
        """Scores, distances and reasons."""
        return None if self.decision is None else section(self.decision, self.mode)

    @hookimpl
    def gw_provenance(self) -> Mapping[str, Any]:
        """Name the sources that the weights come from."""
        d = self.decision
        return {} if d is None else {"kept": d.named(True), "suppressed": d.named(False), "sources": d.hash}
