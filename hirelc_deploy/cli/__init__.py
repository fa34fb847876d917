"""The command line: a thin skin over what Python calls do."""

from hirelc_deploy.cli import after, look, make
from hirelc_deploy.cli.application import app, fail, main, run, show

__all__ = ["after", "app", "fail", "look", "main", "make", "run", "show"]
