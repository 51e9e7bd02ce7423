"""The demo: one model, compressed four ways, saved, loaded again, run on the kernels and compared in one table.

``python -m effk.demo`` or ``effk demo`` runs it on SmolLM2-135M; :func:`run` on any small decoder of transformers.
"""

from .report import SMOLLM2_CAVEAT, Outcome, Version
from .steps import STEPS, Settings, run

__all__ = ["SMOLLM2_CAVEAT", "STEPS", "Outcome", "Settings", "Version", "run"]
