# Two commands: `make demo` and `make test`. Both install what they need (Debian 12) and say what the machine lacks.
#
#   make demo [STORE=etcd] [KEEP=1]   two clusters share a global service, as a short story
#   make test                         every check and every test
#   make bench                        the benchmarks: tables, and JSON in target/bench
#   make build | release              the binaries, in target/debug | target/release
#   make bpf                          rebuild the eBPF object after a change under bpf/
#   make fuzz [SECONDS=60]            every fuzz target for a while

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test bench build release bpf fuzz setup-build setup-test setup-bench fmt clippy deny bins bpf-check crds-check kustomize-check images-check unit

# Programs that xtask/setup.sh has installed because the machine has older ones, the machine's, and those that it has not.
export PATH := $(CURDIR)/.tools/newer:$(PATH):$(CURDIR)/.tools/bin

STORE ?= memory
SECONDS_PER_TARGET := $(or $(SECONDS),60)
export ISTHMUS_BENCH_DIR ?= $(CURDIR)/target/bench
bin := $(or $(CARGO_TARGET_DIR),target)/debug
fuzz_targets := isthmus-wire-fuzz/targets,isthmus-wireguard-fuzz/targets

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: setup-build bins
	$(bin)/isthmus lab run kind-scenarios/global-service --store $(STORE) $(if $(KEEP),--keep)

# The quick checks come first: what is most often wrong is told soonest. Everything is built once, as one workspace: a
# crate built alone would get other features of its dependencies, and those would be built twice.
test: setup-test fmt deny clippy images-check bins crds-check kustomize-check bpf-check unit
	@echo "All checks and tests passed."

fmt:
	cargo fmt --all --check

# Advisories need the advisory database from the network: `cargo deny check advisories` where it can be reached.
deny:
	cargo deny --locked check --hide-inclusion-graph bans licenses sources

# The fuzz targets too, which nothing else here compiles.
clippy:
	cargo clippy --quiet --locked --workspace --all-targets --features $(fuzz_targets) -- -D warnings

bins:
	cargo build --locked --workspace --bins

crds-check: bins
	$(bin)/xtask crds --check

# What is rendered is read by the programs that were built just now. The API's word on it is among the tests.
kustomize-check: bins
	$(bin)/xtask kustomize

images-check:
	hadolint images/*/Dockerfile
	sh -n images/build.sh

bpf-check: bins
	$(bin)/xtask bpf check

# The lab starts the programs that were built just now.
unit: bins
	cargo test --quiet --locked --workspace --no-fail-fast

bench: setup-bench
	cargo build --locked --release --workspace --bins
	cargo bench --quiet --locked -p isthmus-node-agent --bench datapath
	cargo bench --quiet --locked -p isthmus-policy --bench resolve
	cargo bench --quiet --locked -p isthmus-wire --bench values
	cargo bench --quiet --locked -p isthmus-kvstore --bench store --bench sync
	cargo bench --quiet --locked -p isthmus-lab --bench propagation
	cargo bench --quiet --locked -p isthmus-wireguard --bench throughput

build: setup-build
	cargo build --locked --workspace --bins

release: setup-build
	cargo build --locked --release --workspace --bins

bpf: setup-test
	cargo xtask bpf build

fuzz: setup-test
	cargo xtask fuzz --seconds $(SECONDS_PER_TARGET)

setup-build:
	@STORE=$(STORE) xtask/setup.sh build

setup-test:
	@xtask/setup.sh test

setup-bench:
	@xtask/setup.sh bench
