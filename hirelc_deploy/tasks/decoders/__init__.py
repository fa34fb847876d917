"""One file a task, for Python 3.8 and numpy alone: it travels in bundles as `decode.py`."""
