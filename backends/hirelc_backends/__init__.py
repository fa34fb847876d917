"""The backends that ship with hirelc-deploy."""
