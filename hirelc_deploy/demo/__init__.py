"""The embedded model and data of `hirelc-deploy demo`."""
