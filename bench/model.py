"""Whole models: tokens per second of decoding, alone and BATCH sequences at once, and of reading a prompt; all greedy.

effk runs on its runtime (effk.runtime), PyTorch by transformers' `generate`, llama.cpp through its Python package. Decoding is
timed as NEW tokens less one, per token. "step" is effk's decoding without Python and sampling: the operation alone. The
models take turns, so that drift hits all. vs_best: against the fastest competitor. match: mean Kullback-Leibler divergence,
in nats, of the next-token distributions from those of a float32 PyTorch model with the very same (dequantised) weights, over
KL_BOUND, which is a convention of this table, not a derivation.
"""

from __future__ import annotations

import copy
import gc
import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor, nn

import effk
from effk.compress.passes.rtn import Rtn
from effk.hub.models import smollm2, smollm2_path
from effk.nn import WqEmbedding, WqLinear, WqTiedHead
from effk.runtime.decoder import Decoder

from . import machine
from .report import OURS, Row, print_table
from .timing import ForeignCpu

NAME = "SmolLM2-135M-Instruct"
PROMPT, NEW, ROUNDS, BATCH = 512, 64, 5, 8
DECODE_PROMPT = 16
POSITIONS = (63, 127, 255, 511)  # where distributions are compared
KL_BOUND = 0.02
Q4_0 = 2  # llama.cpp's file type


@dataclass
class Runtime:
    """A way to run the model: how to decode, how to read a prompt, and its next-token logits at POSITIONS."""

    backend: str
    version: str
    label: str
    dtype: str
    nbytes: int
    decode: Callable[[int], float]  # new tokens -> seconds, prompt included
    prefill: Callable[[], float]  # seconds
    divergence: float
    batch: Callable[[], float] | None = None  # seconds of a step of BATCH sequences
    step: Callable[[], float] | None = None  # seconds of the operation of a step


@torch.no_grad()
def run(threads: int, quick: bool, folders: list[Path], console: Console) -> list[Row]:
    """Measures every runtime and prints the table: models compressed here, and those of `folders`, saved by effk."""
    ids = torch.randint(1000, 20000, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    console.log("loading the model (about 20 s)")
    runtimes = [torch_runtime(ids)]
    for folder in folders:
        console.log(f"loading {folder}")
        runtimes.append(effk_runtime(effk.load(folder), ids))
    for compute in ("int8", "float"):
        console.log(f"compressing with rtn, 4 bits, {compute}")
        model, _ = smollm2(torch.float32)
        effk.compress(model, Rtn(bits=4, group_size=64, embedding_bits=8, compute=compute))
        runtimes.append(effk_runtime(model if compute == "int8" else model.to(torch.bfloat16), ids))
    try:
        runtimes += llama_runtimes(ids, threads, quick, console)
    except ImportError as error:
        console.log(f"missing: llama.cpp: {error}")
    gc.collect()
    rows = measure(runtimes, threads, 2 if quick else ROUNDS, console)
    print_table(rows, console, f"{NAME}, batch 1, {threads} thread{'s' * (threads > 1)}, us per token")
    for row in rows:
        console.print(f"{row.backend} {row.case}: {1e6 / row.us:.1f} tokens/s")
    return rows


def measure(runtimes: list[Runtime], threads: int, rounds: int, console: Console) -> list[Row]:
    """Rows for decoding and for reading the prompt; vs_best against the PyTorch bf16 model."""
    foreign, seconds = ForeignCpu(), {}

    def note(runtime: Runtime, kind: str, value: float) -> None:
        seconds.setdefault((id(runtime), kind), []).append(value)

    for r in range(rounds):
        for runtime in runtimes[r % len(runtimes) :] + runtimes[: r % len(runtimes)]:
            runtime.decode(2)
            note(runtime, "decode", (runtime.decode(NEW) - runtime.decode(1)) / (NEW - 1))
            runtime.prefill()
            note(runtime, "prefill", runtime.prefill() / PROMPT)
            for kind, call, tokens in (("batch", runtime.batch, BATCH), ("step", runtime.step, 1)):
                if call is not None:
                    call()
                    note(runtime, kind, statistics.median(call() for _ in range(NEW)) / tokens)
    console.log(f"foreign CPU while measuring: {foreign.share():.1%} of a core")
    probe = machine.DramProbe(threads)
    dram = statistics.median(probe.read() for _ in range(20))
    rows = []
    for kind in ("decode", "batch", "step", "prefill"):
        medians = {id(r): statistics.median(seconds[id(r), kind]) for r in runtimes if (id(r), kind) in seconds}
        best = min((medians[id(r)] for r in runtimes if id(r) in medians and r.backend != OURS), default=None)
        for runtime in runtimes:
            if id(runtime) not in medians:
                continue
            times = [s * 1e6 for s in seconds[id(runtime), kind]]
            us = medians[id(runtime)] * 1e6
            spread = statistics.quantiles(times, n=4, method="inclusive") if len(times) > 1 else [us] * 3
            gbps = runtime.nbytes / us / 1e3 if kind in ("decode", "step") else None
            keys = {
                "model": NAME,
                "prompt": PROMPT if kind == "prefill" else DECODE_PROMPT,
                "new": NEW * (kind != "prefill"),
                "batch": BATCH if kind == "batch" else 1,
            }
            ours = runtime.backend == OURS
            rows.append(
                Row(
                    "runtime",
                    f"{kind}, {runtime.label}",
                    keys,
                    runtime.dtype,
                    effk.isa.active() if ours else "native",
                    threads,
                    runtime.backend,
                    runtime.version,
                    us,
                    spread[2] - spread[0],
                    gbps,
                    None,
                    gbps / dram if gbps else None,
                    best * 1e6 / us if ours and best else None,
                    runtime.divergence / KL_BOUND,
                    best_us=min(times),
                )
            )
    return rows


def torch_runtime(ids: Tensor) -> Runtime:
    """PyTorch in bf16, eager, as transformers runs it."""
    reference, _ = smollm2(torch.float32)
    wanted = logits(reference, ids)
    model = reference.to(torch.bfloat16)
    return hf_runtime(model, ids, wanted, "torch eager", torch.__version__, "bf16")


@torch.inference_mode()
def effk_runtime(model: nn.Module, ids: Tensor) -> Runtime:
    """A compressed model on effk's runtime, its reference made of its own dequantised weights."""
    wanted = logits(dense_copy(model), ids)
    decoder = Decoder.from_model(model)
    prompt = ids[0].tolist()
    cache, many = decoder.cache(1, PROMPT + NEW), decoder.cache(BATCH, DECODE_PROMPT + NEW)

    def decode(new: int) -> float:
        cache.truncate(0, 0)
        start = time.perf_counter()
        token = int(decoder.step([(0, prompt[:DECODE_PROMPT])], cache).numpy().argmax())
        for _ in range(new - 1):
            token = int(decoder.step([(0, [token])], cache).numpy().argmax())
        return time.perf_counter() - start

    def prefill() -> float:
        cache.truncate(0, 0)
        start = time.perf_counter()
        decoder.step([(0, prompt)], cache)
        return time.perf_counter() - start

    def batch() -> float:
        if many.lengths[0] in (0, many.capacity):
            for slot in range(BATCH):
                many.truncate(slot, 0)
                decoder.step([(slot, prompt[slot : slot + DECODE_PROMPT])], many)
        start = time.perf_counter()
        decoder.step([(slot, [prompt[slot]]) for slot in range(BATCH)], many).numpy().argmax(-1)
        return time.perf_counter() - start

    def step() -> float:
        token, run = torch.tensor(prompt[:1]), torch.tensor([[0, NEW, 1]], dtype=torch.int32)
        out = torch.empty(1, decoder.vocab_size)
        start = time.perf_counter()
        torch.ops.effk.decoder_step(decoder._handle, token, run, *cache.tensors, "last", out)
        return time.perf_counter() - start

    got = decoder.step([(0, prompt)], decoder.cache(1, PROMPT), "all")[list(POSITIONS)].double()
    dtype = str(model.dtype).removeprefix("torch.")
    return Runtime(
        OURS, effk.__version__, label(model), dtype, decoder.weight_bytes, decode, prefill, divergence(wanted, got), batch, step
    )  # fmt: skip


def hf_runtime(model: nn.Module, ids: Tensor, wanted: Tensor, backend: str, version: str, name: str) -> Runtime:
    """Decoding by transformers' `generate`, greedy; reading the prompt by one forward call with a cache."""

    def decode(new: int) -> float:
        start = time.perf_counter()
        model.generate(
            ids[:, :DECODE_PROMPT],
            attention_mask=torch.ones(1, DECODE_PROMPT, dtype=torch.long),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    def prefill() -> float:
        start = time.perf_counter()
        model(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - start

    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers()) if t.numel()}
    nbytes = sum(t.numel() * t.element_size() for t in tensors.values())
    dtype = str(model.dtype).removeprefix("torch.")
    return Runtime(backend, version, name, dtype, nbytes, decode, prefill, divergence(wanted, logits(model, ids)))


def label(model: nn.Module) -> str:
    """Recipe and average bits of a compressed model."""
    layers = [m for m in model.modules() if isinstance(m, WqLinear) and not isinstance(m, WqEmbedding)]
    weights = sum(m.in_features * m.out_features for m in layers)
    nominal = sum(m.in_features * m.out_features * m.bits for m in layers) / weights
    recipe = getattr(model, effk.hub.record.PROVENANCE)
    return f"{recipe['name']} {nominal:.2f} bits, {layers[0].compute}"


def dense_copy(model: nn.Module) -> nn.Module:
    """The model in float32 with plain layers that hold the dequantised weights."""
    dense = copy.deepcopy(model).float()
    for path, module in list(dense.named_modules()):
        if not isinstance(module, (WqLinear, WqTiedHead)):
            continue
        weight = (module._embedding if isinstance(module, WqTiedHead) else module).dequantize()
        if isinstance(module, WqEmbedding):
            plain: nn.Module = nn.Embedding.from_pretrained(weight)
        else:
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None)
            plain.weight = nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                plain.bias = nn.Parameter(module.bias.float(), requires_grad=False)
        parent, _, name = path.rpartition(".")
        setattr(dense.get_submodule(parent), name, plain)
    return dense


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Next-token logits at POSITIONS, float64."""
    return model(ids).logits[0, list(POSITIONS)].double()


def divergence(wanted: Tensor, got: Tensor) -> float:
    """Mean over positions of KL(wanted || got), nats."""
    p, q = wanted.log_softmax(-1), got.log_softmax(-1)
    value = float((p.exp() * (p - q)).sum(-1).mean())
    return value if math.isfinite(value) else math.inf


def llama_runtimes(ids: Tensor, threads: int, quick: bool, console: Console) -> list[Runtime]:
    """llama.cpp on the file as shipped (Q4_1) and, unless quick, requantised to Q4_0, whose kernels are faster."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise ImportError("llama-cpp-python is not installed")
    import llama_cpp
    from llama_cpp._logger import set_verbose
    from transformers import AutoModelForCausalLM

    set_verbose(False)
    files = {"Q4_1": smollm2_path()}
    folder = tempfile.TemporaryDirectory()
    if not quick:
        console.log("requantising to Q4_0 for llama.cpp")
        files["Q4_0"] = Path(folder.name) / "q4_0.gguf"
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = Q4_0, True, threads
        if llama_cpp.llama_model_quantize(str(files["Q4_1"]).encode(), str(files["Q4_0"]).encode(), options):
            raise RuntimeError("llama.cpp could not requantise the model")
    out = []
    for name, path in files.items():
        reference = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
        wanted = logits(reference, ids)
        del reference
        out.append(llama_runtime(path, name, ids, wanted, threads, llama_cpp))
    folder.cleanup()
    return out


def llama_runtime(path: Path, name: str, ids: Tensor, wanted: Tensor, threads: int, llama_cpp: object) -> Runtime:
    """llama.cpp through its Python package, greedy, no sampling chain beyond the largest logit."""
    llm = llama_cpp.Llama(
        str(path),
        n_ctx=PROMPT + NEW,
        n_threads=threads,
        n_threads_batch=threads,
        n_batch=PROMPT,
        n_ubatch=PROMPT,
        verbose=False,
    )
    tokens = ids[0].tolist()

    def decode(new: int) -> float:
        llm.reset()
        start = time.perf_counter()
        llm.eval(tokens[:DECODE_PROMPT])
        for _ in range(new):
            llm.eval([llm.sample(temp=0.0)])
        return time.perf_counter() - start

    def prefill() -> float:
        llm.reset()
        start = time.perf_counter()
        llm.eval(tokens)
        return time.perf_counter() - start

    got, done = [], 0
    llm.reset()
    for position in POSITIONS:
        llm.eval(tokens[done : position + 1])
        done = position + 1
        row = llama_cpp.llama_get_logits_ith(llm.ctx, -1)
        got.append(torch.tensor(row[: llm.n_vocab()], dtype=torch.float64))
    return Runtime(
        "llama.cpp",
        llama_cpp.__version__,
        name,
        "float32",
        path.stat().st_size,
        decode,
        prefill,
        divergence(wanted, torch.stack(got)),
    )
