"""In: `python -m hirelc_deploy ...`. Out: what the command `hirelc-deploy` does."""

from hirelc_deploy.cli import main

main()
