# Every action of the project, one line each; `make` lists them. Needs Python 3.11+, make and a compiler.
PYTHON ?= python3
RECIPE ?= int4
PY := .venv/bin/python
PIP := $(PY) -m pip install --disable-pip-version-check --constraint constraints.txt
STAMP := .venv/.setup-done
DEMO := build/demo-android build/demo-ios build/demo-documents
DRAWN := build/calibration
ASKED := build/report-documents

# What a user gives reaches a command as an environment variable, word for word: spaces, quotes and $ stay as they are.
TEXTS := MODEL LORA OUT RECIPE CALIBRATION CONTEXT BUNDLE IMAGE QUESTION DATA IMAGES ENDPOINT ENDPOINT_MODEL KEY_ENV \
  MAX_SIZE MAX_LOSS GROUPED LIMIT WORK PLOT PROFILE BASE SOURCE KEY TARGET DEVICE RUNNER EMULATOR ROUTE ROUTER_CONFIG TEST_DATA \
  ADDRESS PORT PDF PAGES VIDEO FRAMES
$(foreach name,$(TEXTS),$(eval override $(name) := $$(value $(name))))
export $(TEXTS)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-full-size test-devices test-clients check train train-adapter export-android export-ios verify publish pull web native devices run-device ask serve quality confidence search bench bench-kernels report clean

help:  ## list the actions
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' $(MAKEFILE_LIST) | while IFS='	' read -r name text; do printf '  make %-16s %s\n' "$$name" "$$text"; done

setup: $(STAMP)  ## .venv with pinned packages (on Linux TORCH_INDEX=https://download.pytorch.org/whl/cpu avoids CUDA)

demo: $(STAMP) $(DRAWN)  ## export the carried checkpoint to build/demo-android and build/demo-ios, prove them, ask about an image
	@rm -rf $(DEMO)
	@$(PY) -m demo.run --out build --calibration $(DRAWN)

test: $(STAMP)  ## run all tests
	@$(PY) -m pytest

test-full-size: $(STAMP)  ## the 2.2B (random weights): minutes, 7 GB of memory, 10 GB of disk
	@$(PY) -m pytest --full-size -m full_size

test-devices: $(STAMP)  ## fake devices: adbd in a network namespace, sshd, ARM64 emulated; fetches what they take (as root on Debian), skips what is missing
	@$(PY) -m device_harness.testbed || true
	@$(PY) -m runtimes.native.build --target=linux-arm64 --emulator || true
	@$(PY) -m pytest --devices tests/test_adb.py tests/test_arm64.py tests/test_ssh.py

CLIENTS := $(addprefix tests/test_,$(addsuffix .py,report transformersjs web page serve video pdf kotlin swift))
test-clients: $(STAMP)  ## what clients run: Node, headless Chromium, the server, Kotlin, Swift; fetches what it can, skips what is missing
	@$(PY) -m tests.clients
	@$(PY) -m pytest --clients $(CLIENTS)

check: $(STAMP)  ## format, lint, types
	@$(PY) -m ruff format --check . && $(PY) -m ruff check . && $(PY) -m mypy

train: $(STAMP)  ## OUT=folder: train the demo checkpoint anew (hours; goes on where it was stopped)
	@npm --prefix demo/fonts ci --ignore-scripts --no-audit --no-fund
	@$(PY) -m demo.train --out="$${OUT:?is missing: the folder of the checkpoint}"

train-adapter: $(STAMP)  ## OUT=folder: train the demo adapter anew (an hour; goes on where it was stopped)
	@npm --prefix demo/fonts ci --ignore-scripts --no-audit --no-fund
	@$(PY) -m demo.adapter --out="$${OUT:?is missing: the folder of the adapter}"

export-android: $(STAMP) $(DRAWN)  ## MODEL=folder-or-hub-id OUT=folder [LORA=adapter] [RECIPE=int4] [CALIBRATION=documents.jsonl] [DATA=documents.jsonl]
	@$(PY) -m export.android --model="$${MODEL:?is missing: a folder or a hub id}" --out="$${OUT:?is missing: the new folder}" --recipe="$$RECIPE" --calibration="$${CALIBRATION:-$(DRAWN)}" --work=build/calibrated $${LORA:+--lora="$$LORA"} $${DATA:+--data="$$DATA"}

export-ios: $(STAMP) $(DRAWN)  ## MODEL=folder-or-hub-id OUT=folder [LORA=adapter] [RECIPE=int4] [CALIBRATION=documents.jsonl] [CONTEXT=2048] [DATA=documents.jsonl]
	@$(PY) -m export.ios --model="$${MODEL:?is missing: a folder or a hub id}" --out="$${OUT:?is missing: the new folder}" --recipe="$$RECIPE" --calibration="$${CALIBRATION:-$(DRAWN)}" --work=build/calibrated $${LORA:+--lora="$$LORA"} $${CONTEXT:+--context="$$CONTEXT"} $${DATA:+--data="$$DATA"}

$(DRAWN): | $(STAMP)  # what a recipe is calibrated on where CALIBRATION names nothing: synthetic documents
	@rm -rf $@.partial
	@$(PY) -m demo.documents --split calibration --grade mixed --count 192 --out $@.partial
	@mv $@.partial $@

verify: $(STAMP)  ## BUNDLE=folder
	@$(PY) -m runtimes.verify -- "$${BUNDLE:?is missing: the folder of a bundle}"

publish: $(STAMP)  ## BUNDLE=folder TARGET=folder-or-hf://org/name [KEY=private-key]: put a proven bundle where devices pull it
	@$(PY) -m runtimes.publish $${KEY:+--sign="$$KEY"} -- "$${BUNDLE:?is missing: the folder of a bundle}" "$${TARGET:?is missing: a new folder, or hf://org/name}"

pull: $(STAMP)  ## SOURCE=hf://org/name@revision-https://...-or-folder OUT=folder [KEY=public-key]: fetch a bundle, checked
	@$(PY) -m runtimes.pull $${KEY:+--key="$$KEY"} -- "$${SOURCE:?is missing: hf://org/name, https://... or a folder}" "$${OUT:?is missing: the new folder}"

web: $(STAMP)  ## BUNDLE=folder OUT=folder [IMAGE=example [QUESTION='text']]: a page that runs the bundle in a browser
	@$(PY) -m runtimes.web.build --out="$${OUT:?is missing: the new folder}" $${IMAGE:+--picture="$$IMAGE"} $${QUESTION:+--question="$$QUESTION"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

native: $(STAMP)  ## [TARGET=linux-arm64] [OUT=folder]: the runner for devices, in C++, into build/native
	@$(PY) -m runtimes.native.build $${TARGET:+--target="$$TARGET"} $${OUT:+--out="$$OUT"}

ask: $(STAMP)  ## BUNDLE=folder QUESTION='text' [IMAGE=file] [PDF=file [PAGES=1-3]] [VIDEO=file [FRAMES=number]] [ROUTE=prefer_on_device [ROUTER_CONFIG=router.toml]]
	@$(PY) -m runtimes.ask $${IMAGE:+--image="$$IMAGE"} $${PDF:+--pdf="$$PDF"} $${PAGES:+--pages="$$PAGES"} $${VIDEO:+--video="$$VIDEO"} $${FRAMES:+--frames="$$FRAMES"} $${ROUTE:+--route="$$ROUTE"} $${ROUTER_CONFIG:+--router-config="$$ROUTER_CONFIG"} -- "$${BUNDLE:?is missing: the folder of a bundle}" "$${QUESTION:?is missing: a text}"

serve: $(STAMP)  ## BUNDLE=folder [ADDRESS=127.0.0.1] [PORT=8080] [KEY_ENV=variable]: an OpenAI-compatible server; elsewhere than loopback it needs a key
	@$(PY) -m runtimes.serve $${ADDRESS:+--host="$$ADDRESS"} $${PORT:+--port="$$PORT"} $${KEY_ENV:+--key-env="$$KEY_ENV"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

quality: $(STAMP)  ## BUNDLE=folder DATA=file [MODEL=reference [LORA=adapter]] [IMAGES=folder] [OUT=folder] [ENDPOINT=url ENDPOINT_MODEL=name [KEY_ENV=variable]]
	@$(PY) -m benchmarks.quality --data="$${DATA:?is missing: documents.jsonl, or the file of a data set}" $${MODEL:+--model="$$MODEL"} $${LORA:+--lora="$$LORA"} $${IMAGES:+--images="$$IMAGES"} $${OUT:+--out="$$OUT"} $${ENDPOINT:+--endpoint="$$ENDPOINT"} $${ENDPOINT_MODEL:+--endpoint-model="$$ENDPOINT_MODEL"} $${KEY_ENV:+--key-env="$$KEY_ENV"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

confidence: $(STAMP)  ## BUNDLE=folder [DATA=documents.jsonl TEST_DATA=documents.jsonl] [OUT=folder]: learn when its answers are wrong
	@$(PY) -m benchmarks.confidence $${DATA:+--data="$$DATA"} $${TEST_DATA:+--test-data="$$TEST_DATA"} $${OUT:+--out="$$OUT"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

search: $(STAMP)  ## MODEL=folder-or-hub-id DATA=documents.jsonl MAX_SIZE=900MB MAX_LOSS=0.01 OUT=mine.toml [CALIBRATION=documents.jsonl] [GROUPED=layer] [LIMIT=number] [WORK=folder] [PLOT=front.svg]
	@$(PY) -m benchmarks.search --data="$${DATA:?is missing: documents.jsonl}" --max-size="$${MAX_SIZE:?is missing: megabytes, or a part}" --max-loss="$${MAX_LOSS:?is missing: a mean KL}" --out="$${OUT:?is missing: the new .toml file}" $${CALIBRATION:+--calibration="$$CALIBRATION"} $${GROUPED:+--groups="$$GROUPED"} $${LIMIT:+--limit="$$LIMIT"} $${WORK:+--work="$$WORK"} $${PLOT:+--plot="$$PLOT"} -- "$${MODEL:?is missing: a folder or a hub id}"

bench: $(STAMP)  ## BUNDLE=folder [PROFILE=pixel-8] [OUT=runs.jsonl]: latency and memory here, within a device's limits
	@$(PY) -m benchmarks.run $${PROFILE:+--profile="$$PROFILE"} $${OUT:+--out="$$OUT"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

devices: $(STAMP)  ## list the devices that are connected
	@$(PY) -m device_harness.list

run-device: $(STAMP)  ## BUNDLE=folder DEVICE=local|ssh://[user@]host[:port][/folder]|adb:SERIAL [PROFILE=pixel-8] [RUNNER=file [EMULATOR=words]] [OUT=runs.jsonl]
	@$(PY) -m device_harness.run --device="$${DEVICE:?is missing: local, ssh://host or adb:SERIAL (make devices)}" $${PROFILE:+--profile="$$PROFILE"} $${RUNNER:+--runner="$$RUNNER"} $${EMULATOR:+--emulator="$$EMULATOR"} $${OUT:+--out="$$OUT"} -- "$${BUNDLE:?is missing: the folder of a bundle}"

bench-kernels: $(STAMP)  ## [OUT=build/kernels.json]: what the pieces take, and two exports
	@mkdir -p build
	@$(PY) -m pytest benchmarks/kernels.py -q --benchmark-json="$${OUT:-build/kernels.json}"

# Exit code 1 of a step is a limit or a regression: the report says so, and has the last word.
report: $(STAMP) $(if $(BUNDLE),,build/demo-android $(ASKED))  ## [BUNDLE=build/demo-android] [DATA=documents.jsonl] [PROFILE=pixel-8] [BASE=commit] [OUT=build/report]: measure, compare, draw
	@mkdir -p "$${OUT:=build/report}" && rm -f "$$OUT/runs.jsonl" "$$OUT/curve.jsonl"
	@$(PY) -m benchmarks.run $${PROFILE:+--profile="$$PROFILE"} --out="$${OUT:=build/report}/runs.jsonl" -- "$${BUNDLE:-build/demo-android}" || test $$? -eq 1
	@$(PY) -m benchmarks.budget $${PROFILE:+--profile="$$PROFILE"} $(if $(BUNDLE)$(DATA),$${DATA:+--data="$$DATA"},--data=$(ASKED)) --out="$${OUT:=build/report}/curve.jsonl" -- "$${BUNDLE:-build/demo-android}"
	@test -z "$$BASE" || $(PY) -m benchmarks.paired --base="$$BASE" --out="$${OUT:=build/report}" || test $$? -eq 1
	@$(PY) -m benchmarks.report --budget="$${OUT:=build/report}/curve.jsonl" --out="$$OUT" $(if $(BUNDLE),,--quality=benchmarks/results/quality_recipes.json) $$(test ! -f build/kernels.json || echo --kernels=build/kernels.json) $${BASE:+--baseline="$$OUT/base.jsonl"} -- "$$OUT/runs.jsonl" $${BASE:+"$$OUT/new.jsonl"}

build/demo-android: | $(STAMP) $(DRAWN)  # for a report without BUNDLE, as `make demo` makes it
	@$(PY) -m export.android --model=demo/checkpoint --out=$@ --calibration=$(DRAWN) --work=build/calibrated

$(ASKED): | $(STAMP)
	@rm -rf $@.partial
	@$(PY) -m demo.documents --split test --count 200 --out $@.partial
	@mv $@.partial $@

clean:  ## remove the demo's bundles and every cache (.venv and other builds stay)
	@rm -rf $(DEMO) .mypy_cache .pytest_cache .ruff_cache .hypothesis runtimes/web/node_modules tests/kotlin/node_modules
	@find $(wildcard benchmarks demo device_harness export quantize router_client runtimes tests) -name __pycache__ -prune -exec rm -rf {} +

# torch comes first: where an index is named it gives torch alone, and later steps find it installed.
# torchvision is an oracle of tests and stays out of the environment: beside another build of torch its import fails,
# and with it transformers' own. Tests that want it put .venv/oracle on sys.path.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make setup PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--no-deps --index-url '$(TORCH_INDEX)') "$$(grep '^torch==' constraints.txt)"
	$(PIP) --editable '.[export,ios,bench,demo,sign,serve,video,pdf,dev]'
	$(PIP) --no-deps --upgrade --target .venv/oracle "$$(grep '^torchvision==' constraints.txt)"
	@touch $@
