"""The command line: a thin skin over what Python calls do."""

import sys

try:
    from hirelc_deploy.cli import after, look, make
    from hirelc_deploy.cli.application import app, fail, main, run, show
except KeyboardInterrupt:  # before any command had begun
    sys.exit(130)

__all__ = ["after", "app", "fail", "look", "main", "make", "run", "show"]
