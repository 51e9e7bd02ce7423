"""``python -m effk.demo [OPTIONS]`` is ``effk demo [OPTIONS]``."""

import sys

from ..cli.app import app

app(args=["demo", *sys.argv[1:]])
