# `make demo`, `make test` and `make docs` do everything on a fresh machine, the virtual environment in .venv included.
#
#   make demo PYTHON=python3.12        with another Python (3.11 or newer)
#   make test TEST_JOBS=1                test files one after the other, not one on each core (at most four)
#   make demo TORCH_ARGS="--index-url URL"
#                                      with PyTorch's own CPU index, where the default index gives the large CUDA build

PYTHON ?= python3
TORCH_ARGS ?=
DEMO_ARGS ?=
TEST_ARGS ?=
TEST_JOBS ?= auto

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --constraint constraints.txt
RUNTIME := numpy onnx onnxruntime onnxscript safetensors pillow simplejpeg pyyaml huggingface_hub typer rich jinja2 tomlkit hatchling editables
TOOLS := pytest pytest-cov pytest-timeout pytest-xdist hypothesis ruff mypy optuna transformers pyarrow datasets einops uv \
	pycocotools nbconvert ipykernel jsonschema
DOCS := mkdocs-material mkdocstrings[python]

.PHONY: demo test docs install

demo: install
	@start=$$(date +%s); $(BIN)/hirelc-deploy demo $(DEMO_ARGS); code=$$?; \
	echo "demo: $$(($$(date +%s) - start)) s"; exit $$code

test: .venv/tools
	@start=$$(date +%s); \
	$(BIN)/ruff check && $(BIN)/ruff format --check && $(BIN)/mypy && \
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --maxprocesses 4 --dist loadfile \
	--cov --cov-report=term:skip-covered $(TEST_ARGS); code=$$?; \
	echo "test: $$(($$(date +%s) - start)) s"; exit $$code

docs: .venv/tools
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: .venv/runtime

# torch comes first and alone: an open version range further on would fetch gigabytes of CUDA libraries.
# torchvision and timm come without dependencies, because torchvision asks for one exact torch.
.venv/runtime: constraints.txt pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "make: there is no $(PYTHON); install Python 3.11 or newer, or say PYTHON=/path/to/python." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: $$($(PYTHON) --version) is too old; install Python 3.11 or newer and say PYTHON=python3.11." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "make: $(PYTHON) has no venv module; install it (Debian, Ubuntu: apt install python3-venv)." >&2; exit 1; }
	@start=$$(date +%s); echo "installing into .venv (a few minutes the first time)"; \
	$(PYTHON) -m venv .venv && \
	$(PIP) $(TORCH_ARGS) torch && \
	$(PIP) --no-deps torchvision timm && \
	$(PIP) $(RUNTIME) && \
	$(PIP) --no-deps --no-build-isolation --editable . && \
	touch $@ && echo "install: $$(($$(date +%s) - start)) s"

.venv/tools: .venv/runtime
	@start=$$(date +%s); $(PIP) $(TOOLS) $(DOCS) && touch $@ && echo "install of test tools: $$(($$(date +%s) - start)) s"
