"""``effk.auto``: the cheapest recipe that keeps a model as good as asked.

The automatic flow of Shen, Chang, Dong, Luo and Meng, "Efficient LLM Inference on CPUs", 2023 (arXiv:2311.00502): candidates
are algorithm x bits x group; each is applied to a copy of the model and scored; the cheapest whose relative loss stays within
a target is taken. The paper's candidates are all 4-bit and its score is accuracy on four tasks; here bits vary too, and the
score is the perplexity of :mod:`.evaluate` unless the caller has one of their own.

Without a budget candidates run from the smallest up, and the first within the target ends the search. With one, those that
fit run from the largest down, until one is within the target; else the one with the least loss is taken.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data import calibration_text, evaluation_text
from ..formats.wq import weight_bytes
from ..hub.atomic import publish, write_temporary
from .apply import model_bytes
from .calibrate import check_calib
from .evaluate import perplexity, token_windows
from .experts import find_experts
from .passes.finequant import FineQuant
from .passes.llm_mq import LlmMq
from .passes.moqe import MoQE
from .passes.rtn import Rtn
from .passes.sparse import Sparse
from .plan import outlier_count
from .recipe import Recipe
from .registry import Handler, Progress, handler_for, recipe_from_json
from .report import Report
from .solvers.prune import parse_pattern

LOG_VERSION = 1
BITS, GROUPS = (2, 3, 4, 8), (128, 64, 32)
# Algorithm -> recipe of these bits and groups; FineQuant chooses groups itself, and here none below the one given.
ALGORITHMS: Mapping[str, Callable[..., Recipe]] = {
    "rtn": lambda bits, group, **rest: Rtn(bits=bits, group_size=group, **rest),
    "finequant": lambda bits, group, **rest: FineQuant(bits=bits, min_group=group or 256, **rest),
    "gptq": lambda bits, group, **rest: Rtn(bits=bits, group_size=group, second_order=True, mode="clip", **rest),
    "llm-mq": lambda bits, group, **rest: LlmMq(bits=bits, group_size=group, choices=_around(bits), **rest),
    "moqe": lambda bits, group, **rest: MoQE(bits=bits, group_size=group, **rest),
}


def _around(bits: float) -> tuple[int, ...]:
    return (8,) if bits == 8 else (2, 3, 4)


def algorithms_for(model: nn.Module) -> tuple[str, ...]:
    """The algorithms that find something to do in ``model``: "moqe" only in mixtures of experts."""
    return tuple(name for name in ALGORITHMS if name != "moqe" or find_experts(model)[0])


def candidates(
    algorithms: Sequence[str] = tuple(name for name in ALGORITHMS if name != "moqe"),
    bits: Sequence[float] = BITS,
    groups: Sequence[int] = GROUPS,
    **fields: Any,
) -> list[Recipe]:
    """One recipe for every algorithm, width and group size; ``fields`` (``compute``, ``embedding_bits`` ...) go to all.

    Raises:
        ValueError: an unknown algorithm, or a value that its recipe refuses.
    """
    if unknown := sorted(set(algorithms) - set(ALGORITHMS)):
        raise ValueError(f"auto: algorithms: expected some of {', '.join(ALGORITHMS)}, got {', '.join(unknown)}")
    return [ALGORITHMS[name](b, group, **fields) for b in bits for group in groups for name in algorithms]


@dataclass(frozen=True)
class Trial:
    """One candidate that was tried.

    Attributes:
        recipe: its JSON record.
        bytes: of the whole model, as stored.
        score: of the compressed model.
        loss: relative to the plain model's score; positive is worse.
        accepted: whether it is within the target and the budget.
        seconds: to compress and score it.
    """

    recipe: Mapping[str, Any]
    bytes: int
    score: float
    loss: float
    accepted: bool
    seconds: float


@dataclass(frozen=True)
class AutoReport:
    """The outcome of :func:`auto`.

    Attributes:
        base: score of the plain model; ``base_bytes`` its size.
        target_loss, budget: as asked.
        trials: in the order of the search.
        recipe: the chosen one, or None: then the model is unchanged.
        report: of applying it.
    """

    base: float
    base_bytes: int
    target_loss: float
    budget: int | None
    trials: Sequence[Trial] = field(default_factory=list)
    recipe: Recipe | None = None
    report: Report | None = None

    def to_json(self) -> dict[str, Any]:
        """A JSON object; the report of the compression as :meth:`Report.to_json`."""
        return {
            "base": self.base,
            "base_bytes": self.base_bytes,
            "target_loss": self.target_loss,
            "budget": self.budget,
            "trials": [asdict(trial) for trial in self.trials],
            "recipe": None if self.recipe is None else self.recipe.to_json(),
            "report": None if self.report is None else self.report.to_json(),
        }

    def table(self) -> list[tuple[str, ...]]:
        """Rows for people, the first with the titles."""
        rows = [("recipe", "MB", "score", "loss", "", "seconds")]
        rows.append(("as it is", f"{self.base_bytes / 1e6:.1f}", f"{self.base:.4g}", "", "", ""))
        chosen = None if self.recipe is None else self.recipe.to_json()
        for trial in self.trials:
            verdict = "chosen" if trial.recipe == chosen else "good enough" if trial.accepted else ""
            size, seconds = f"{trial.bytes / 1e6:.1f}", f"{trial.seconds:.0f}"
            rows.append((label(trial.recipe), size, f"{trial.score:.4g}", f"{trial.loss:+.2%}", verdict, seconds))
        return rows


def label(recipe: Mapping[str, Any]) -> str:
    """A recipe's record in a few words."""
    name = "gptq" if recipe.get("second_order") and recipe["name"] == "rtn" else recipe["name"]
    group = recipe.get("group_size", recipe.get("min_group"))
    at_least = "at least " if "min_group" in recipe else ""
    if name == "sparse":
        return f"{name}, {recipe['pattern'] or format(recipe['sparsity'], '.0%')} zeros, {recipe['values']}, {recipe['compute']}"
    return f"{name}, {recipe['bits']:g} bits, group {at_least}{group or 'row'}, {recipe['compute']}"


def estimate(model: nn.Module, recipe: Recipe) -> float:
    """Bytes of the compressed model, from the recipe's fields alone: within a tenth, for ordering candidates."""
    handler = handler_for(recipe)
    if not isinstance(handler, Handler):
        raise ValueError(f"auto: candidates: expected recipes of layers, got {recipe.name!r}")
    layers = [layer for layer in handler.find(model)[0] if recipe.for_layer(layer.name) is not None]
    if isinstance(recipe, Sparse):
        wide, kept = {"fp32": 4, "bf16": 2, "int8": 1}[recipe.values], 1 - recipe.sparsity
        if recipe.pattern is not None:
            kept = parse_pattern(recipe.pattern)[0] / parse_pattern(recipe.pattern)[1]
        rows = sum(x.n * (x.k * wide * kept + -(-x.k // 64) * 8 + 4) for x in layers)  # values, mask, scale
        return model_bytes(model) + rows - sum(layer.nbytes for layer in layers)
    group = max(0, getattr(recipe, "group_size", getattr(recipe, "min_group", 0)))
    low, share = math.floor(recipe.bits), recipe.bits - math.floor(recipe.bits)
    mixture = [(low, 1 - share), (low + 1, share)] if share else [(low, 1.0)]
    size = float(model_bytes(model))
    for layer in layers:
        size -= layer.nbytes
        for bits, part in mixture:
            sparse = (
                outlier_count(layer.n, layer.k, recipe.outliers)
                if bits in getattr(recipe, "outlier_bits", ())
                else None
            )
            size += (
                part * (layer.n * layer.k * bits + weight_bytes(layer.n, layer.k, 8, group, outliers=sparse) * 8) / 8
            )
            size -= (
                part * layer.n * layer.k
            )  # the codes of the weight of 8 bits, whose scales and outliers were counted
    if recipe.embedding_bits and isinstance(model, PreTrainedModel):
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        for weight in {id(end.weight): end.weight for end in ends if end is not None}.values():
            size -= weight.numel() * (weight.element_size() - 1 - 2 / 64)
    return size


def search(
    model: nn.Module,
    recipes: Sequence[Recipe],
    score: Callable[[nn.Module], float],
    *,
    calib: Sequence[Tensor] | None = None,
    target_loss: float = 0.01,
    budget: int | None = None,
    higher_is_better: bool = False,
    base: float | None = None,
    known: Mapping[str, Trial] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Recipe, Trial]]:
    """Try recipes on copies of ``model``, which is not changed, and yield each with its trial; see the module.

    ``known`` holds trials of an earlier search by :func:`key_of`, which are not repeated. ``base`` is the plain model's score,
    measured if None.

    Raises:
        ValueError: no candidate, or one that does not fit the model; a score that is not finite.
    """
    from . import compress

    if not recipes:
        raise ValueError("auto: candidates: expected at least one recipe, got none")
    sizes = {key_of(recipe): (estimate(model, recipe), recipe) for recipe in recipes}
    order = sorted(sizes.values(), key=lambda entry: entry[0], reverse=budget is not None)
    base = _finite(score(model)) if base is None else base
    for done, (size, recipe) in enumerate(order):
        if progress is not None:
            progress("search", done, len(order))
        if budget is not None and size > 1.1 * budget:  # an estimate; what is near the budget is tried
            continue
        trial = (known or {}).get(key_of(recipe))
        if trial is None:
            start, copied = time.perf_counter(), copy.deepcopy(model)
            needs = handler_for(recipe).needs_calibration(recipe)
            after = compress(copied, recipe, calib if needs else None, progress=progress).model_bytes_after
            value = _finite(score(copied))
            del copied
            trial = Trial(recipe.to_json(), after, value, 0.0, False, time.perf_counter() - start)
        loss = (base - trial.score if higher_is_better else trial.score - base) / max(abs(base), 1e-12)
        accepted = loss <= target_loss and (budget is None or trial.bytes <= budget)
        trial = Trial(trial.recipe, trial.bytes, trial.score, loss, accepted, trial.seconds)
        yield recipe, trial
        if accepted:
            return


def auto(
    model: nn.Module,
    target_loss: float = 0.01,
    budget: int | None = None,
    *,
    tokenizer: Any = None,
    score: Callable[[nn.Module], float] | None = None,
    score_name: str = "own",
    higher_is_better: bool = False,
    recipes: Sequence[Recipe] | None = None,
    calib: Sequence[Tensor] | None = None,
    text: str | None = None,
    context: int = 512,
    windows: int = 4,
    log: str | Path | None = None,
    progress: Progress | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> AutoReport:
    """Search (see the module), then compress ``model`` in place with the recipe that was found.

    Args:
        model: a decoder of transformers, not compressed yet.
        target_loss: largest relative loss, such as 0.01 for a perplexity at most 1 % higher.
        budget: largest size of the whole model in bytes.
        tokenizer: for the perplexity on ``text`` (default: the evaluation text of the package), over the first ``windows``
            windows of ``context`` tokens, and for calibration on the package's text where ``calib`` is None.
        score: takes a model, gives a number; in the place of the perplexity. ``score_name`` tells one from another in the log,
            ``higher_is_better`` is for accuracies.
        recipes: candidates; default :func:`candidates` of :func:`algorithms_for` the model. Any recipe of layers with
            bits, and ``Sparse``.
        log: a JSON file, replaced in one step after every trial. A search that was stopped, also by ``kill -9``, goes on from
            there; one with another model, score or calibration is refused.
        on_trial: called after every trial.

    Returns:
        What was tried and chosen. If no candidate is good enough (with a budget: if none fits), ``recipe`` is None and the
        model is unchanged.

    Raises:
        ValueError: arguments that contradict each other, a log of another search, or what :func:`effk.compress` refuses.
    """
    from . import compress

    if not target_loss >= 0:
        raise ValueError(f"auto: target_loss: expected 0 or more, got {target_loss!r}")
    if budget is not None and not budget > 0:
        raise ValueError(f"auto: budget: expected a positive number of bytes or None, got {budget!r}")
    if score is None and tokenizer is None:
        raise ValueError("auto: tokenizer: expected one for the perplexity, or a score, got neither")
    recipes = list(candidates(algorithms_for(model)) if recipes is None else recipes)
    if any(handler_for(recipe).needs_calibration(recipe) for recipe in recipes):
        if calib is None:
            if tokenizer is None:
                raise ValueError(
                    "auto: calib: expected batches for recipes that calibrate, or a tokenizer, got neither"
                )
            calib = list(token_windows(tokenizer, calibration_text(), context, 8, spread=True).split(8))
        check_calib(model, calib)
    if score is None:
        content = evaluation_text() if text is None else text
        digest = hashlib.sha256(content.encode()).hexdigest()[:16]
        score_name, higher_is_better = f"perplexity of {digest}, {windows} x {context}", False

        def score(form: nn.Module) -> float:
            return perplexity(form, tokenizer, content, context, windows, progress=progress)

    model.eval()
    path = None if log is None else Path(log)
    key = {"model": fingerprint(model), "score": score_name, "calib": _digest(calib or ())}
    base, known = _read_log(path, key)
    if base is None:
        base = _finite(score(model))
        _write_log(path, key, base, known)
    trials: list[Trial] = []
    best: tuple[Recipe, Trial] | None = None
    how = {"calib": calib, "target_loss": target_loss, "budget": budget, "higher_is_better": higher_is_better}
    for recipe, trial in search(model, recipes, score, **how, base=base, known=known, progress=progress):
        known[key_of(recipe)] = trial
        _write_log(path, key, base, known)
        trials.append(trial)
        fits = trial.accepted if budget is None else trial.bytes <= budget
        if fits and (best is None or trial.accepted or trial.loss < best[1].loss):
            best = recipe, trial
        if on_trial is not None:
            on_trial(trial)
    size = model_bytes(model)
    if best is None:
        return AutoReport(base, size, target_loss, budget, trials)
    recipe = best[0]
    needs = handler_for(recipe).needs_calibration(recipe)
    report = compress(model, recipe, calib if needs else None, progress=progress)
    return AutoReport(base, size, target_loss, budget, trials, recipe, report)


def key_of(recipe: Recipe) -> str:
    """The recipe as one line of JSON: equal for equal recipes."""
    return json.dumps(recipe.to_json(), sort_keys=True)


def fingerprint(model: nn.Module) -> str:
    """A hash of every parameter's name, shape and dtype and of up to 4096 of its numbers, evenly spread."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].double().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _digest(batches: Sequence[Tensor]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.shape)}".encode())
        digest.update(batch.to(torch.int64).cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _finite(value: float) -> float:
    value = float(value)
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"auto: score: expected a finite number, got {value}")
    return value


def _read_log(path: Path | None, key: Mapping[str, str]) -> tuple[float | None, dict[str, Trial]]:
    if path is None or not path.exists():
        return None, {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["effk_auto"] != LOG_VERSION:
            raise ValueError(f"version {record['effk_auto']!r}")
        trials = [Trial(**entry) for entry in record["trials"]]
        known = {key_of(recipe_from_json(trial.recipe)): trial for trial in trials}
        base, found = float(record["base"]), record["key"]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"auto: log: {path}: expected a log of version {LOG_VERSION}, got: {error}") from None
    if other := [name for name, value in key.items() if found.get(name) != value]:
        raise ValueError(
            f"auto: log: {path}: expected one of this search, got another {other[0]}; remove it to start anew"
        )
    return base, known


def _write_log(path: Path | None, key: Mapping[str, str], base: float, known: Mapping[str, Trial]) -> None:
    if path is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"effk_auto": LOG_VERSION, "key": dict(key), "base": base, "trials": [asdict(t) for t in known.values()]}
    text = json.dumps(record, indent=1) + "\n"
    publish(write_temporary(path.parent, lambda temporary: temporary.write_text(text, encoding="utf-8")), path)
