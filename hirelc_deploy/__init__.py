"""hirelc-deploy: a trained vision model in, the fastest file its device can run within an allowed accuracy drop out."""

__version__ = "0.1.0"
