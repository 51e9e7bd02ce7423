"""The steps of the demo, in order, each announced with about how long it takes on two cores."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import hub, isa
from ..cli.speed import decode_speeds, generate_ids
from ..compress import Plan, Progress, Recipe, Report, compress, find_layers, make_plan
from ..compress.apply import model_bytes
from ..compress.embedding import find_embedding
from ..compress.evaluate import perplexity, token_windows
from ..compress.passes.llm_mq import LlmMq, reallocate
from ..compress.passes.rtn import Rtn
from ..data import calibration_text, evaluation_text
from .plot import plot_layers
from .report import Outcome, Version

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Self

Say = Callable[[str], None]
Bars = Callable[[], AbstractContextManager[Progress]]

STEPS = 7
_SPEED_PROMPT = 16  # tokens
_CALIB_BATCH = 8


@dataclass(frozen=True)
class Settings:
    """What the demo does, sized so that SmolLM2-135M takes about six minutes on two cores.

    Attributes:
        bits: budgets, average bits per weight: rounding uses them as they are, LLM-MQ as averages.
        group_size: weights that share a scale.
        compute: form of the products of all compressed versions.
        calib_sequences, calib_length: calibration windows and their tokens.
        score_sequences: how many of them the sensitivity scores see.
        context, windows: of the perplexity.
        new_tokens, rounds: of the decoding speed.
        prompt, sample_tokens: of the text samples.
    """

    bits: tuple[int, ...] = (4, 3)
    group_size: int = 64
    compute: str = "int8"
    calib_sequences: int = 8
    calib_length: int = 512
    score_sequences: int = 4
    context: int = 1024
    windows: int = 8
    new_tokens: int = 48
    rounds: int = 3
    prompt: str = "Explain in two sentences why the sky is blue."
    sample_tokens: int = 48

    @classmethod
    def for_model(cls, model: PreTrainedModel) -> Self:
        """The defaults, with windows no longer than the positions that ``model`` has."""
        limit = getattr(model.config, "max_position_embeddings", None) or cls.context
        longest = min(cls.new_tokens, max(2, limit // 2))
        context, length = min(cls.context, limit), min(cls.calib_length, limit)
        return cls(context=context, calib_length=length, new_tokens=longest, sample_tokens=longest)


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    out: Path,
    settings: Settings,
    say: Say,
    bars: Bars,
    caveats: tuple[str, ...] = (),
) -> Outcome:
    """Steps 2 to 7; step 1 loaded ``model``, an uncompressed decoder in fp32, which is left as it is.

    Writes into ``out``: one folder per compressed version, ``demo.json``, ``table.md`` and ``layers.png``.

    Args:
        say: takes a line for the person who waits.
        bars: makes a context manager whose value is a progress callback.
        caveats: what to say about this model wherever its figures stand.
    """
    begin = time.perf_counter()
    demo = _Demo(tokenizer, out, settings, say, bars)
    pair, _ = find_embedding(model)
    shared = {"compute": settings.compute, "group_size": settings.group_size}
    shared["embedding_bits"] = None if pair is None else 8

    def step(number: int, what: str) -> None:
        say(f"step {number} of {STEPS}: {what}")

    step(2, f"PyTorch in bf16, perplexity of {settings.windows} windows of {settings.context} tokens (about 15 s)")
    demo.add_dense(copy.deepcopy(model).bfloat16())

    step(3, f"rounding to nearest with {_join(settings.bits)} bits, saving, loading, perplexity (about 45 s)")
    for bits in settings.bits:
        recipe = Rtn(bits=bits, mode="asym", **shared)
        demo.add_compressed(f"RTN {bits}-bit", copy.deepcopy(model), recipe)

    step(4, "LLM-MQ, the sensitivity of every layer at every bit-width on calibration text (about 2 min)")
    shared["score_sequences"] = settings.score_sequences
    recipes = [LlmMq(bits=float(bits), **shared) for bits in settings.bits]
    length, count = settings.calib_length, settings.calib_sequences
    calib = list(token_windows(tokenizer, calibration_text(), length, count, spread=True).split(_CALIB_BATCH))
    scaled = copy.deepcopy(model)
    with bars() as progress:
        first = make_plan(scaled, recipes[-1], calib, progress)
    layers, _ = find_layers(scaled)

    plans: dict[str, Plan] = {}
    for number, recipe in enumerate(recipes, start=5):
        name = f"LLM-MQ {recipe.bits:.1f}"
        step(number, f"{name} bits on average: allocating, compressing, saving, loading, perplexity (about 1.5 min)")
        plans[name] = reallocate(first, recipe, layers)
        demo.add_compressed(name, copy.deepcopy(scaled), recipe, calib, plans[name])
    del scaled

    step(7, f"decoding speed, {settings.rounds} rounds in turns, and a sample of text from each (about 1 min)")
    demo.measure_speed()
    outcome = demo.outcome(time.perf_counter() - begin, caveats)
    blocks = {layer.name: layer.block for layer in layers}
    plot_layers(out / "layers.png", plans, first.notes["scores"], blocks)
    outcome.save(out)
    say(f"wrote {out}/table.md, demo.json, layers.png and the models; {outcome.seconds:.0f} s in all")
    return outcome


class _Demo:
    """The versions so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: Path, settings: Settings, say: Say, bars: Bars) -> None:
        self.tokenizer, self.out, self.settings, self.say, self.bars = tokenizer, out, settings, say, bars
        self.models: dict[str, PreTrainedModel] = {}
        self.versions: dict[str, Version] = {}

    def add_dense(self, model: PreTrainedModel) -> None:
        """The uncompressed model as PyTorch runs it."""
        size = model_bytes(model)
        self._add("PyTorch bf16", model, Version(megabytes=size / 1e6, nominal_bits=16.0, true_bits=16.0))

    def add_compressed(
        self,
        name: str,
        model: PreTrainedModel,
        recipe: Recipe,
        calib: list[Tensor] | None = None,
        plan: Plan | None = None,
    ) -> None:
        """Compress ``model``, save it, load it back from disk, and keep the loaded one."""
        start = time.perf_counter()
        with self.bars() as progress:
            report: Report = compress(model, recipe, calib, plan, progress)
        folder = self.out / name.lower().replace(" ", "-")
        hub.save(model.bfloat16(), folder, self.tokenizer)
        report.plan.save(folder / "plan.json")
        report.save(str(folder / "report.json"))
        del model
        loaded = hub.load(folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        version = Version(
            megabytes=size / 1e6,
            nominal_bits=report.nominal_bits,
            true_bits=report.true_bits,
            compress_seconds=time.perf_counter() - start,
        )
        self._add(name, loaded, version)

    def _add(self, name: str, model: PreTrainedModel, version: Version) -> None:
        start = time.perf_counter()
        context, windows = self.settings.context, self.settings.windows
        with self.bars() as progress:
            value = perplexity(model, self.tokenizer, evaluation_text(), context, windows, progress=progress)
        self.models[name] = model
        self.versions[name] = dataclasses.replace(version, perplexity=value)
        took = "" if version.compress_seconds is None else f", compressed in {version.compress_seconds:.0f} s"
        took += f", evaluated in {time.perf_counter() - start:.0f} s"
        self.say(f"  {name}: {version.megabytes:.0f} MB, perplexity {value:.2f}{took}")

    def measure_speed(self) -> None:
        """Speed of all versions in turns, then a text from each."""
        settings = self.settings
        prompt = token_windows(self.tokenizer, evaluation_text(), _SPEED_PROMPT, 1)
        speeds = decode_speeds(self.models, prompt, settings.new_tokens, settings.rounds)
        ids = self._prompt_ids()
        for name, model in self.models.items():
            sample = self.tokenizer.decode(generate_ids(model, ids, settings.sample_tokens), skip_special_tokens=True)
            self.versions[name] = dataclasses.replace(
                self.versions[name], tokens_per_second=speeds[name], sample=" ".join(sample.split())
            )

    def _prompt_ids(self) -> Tensor:
        text = self.settings.prompt
        if getattr(self.tokenizer, "chat_template", None):
            messages = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return torch.tensor([self.tokenizer(text, add_special_tokens=False)["input_ids"]], dtype=torch.int64)

    def outcome(self, seconds: float, caveats: tuple[str, ...]) -> Outcome:
        """Everything measured, with the conditions."""
        return Outcome(self.versions, self.settings, isa.active(), torch.get_num_threads(), seconds, caveats)


def _join(numbers: tuple[int, ...]) -> str:
    return " and ".join(map(str, numbers))
