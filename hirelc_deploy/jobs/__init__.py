"""One module per command: a configuration and a folder in, a finished piece of work out."""
