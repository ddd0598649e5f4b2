# Everything a checkout needs. `make help` lists what there is.
.DELETE_ON_ERROR:
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c

PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
MODE ?= userspace
KIT ?= ../shared/conformance
# How many tests of the kernel run at once: they wait more than they compute.
WORKERS ?= 2
# Tools of the tests and of the demo, and the Debian packages that have them.
TOOLS := ip:iproute2 unshare:util-linux nft:nftables iptables:iptables conntrack:conntrack ipset:ipset
# What python-iptables is built with: there is no wheel of it.
HAS_COMPILER = command -v gcc >/dev/null && test -f "$$($(PYTHON) -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h"
IMAGE_TOOLS := mmdebstrap:mmdebstrap buildah:buildah crun:crun
KIT_TOOLS := nft:nftables iptables:iptables conntrack:conntrack ipset:ipset
GUEST_TOOLS = qemu-system-x86_64:qemu-system-x86 virtiofsd:$(VIRTIOFSD) busybox:busybox-static \
	depmod:kmod ipvsadm:ipvsadm $(TOOLS)
# Two machines at a time: each is one processor, and emulated.
IN_GUEST = $(BIN)/python -m tests.guest.vm $(BIN)/pytest -q
SERVERS = tests/guest/test_ipvs.py tests/guest/test_traffic.py
# A package of its own since Debian 13.
VIRTIOFSD = $(shell apt-cache show virtiofsd >/dev/null 2>&1 && echo virtiofsd || echo qemu-system-common)

.PHONY: help setup demo test check format scenarios netns guest tools image conformance bench commands clean
help:  ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 14

setup: $(VENV)/ready  ## virtual environment and Debian packages
	@$(call need,$(TOOLS))

demo: setup  ## see Services work, in a small cluster of network namespaces: ten seconds, no cluster
	$(BIN)/pyproxy demo

test: setup check netns guest  ## everything: format, lint, types, imports, all tests

check: $(VENV)/ready tools  ## the fast part of the tests: no root, no namespaces
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -q -n auto tests --ignore=tests/netns --ignore=tests/guest

netns: setup tools image  ## the tests on the real kernel, in namespaces of their own
	$(BIN)/pytest -q tests/netns --dist worksteal --tx '$(WORKERS)*popen//python=tests/netns/isolated $(BIN)/python'

guest: setup  ## the tests on a kernel with ip_vs and SCTP, in a virtual machine: root on amd64, minutes
	@if [ "$$(id -u)" != 0 ] && [ -z "$${CI:-}" ]; then \
		echo 'NOT RUN: tests/guest, which needs root to share files with a virtual machine' >&2; \
	else $(call need,$(GUEST_TOOLS)); mkdir -p build; failed=; \
		$(IN_GUEST) $(SERVERS) >build/guest-servers.log 2>&1 & servers=$$!; \
		$(IN_GUEST) tests/guest $(SERVERS:%=--ignore=%) || failed=1; \
		wait $$servers || failed=1; cat build/guest-servers.log; test -z "$$failed"; fi

tools: $(VENV)/tools/ready  ## kubectl, helm, promtool and Kubernetes' schemas, for tests of deploy/

image: build/image.ready  ## the root file system of deploy/Dockerfile, as root

conformance: setup  ## the black-box kit, for one mode: make conformance MODE=userspace
	@$(call need,$(KIT_TOOLS))
	PATH="$(CURDIR)/$(BIN):$$PATH" $(KIT)/conformance run --mode $(MODE) --proxy 'pyproxy --config={config}'

bench: $(VENV)/ready  ## figures, as ratios to something measured in the same run
	for file in bench/[a-z]*.py; do $(BIN)/python $$file; done

scenarios: $(VENV)/ready  ## rewrite what the scenario files say the rules are: read it as a change
	$(BIN)/pytest -q tests/scenarios --rewrite

commands: setup  ## rewrite what docs/commands.md shows of the commands: real output
	$(BIN)/python -m docs.make_commands

format: $(VENV)/ready  ## put the code into its form
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what make made
	rm -rf $(VENV) build .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/ready: requirements-dev.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is missing: apt-get install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { $(call install,python3-venv); }
	@$(HAS_COMPILER) || { $(call install,gcc libc6-dev python3-dev); }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

$(VENV)/tools/ready: tests/deploy/get-tools tests/deploy/requirements.txt | $(VENV)/ready
	tests/deploy/get-tools $(VENV)/tools $(CURDIR)/$(BIN)/python
	touch $@

# Without root there is none, and the tests of pods say so.
build/image.ready: tests/deploy/build-image deploy/Dockerfile requirements-dev.txt pyproject.toml
	@if [ "$$(id -u)" = 0 ]; then $(call need,$(IMAGE_TOOLS)); tests/deploy/build-image build/image; touch $@; fi

# need TOOL:PACKAGE...: install the packages whose tool is missing, or say which they are.
need = missing=; for pair in $(1); do \
	PATH="$$PATH:/usr/sbin:/sbin:/usr/libexec:/usr/lib/qemu" command -v $${pair%%:*} >/dev/null || \
	missing="$$missing $${pair\#\#*:}"; done; test -z "$$missing" || { $(call install,$$missing); }
install = if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(1) >/dev/null; \
	else echo "missing: $(1) (as root: apt-get install $(1))" >&2; exit 1; fi
