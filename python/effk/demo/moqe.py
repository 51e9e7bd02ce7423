"""``python -m effk.demo.moqe``: small mixtures of experts trained from scratch, then compressed in parts to few bits.

Two models of bytes, trained on the calibration text in the package and judged on the evaluation text: one in Mixtral's shape,
every block a mixture; one in Qwen-MoE's, where every other block has a dense feed-forward network and the mixtures have a
shared expert. Each is then compressed with one scale a row, the experts alone to 4, 3 and 2 bits (recipe ``moqe``), and for
comparison only the attention or only the dense feed-forward layers to 2. Figures: docs/moqe.md.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from torch import Tensor
from torch.nn.functional import cross_entropy

from .. import isa
from ..compress import Recipe, compress
from ..compress.passes.moqe import MoQE
from ..compress.passes.rtn import Rtn
from ..data import calibration_text, evaluation_text
from .dyad_training import BYTES, Trainer, batches
from .dyad_training import Settings as Training

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHAPES = ("mixtral", "qwen-moe")


@dataclass(frozen=True)
class Settings:
    """Sizes of models, training and measurements."""

    width: int = 192
    hidden: int = 384  # of each expert; dense networks are twice as wide, as two experts serve a token
    experts: int = 8
    blocks: int = 4
    heads: int = 4
    length: int = 128
    batch: int = 12
    steps: int = 600
    rate: float = 2e-3
    windows: int = 48  # of the evaluation text
    new_bytes: int = 48  # of the timing
    seed: int = 0


@dataclass
class Version:
    """One form of a model.

    Attributes:
        touched: share of the parameters that are compressed.
        megabytes: of all parameters and buffers, as stored.
        nats: per byte on the evaluation text.
        bytes_per_second: of greedy generation by transformers, one sequence.
    """

    touched: float
    megabytes: float
    nats: float
    bytes_per_second: float


@dataclass
class Outcome:
    """What was measured."""

    settings: Settings
    threads: int
    tier: str
    parameters: dict[str, int] = field(default_factory=dict)
    training_seconds: dict[str, float] = field(default_factory=dict)
    versions: dict[str, dict[str, Version]] = field(default_factory=dict)  # shape -> name -> version


def build(settings: Settings, shape: str) -> PreTrainedModel:
    """The model, fp32, in training mode."""
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(settings.seed)
    common = {
        "vocab_size": BYTES, "hidden_size": settings.width, "num_hidden_layers": settings.blocks,
        "num_attention_heads": settings.heads, "num_key_value_heads": settings.heads // 2, "num_experts_per_tok": 2,
        "max_position_embeddings": 2 * settings.length, "output_router_logits": False, "bos_token_id": 0,
        "eos_token_id": 0, "tie_word_embeddings": False,
    }  # fmt: skip
    if shape == "mixtral":
        config = MixtralConfig(**common, intermediate_size=settings.hidden, num_local_experts=settings.experts)
        model = MixtralForCausalLM(config)
    else:
        config = Qwen2MoeConfig(
            **common, intermediate_size=2 * settings.hidden, moe_intermediate_size=settings.hidden,
            shared_expert_intermediate_size=settings.hidden, num_experts=settings.experts, decoder_sparse_step=2,
            norm_topk_prob=True,
        )  # fmt: skip
        model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("eager")  # on a CPU the fastest of transformers' own in training
    return model.train()


def recipes(shape: str) -> dict[str, Recipe]:
    """What is compared: name -> recipe; all of them search one scale a row."""
    rest = {"group_size": 0, "mode": "mse"}
    chosen: dict[str, Recipe] = {f"experts {bits} bits": MoQE(bits=bits) for bits in (4, 3, 2)}
    chosen["attention 2 bits"] = Rtn(bits=2, ignore=("lm_head", "*.mlp.*"), **rest)
    if shape != "mixtral":
        ignore = ("lm_head", "*.self_attn.*", "*.shared_expert_gate")
        chosen["dense feed-forward 2 bits"] = Rtn(bits=2, ignore=ignore, **rest)
    return chosen


@torch.inference_mode()
def evaluate(model: PreTrainedModel, windows: Tensor) -> float:
    """Nats per byte over windows ``(count, length)``, from logits in fp32."""
    total = 0.0
    for part in windows.split(8):
        logits = model(part, use_cache=False).logits[:, :-1].float()
        total += float(cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum"))
    return total / windows[:, 1:].numel()


@torch.inference_mode()
def speed(model: PreTrainedModel, prompt: Tensor, new: int) -> float:
    """Bytes per second of greedy generation, the fastest of eight."""
    taken = []
    for _ in range(8):
        start = time.perf_counter()
        model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0)
        taken.append(time.perf_counter() - start)
    return new / min(taken)


def run(
    settings: Settings, say: Callable[[str], None] = lambda text: None, shapes: tuple[str, ...] = SHAPES
) -> Outcome:
    """Train every shape, compress its copies, evaluate them."""
    outcome = Outcome(settings, torch.get_num_threads(), isa.active())
    text, test = (
        torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()
        for text in (calibration_text(), evaluation_text())
    )
    starts = torch.linspace(0, test.numel() - settings.length, settings.windows).long().tolist()
    test = torch.stack([test[s : s + settings.length] for s in starts])
    how = Training(
        length=settings.length, batch=settings.batch, steps=settings.steps, rate=settings.rate, seed=settings.seed
    )
    for shape in shapes:
        trainer, source = Trainer(build(settings, shape), how, 1, False), batches(text, how, 0, 1)
        start = time.perf_counter()
        for number in range(settings.steps):
            loss = trainer.step(next(source), number)
            if number % max(1, settings.steps // 10) == 0:
                say(
                    f"  {shape}, step {number} of {settings.steps}: {loss:.3f} nats, {time.perf_counter() - start:.0f} s"
                )
        outcome.training_seconds[shape] = time.perf_counter() - start
        outcome.versions[shape] = _versions(trainer.model.to(torch.bfloat16).eval(), shape, test, settings, say)
        outcome.parameters[shape] = sum(p.numel() for p in trainer.model.parameters())
    return outcome


def _versions(
    model: PreTrainedModel, shape: str, test: Tensor, settings: Settings, say: Callable[[str], None]
) -> dict[str, Version]:
    parameters = sum(p.numel() for p in model.parameters())
    prompt, versions = test[:1, : settings.length // 2], {}

    def add(name: str, form: PreTrainedModel, touched: int, size: int) -> None:
        pace = speed(form, prompt, settings.new_bytes)
        versions[name] = found = Version(touched / parameters, size / 1e6, evaluate(form, test), pace)
        say(f"{shape}, {name}: {found.nats:.3f} nats per byte")

    add("bf16", copy.deepcopy(model), 0, 2 * parameters)
    for name, recipe in recipes(shape).items():
        form = copy.deepcopy(model)
        report = compress(form, recipe)
        add(name, form, sum(layer.weights for layer in report.layers.values()), report.model_bytes_after)
    return versions


def table(outcome: Outcome) -> list[str]:
    """Markdown lines."""
    lines = [
        "| model | version | parameters touched | MB | nats per byte | perplexity per byte | rise | bytes/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for shape, versions in outcome.versions.items():
        plain = versions["bf16"].nats
        for name, v in versions.items():
            rise = math.exp(v.nats - plain) - 1
            lines.append(
                f"| {shape} | {name} | {v.touched:.1%} | {v.megabytes:.2f} | {v.nats:.4f} | {math.exp(v.nats):.3f} | "
                f"{rise:+.2%} | {v.bytes_per_second:.0f} |"
            )
    s = outcome.settings
    sizes = ", ".join(f"{shape} {count / 1e6:.2f} M parameters" for shape, count in outcome.parameters.items())
    seconds = ", ".join(f"{t:.0f} s" for t in outcome.training_seconds.values())
    return [
        *lines,
        "",
        f"{sizes}; hidden {s.width}, {s.experts} experts of {s.hidden}, 2 a token, {s.blocks} blocks; {s.steps} steps of "
        f"{s.batch} x {s.length} bytes in fp32 ({seconds}); {outcome.threads} threads, {outcome.tier}, PyTorch "
        f"{torch.__version__}.",
    ]


def main(
    steps: Annotated[int, typer.Option(help="Training steps of each model.")] = Settings.steps,
    shape: Annotated[list[str] | None, typer.Option(help="mixtral, qwen-moe; both if none is given.")] = None,
    threads: Annotated[int, typer.Option(help="Threads; 0: PyTorch's default.")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for moqe.json and table.md.")] = None,
) -> None:
    """Train small mixtures of experts and compress them in parts (some minutes)."""
    if steps < 1:
        raise typer.BadParameter("--steps: expected at least 1")
    if unknown := set(shape or ()) - set(SHAPES):
        raise typer.BadParameter(f"--shape: expected some of {', '.join(SHAPES)}, got {', '.join(sorted(unknown))}")
    if threads:
        torch.set_num_threads(threads)
    outcome = run(Settings(steps=steps), lambda text: print(text, flush=True), tuple(shape or SHAPES))
    print("\n".join(["", *table(outcome)]))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "moqe.json").write_text(json.dumps(asdict(outcome), indent=1) + "\n", encoding="utf-8")
        (out / "table.md").write_text("\n".join(table(outcome)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
