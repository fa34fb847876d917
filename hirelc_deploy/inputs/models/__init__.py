"""A model of the user's: where it comes from, its weights, and whether it can be worked with."""

from hirelc_deploy import _torchvision_guard

_torchvision_guard.install()  # before anyone's import of timm; timm itself takes seconds and is imported when needed
