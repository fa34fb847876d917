"""In: nothing. Out: the version of this project."""

__version__ = "0.1.0"
