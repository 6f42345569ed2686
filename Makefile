# Two environments: .venv for everything, .venv-device for the device alone (tflite-runtime needs numpy 1).
PYTHON ?= $(or $(shell command -v python3.11),python3)
VENV := .venv
BIN := $(VENV)/bin
DEVICE_BIN := .venv-device/bin
PROTOS := $(wildcard proto/shoal/v1/*.proto)
EXTRAS := device,sensors,gateway,cloud,simulator,console,dev
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: $(shell sed -n 's/^\([a-z][a-z-]*\):.*/\1/p' $(firstword $(MAKEFILE_LIST)))

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

venv: $(VENV)/.installed ## Make the main environment
venv-device: .venv-device/.installed ## Make the small environment of a device on tflite-runtime

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Shoal needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo "Installing Shoal and what it needs into $(VENV), about 2.6 GB: one to three minutes"
	@started=$$(date +%s); test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[$(EXTRAS)]' && \
	touch $@ && echo "Installed in $$(( $$(date +%s) - started )) s"

.venv-device/.installed: pyproject.toml constraints-device.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "tflite-runtime has no wheel for this Python: make PYTHON=python3.11")'
	@echo "Installing the device alone into .venv-device"
	@started=$$(date +%s); test -x $(DEVICE_BIN)/python || $(PYTHON) -m venv .venv-device; \
	$(DEVICE_BIN)/pip install --quiet --disable-pip-version-check -c constraints-device.txt -e '.[device-tflite]' \
	  pytest pytest-timeout hypothesis && \
	touch $@ && echo "Installed in $$(( $$(date +%s) - started )) s"

demo: venv ## Run the whole loop on real data; ARGS="--quick --seed 8" and so on
	@$(BIN)/shoal demo $(ARGS)

test: venv test-device ## Run all tests, the device's in both environments
	@echo "== every test in the main environment"
	@$(BIN)/python -m pytest -rs --cov --cov-report=term:skip-covered $(ARGS)

test-device: venv-device
	@echo "== the device's tests on tflite-runtime and numpy 1"
	@$(DEVICE_BIN)/python -m pytest -rs -m device tests/shoal tests/device_agent

lint: venv proto-check ## Check style, types, layers and the protobuf contract
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/buf lint

format: venv ## Put the code in shape
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: venv ## Generate the protobuf code again
	@$(BIN)/python -m grpc_tools.protoc -I proto --python_out=proto --pyi_out=proto $(PROTOS)

proto-check: venv
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && \
	$(BIN)/python -m grpc_tools.protoc -I proto --python_out="$$fresh" --pyi_out="$$fresh" $(PROTOS) && \
	{ diff -rq -x '*.proto' -x __init__.py -x __pycache__ "$$fresh/shoal/v1" proto/shoal/v1 || \
	  { echo "generated code is stale: run make proto and commit what it changes"; exit 1; }; }

bench: venv ## Measure what the README and docs quote
	@$(BIN)/python benchmarks/protobuf_size.py

bench-delivery: venv ## Measure how a release reaches 500 devices (needs Mosquitto)
	@$(BIN)/python benchmarks/delivery.py $(ARGS)

bench-ingest: venv ## Measure how fast samples are stored for good, and whether any comes in twice (needs Mosquitto)
	@PYTHONPATH=. $(BIN)/python benchmarks/ingest.py $(ARGS)

bench-cache: venv ## Measure what the gateway's answer cache saves and costs (minutes)
	@PYTHONPATH=. $(BIN)/python benchmarks/cache.py $(ARGS)

bench-flood: venv ## Measure what a device that floods does to the others (a minute; needs gcc, Mosquitto)
	@PYTHONPATH=. $(BIN)/python benchmarks/flood.py $(ARGS)

MOSEC := benchmarks/gateway/.venv

$(MOSEC)/.installed: benchmarks/gateway/requirements-mosec.txt
	@echo "Installing mosec into $(MOSEC)"
	@test -x $(MOSEC)/bin/python || $(PYTHON) -m venv $(MOSEC)
	@$(MOSEC)/bin/pip install --quiet --disable-pip-version-check -r $< && touch $@

bench-gateway: venv $(MOSEC)/.installed ## Measure the gateway beside mosec, an echo and onnxruntime (minutes; needs gcc, wrk, Mosquitto)
	@$(BIN)/python -m benchmarks.gateway.bench_gateway $(ARGS)

bench-uplink: venv ## Measure what a device's upload budget finds, on real data
	@$(BIN)/python benchmarks/uplink.py $(ARGS)

bench-compression: venv venv-device ## Measure what pruning and int8 make of four networks in three runtimes (minutes)
	@$(BIN)/python -m benchmarks.compression $(ARGS)

bench-nab: venv ## Measure the anomaly detector beside those that NAB published (needs ../shared/data)
	@PYTHONPATH=. $(BIN)/python benchmarks/nab.py --draw $(ARGS)

bench-skab: venv ## Measure the anomaly detector on a water pump's eight channels (needs ../shared/data)
	@PYTHONPATH=. $(BIN)/python benchmarks/skab.py $(ARGS)

bench-nab-synthetic: venv ## Measure NAB's threshold, frozen, on made-up series of many kinds (minutes)
	@folder=$$(mktemp -d) && trap 'rm -rf "$$folder"' EXIT && \
	PYTHONPATH=. $(BIN)/python benchmarks/nab_synthetic.py --out "$$folder" && \
	PYTHONPATH=. $(BIN)/python benchmarks/nab.py --data "$$folder" --threshold 2.3298 $(ARGS)

bench-detectors: venv ## Measure the detectors of the sensor task beside each other (minutes)
	@PYTHONPATH=. $(BIN)/python benchmarks/detectors.py $(ARGS)

bench-training: venv ## Measure the trainer beside a bare loop (on a GPU where there is one)
	@PYTHONPATH=. $(BIN)/python benchmarks/training.py $(ARGS)

bench-replay: venv ## Measure what a fleet forgets when it learns what is new (a minute)
	@PYTHONPATH=. $(BIN)/python benchmarks/replay.py $(ARGS)

bench-outbox: venv ## Measure what the outbox writes to flash for each answered question (needs strace)
	@PYTHONPATH=. $(BIN)/python benchmarks/outbox_flash.py $(ARGS)

bench-device-step: venv ## Measure what the agent adds to a model call
	@$(BIN)/python benchmarks/device_step.py $(ARGS)

FOOTPRINT := benchmarks/.venv

$(FOOTPRINT)/.installed: pyproject.toml constraints.txt
	@echo "Installing the device alone, on LiteRT, into $(FOOTPRINT)"
	@test -x $(FOOTPRINT)/bin/python || $(PYTHON) -m venv $(FOOTPRINT)
	@$(FOOTPRINT)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[device]' && touch $@

bench-device-footprint: venv venv-device $(FOOTPRINT)/.installed ## Measure the agent's memory, start and CPU (minutes; needs Mosquitto)
	@$(BIN)/python -m benchmarks.device_footprint $(FOOTPRINT)/bin/python $(DEVICE_BIN)/python $(ARGS)

faults-install: venv ## Inject a fault into every system call of an install (minutes; needs strace)
	@$(BIN)/python tests/campaigns/faults_install.py $(ARGS)

gateway-requests: venv ## Ask the gateway 100,000 things, a tenth of them malformed, and check every answer
	@$(BIN)/python tests/campaigns/gateway_requests.py $(ARGS)

agent-kills: venv ## Kill an agent 200 times while readings flow, and close the books (minutes; needs Mosquitto)
	@$(BIN)/python tests/campaigns/agent_kills.py $(ARGS)

gateway-failover: venv ## Kill and stall two gateways under load: nothing lost, nothing late, nothing twice (needs Mosquitto)
	@$(BIN)/python tests/campaigns/gateway_failover.py $(ARGS)

acl-matrix: venv ## Try every right and every identity on a broker with the shipped profile (needs Mosquitto)
	@PYTHONPATH=. $(BIN)/python tests/campaigns/acl_matrix.py $(ARGS)

nightly: acl-matrix faults-install mutation-trust gateway-requests gateway-failover agent-kills ## The long campaigns, one after the other

mutation-trust: venv ## Remove each check that trust rests on and see a test fail (minutes)
	@$(BIN)/python tests/campaigns/mutation_trust.py $(ARGS)

check: lint test ## What CI runs, but for the demos

clean: ## Remove environments, caches and demo output
	rm -rf .venv .venv-device $(MOSEC) $(FOOTPRINT) benchmarks/gateway/.cache demo-out .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	find . -name __pycache__ -prune -exec rm -rf {} +
