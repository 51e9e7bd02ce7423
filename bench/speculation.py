"""`python -m bench.speculation DIR`: decoding with guesses of the n-gram drafter beside decoding without, in turns.

Greedy, one sequence, SmolLM2's tokens. "copy" is text that repeats its prompt (the answer to "repeat this" of a passage, begun),
"prose" is text that does not, and "wrong" a drafter whose guesses are all wrong. The tokens have to be the same with and without;
otherwise it exits with 1.
"""

from __future__ import annotations

import json
import statistics
from typing import Annotated

import torch
import typer

from effk.cli.models import open_model
from effk.runtime import Generator
from effk.runtime.batch import Batch, Sequence
from effk.runtime.limits import Limits
from effk.runtime.speculative import NGramDrafter

PASSAGE = (
    "The harbour lay in a wide bay behind two low islands. Every spring the fishing boats were pulled up on the beach, scraped, "
    "caulked with tar and painted in the colours of their families: green and white for the Olsens, blue for the Bergs. "
)
PROSE = "Write a short story about a girl who finds a map in her grandmother's attic."

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Wrong:
    """Proposes tokens that never come."""

    def begin(self, capacity: int) -> Wrong:
        return self

    def propose(self, ids: list[int], count: int) -> list[int]:
        return [2] * count  # <|im_end|>, which is not in these answers

    def close(self) -> None:
        """Nothing is held."""


@app.command()
def main(
    model: str,
    new: int = 128,
    threads: int = 2,
    rounds: Annotated[int, typer.Option(help="Each measures every case with and without.")] = 12,
) -> None:
    """Print one JSON object: tokens per second without and with, their ratio, and how many guesses were right."""
    torch.set_num_threads(threads)
    opened = open_model(model)
    generator = Generator(opened.model, opened.tokenizer)
    passage = opened.tokenizer(PASSAGE * 3)["input_ids"]
    prose = generator.encode([{"role": "user", "content": PROSE}])
    cases = {"copy": (passage, NGramDrafter()), "prose": (prose, NGramDrafter()), "wrong": (prose, Wrong())}
    seconds: dict[tuple[str, bool], list[float]] = {}
    found: dict[str, dict[str, float]] = {}
    lossless = True
    for turn in range(rounds):
        for name, (prompt, drafter) in cases.items():
            tokens = []
            for guessed in (turn % 2 == 0, turn % 2 == 1):
                sequence = decode(generator, prompt, new, drafter if guessed else None)
                seconds.setdefault((name, guessed), []).append(sequence.times["ended"] - sequence.times["first"])
                tokens.append(sequence.tokens)
                if guessed:
                    found[name] = {"drafted": sequence.drafted, "accepted": sequence.accepted}
            lossless &= tokens[0] == tokens[1]
    for name, record in found.items():
        without, guessed = (statistics.median(seconds[name, kind]) for kind in (False, True))
        ratios = [a / b for a, b in zip(seconds[name, False], seconds[name, True], strict=True)]
        record |= {"without": (new - 1) / without, "with": (new - 1) / guessed, "ratio": statistics.median(ratios)}
    print(json.dumps({"model": model, "threads": threads, "new": new, "lossless": lossless} | found, indent=1))
    raise typer.Exit(not lossless)


def decode(generator: Generator, prompt: list[int], new: int, drafter: object) -> Sequence:
    """One sequence to its end."""
    batch = Batch(generator.decoder, rows=1, capacity=len(prompt) + new, drafter=drafter)
    sequence = batch.add(Sequence(prompt, limits=Limits(max_new_tokens=new)))
    batch.run()
    return sequence


if __name__ == "__main__":
    app()
