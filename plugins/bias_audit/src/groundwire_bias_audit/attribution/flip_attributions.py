"""Attributions of flipped samples: where the model looked, and where the variant that flipped them looks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from groundwire import PluginError, Problem, RunContext, Variant
from groundwire.distributed import gathered
from groundwire.undo.random_states import preserve_rng
from groundwire_bias_audit.attribution.maps import METHODS, Maps
from groundwire_bias_audit.attribution.shift import AttributionShift, ModelVariant, attribution_shift
from groundwire_bias_audit.audit.groups import with_groups
from groundwire_bias_audit.stream.flipped_samples import column_of, drawn_flips
from groundwire_bias_audit.stream.samples import Samples, image, thinned
from groundwire_bias_audit.stream.scored_rows import ScoredRows
from groundwire_bias_audit.stream.variants import DENSE

Method: TypeAlias = Literal["auto", "gradcam", "input_x_gradient", "integrated_gradients", "occlusion"]
#: Samples in the picture of a variant.
DRAWN = 6
NO_FLIP = "it flipped no prediction"
NO_INDEX = "the data set has no index to fetch samples by"


@dataclass(frozen=True)
class FlipAttributions:
    """The attributions of the model and of a variant for samples that the variant flipped.

    Attributes:
        shift: How they differ, by group.
        images: Some of the samples, if they are images; then also
        maps: the attributions of the model and of the variant for each of them, shape (H, W); and
        titles: what to write above.
    """

    shift: AttributionShift
    images: list[NDArray[Any]]
    maps: list[tuple[Maps, Maps]]
    titles: list[str]

    def table(self) -> pd.DataFrame:
        """The shift by group, and whether it can be interpreted."""
        return with_groups(self.shift.table).assign(interpretable=self.shift.interpretable)


def checked_attribution(method: Any, samples: Any, null: Any) -> tuple[Path, ...]:
    """The checkpoints ``null``, if all three arguments of ``BiasAudit`` are good.

    Raises:
        ValueError: One is not.
    """
    if method is not None and method not in METHODS:
        raise ValueError(f"attribution must be None or one of {', '.join(METHODS)}, got {method!r}")
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"attribution_samples must be a whole number of at least 1, got {samples!r}")
    paths = [null] if isinstance(null, str | Path) else list(null)
    if not all(isinstance(path, str | Path) for path in paths):
        raise ValueError(f"attribution_null must hold paths of checkpoints, got {null!r}")
    if paths and method is None:
        raise ValueError("attribution_null is for attributions -> name a method, such as attribution='auto'")
    return tuple(Path(path) for path in paths)


def null_problems(plugin: str, module: nn.Module, paths: Sequence[Path]) -> list[Problem]:
    """Checkpoints that are no other weights of ``module``."""
    found = []
    for path in paths:
        try:
            _fitting(module, path)
        except PluginError as error:
            found.append(Problem(plugin, str(error), "attribution_null takes checkpoints of the same model"))
    return found


def _fitting(module: nn.Module, path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint of Lightning, or in a file with a state dict alone."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        state: dict[str, Tensor] = content.get("state_dict", content)
    except Exception as error:  # what a broken file raises is anybody's guess
        raise PluginError(f"the null model {path} cannot be read: {type(error).__name__}: {error}") from error
    shapes, wanted = (
        {k: tuple(v.shape) for k, v in s.items() if isinstance(v, Tensor)} for s in (state, module.state_dict())
    )
    differing = sorted(k for k in shapes.keys() | wanted.keys() if shapes.get(k) != wanted.get(k))
    if differing:
        k = differing[0]
        raise PluginError(f"the null model {path} does not fit: {k} is {shapes.get(k)}, the model's is {wanted.get(k)}")
    return state


@contextmanager
def _weights_of(module: nn.Module, path: Path) -> Iterator[None]:
    """``module`` with the weights of a checkpoint while open."""
    saved = {key: value.clone() for key, value in module.state_dict().items() if isinstance(value, Tensor)}
    try:
        module.load_state_dict(_fitting(module, path), strict=False)
        yield
    finally:
        module.load_state_dict(saved, strict=False)


def explain(
    module: nn.Module,
    variant: Variant,
    flips: pd.DataFrame,
    features: Mapping[str, pd.Series],
    samples: Samples,
    *,
    method: str,
    null: Sequence[Path] = (),
) -> FlipAttributions | str:
    """Compare the attributions of ``variant`` with those of ``module`` for samples that it flipped.

    The class whose score is attributed is the one that the model predicted (of a multilabel task, the output that
    flipped first).

    Args:
        module: The model.
        variant: A variant of it.
        flips: As :func:`groundwire_bias_audit.stream.flipped_samples.flipped_samples` gives them, with ids.
        features: Their groups.
        samples: Fetches them.
        method: Of the attribution.
        null: Checkpoints of other models without compression.

    Returns:
        The pairs, or why there are none.
    """
    if flips.empty:
        return NO_FLIP
    fetched = [samples.inputs(row) for row in flips.index]
    tensors = [x for x in fetched if x is not None]
    if len(tensors) < len(fetched) or len({x.shape for x in tensors}) > 1 or not tensors[0].is_floating_point():
        return "samples must be floating-point tensors of one shape that the data set gives by index"
    inputs = torch.cat(tensors).to(next((p.dtype for p in module.parameters()), torch.float32))
    targets = torch.tensor(flips["target" if "target" in flips else "before"].to_numpy().astype(np.int64))
    models: list[ModelVariant] = [(module, partial(_weights_of, module, path)) for path in null]
    try:
        with preserve_rng(), torch.inference_mode(False):
            shift = attribution_shift(
                module, (module, variant.apply), inputs, targets, features, null=models, method=method,
                per_group=len(flips), max_groups=len(flips),
            )  # fmt: skip
    except Exception as error:  # the user's model, which need not be differentiable, must not lose its training
        return f"{type(error).__name__}: {error}"
    return FlipAttributions(shift, *_pictures(shift, inputs, flips))


def _pictures(
    shift: AttributionShift, inputs: Tensor, chosen: pd.DataFrame
) -> tuple[list[NDArray[Any]], list[tuple[Maps, Maps]], list[str]]:
    images: list[NDArray[Any]] = []
    maps: list[tuple[Maps, Maps]] = []
    titles: list[str] = []
    for i in _in_turn(shift.codes)[:DRAWN]:
        row = int(shift.rows[i])
        picture = image(inputs[row : row + 1])
        if picture is None:
            return [], [], []
        images.append(picture)
        first, second = (m[i].reshape(tuple(inputs.shape[2:])) for m in shift.maps)
        maps.append((thinned(first), thinned(second)))
        sample = chosen.iloc[row]
        titles.append(f"{sample['id']}: {sample['label']}\n{sample['before']} to {sample['after']}")
    return images, maps, titles


def _in_turn(codes: NDArray[Any]) -> list[int]:
    """Positions such that every group comes first once, then every group again."""
    seen: dict[int, int] = {}
    turns = []
    for i, code in enumerate(codes.tolist()):
        turns.append((seen.get(code, 0), i))
        seen[code] = seen.get(code, 0) + 1
    return [i for _, i in sorted(turns)]


def explain_variants(
    run: RunContext,
    variants: Sequence[Variant],
    rows_by_variant: Mapping[str, ScoredRows | None],
    features: Sequence[str],
    samples: Samples,
    *,
    method: str,
    per_group: int,
    null: Sequence[Path],
) -> dict[str, FlipAttributions | str]:
    """Attribution pairs of each variant; samples are drawn from the rows of all processes.

    Returns:
        The same reasons on all processes; pairs themselves on the first one, which alone computes them.
    """
    found: dict[str, FlipAttributions | str] = {}
    dense = rows_by_variant[DENSE]
    known = all(gathered(run.trainer, dense is None or dense.ids is not None))
    for variant in variants:
        if variant.name not in rows_by_variant:
            continue
        flips = drawn_flips(run.trainer, dense, rows_by_variant[variant.name], features, per_group) if known else None
        if flips is None:
            found[variant.name] = NO_FLIP if known else NO_INDEX
        elif run.trainer.is_global_zero:
            columns = {name: flips[column_of(name)] for name in features}
            found[variant.name] = explain(run.module, variant, flips, columns, samples, method=method, null=null)
    return found
