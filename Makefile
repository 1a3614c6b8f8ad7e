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
.PHONY: help demo test bench build release bpf fuzz setup-build setup-test fmt clippy deny bpf-check crds-check unit lab

export PATH := $(PATH):$(CURDIR)/.tools/bin

STORE ?= memory
SECONDS_PER_TARGET := $(or $(SECONDS),60)
export ISTHMUS_BENCH_DIR ?= $(CURDIR)/target/bench
isthmus := $(or $(CARGO_TARGET_DIR),target)/debug/isthmus

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

demo: setup-build
	cargo build --quiet --locked --workspace --bins
	$(isthmus) lab run kind-scenarios/global-service --store $(STORE) $(if $(KEEP),--keep)

# The quick checks come first: what is most often wrong is told soonest.
test: setup-test fmt deny crds-check bpf-check clippy unit
	@echo "All checks and tests passed."

fmt:
	cargo fmt --all --check

# Advisories need the advisory database from the network: `cargo deny check advisories` where it can be reached.
deny:
	cargo deny --locked check --hide-inclusion-graph bans licenses sources

crds-check:
	cargo xtask crds --check

bpf-check:
	cargo xtask bpf check

clippy:
	cargo clippy --quiet --locked --workspace --all-targets -- -D warnings

unit:
	cargo build --quiet --locked --workspace --bins
	cargo test --locked --workspace

bench: setup-test
	cargo build --quiet --locked --release --workspace --bins
	cargo bench --quiet --locked -p isthmus-node-agent --bench datapath
	cargo bench --quiet --locked -p isthmus-kvstore --bench store
	cargo bench --quiet --locked -p isthmus-lab --bench propagation

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
