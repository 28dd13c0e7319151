# One word for each thing there is to do. How it is done stands in scripts/.

SHELL := /bin/bash
.DEFAULT_GOAL := build
FUZZTIME ?= 30s
BENCHTIME ?= 1s
PREFIX ?= /usr/local
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
LDFLAGS := -s -w -X main.version=$(VERSION)

GOLANGCI_LINT := .tools/golangci-lint-v2.15.0/golangci-lint
WORKFLOWCHECK := .tools/workflowcheck-v0.6.0/workflowcheck
AGENTS := tests/node_modules/.package-lock.json
RUNSC_VERSION := $(shell awk '$$1 == "gvisor.dev/gvisor" { print $$2 }' tests/runsc/go.mod)
TEMPORAL := .tools/temporal-$(shell awk '$$1 == "go.temporal.io/server" { print $$2 }' go.mod)/temporal-server
RUNSC := .tools/runsc-$(RUNSC_VERSION)/runsc

.PHONY: build demo test check lint fuzz bench golden install sbom clean need

build: ## the programs, in bin/; the first time compiles the Temporal server: minutes
	@scripts/need.sh go
	CGO_ENABLED=0 go build -ldflags='$(LDFLAGS)' -o bin/sandbox-engine ./cmd/sandbox-temporal
	CGO_ENABLED=0 go build -tags noembed -ldflags='$(LDFLAGS)' -o bin/ ./cmd/...

demo: build ## see it work: needs no key, no account, no other server
	@scripts/need.sh git
	bin/sandbox-temporal demo

test: need build $(AGENTS) $(RUNSC) $(TEMPORAL) ## install what the tests need, build once, run every test, quickly
	@scripts/need.sh 'postgres?' 'prometheus?'
	scripts/test.sh $(FORM)

check: FORM := full
check: lint test ## what CI runs: every check, then every test at full size under the race detector

lint: need $(GOLANGCI_LINT) $(WORKFLOWCHECK) ## every check that runs nothing of ours
	GOLANGCI_LINT=$(GOLANGCI_LINT) WORKFLOWCHECK=$(WORKFLOWCHECK) scripts/lint.sh

fuzz: need ## every fuzz target for FUZZTIME
	scripts/fuzz.sh $(FUZZTIME)

bench: need ## every benchmark, BENCHTIME each, and sandboxes beside their peers: writes docs/benchmarks.md; ONLY=sandbox,… N=100 DIR=/tmp
	@scripts/need.sh 'postgres?'
	scripts/bench.sh $(BENCHTIME) $(ONLY:%=-only=%) $(N:%=-n=%) $(DIR:%=-dir=%)

golden: build $(AGENTS) ## rewrite the golden files; read the diff before you commit it
	scripts/golden.sh

install: build ## the programs, into PREFIX/bin
	install -d $(DESTDIR)$(PREFIX)/bin
	install -m 755 bin/sandbox-temporal bin/sandbox-engine bin/sandbox-worker bin/sandbox-supervisor $(DESTDIR)$(PREFIX)/bin

sbom: build ## what is in the program, as a CycloneDX bill of materials beside it
	cd tests/deploy && go tool cyclonedx-gomod bin -json -output $(CURDIR)/bin/sandbox-engine.cdx.json $(CURDIR)/bin/sandbox-engine

clean: ## what make built and installed; Go's own caches stay
	rm -rf bin .tools tests/node_modules

need:
	@scripts/need.sh go git cc npm

$(GOLANGCI_LINT):
	GOBIN=$(CURDIR)/$(@D) CGO_ENABLED=0 go install github.com/golangci/golangci-lint/v2/cmd/$(subst -v,@v,$(notdir $(@D)))

$(WORKFLOWCHECK):
	GOBIN=$(CURDIR)/$(@D) CGO_ENABLED=0 go install go.temporal.io/sdk/contrib/tools/$(subst -v,@v,$(notdir $(@D)))

# gVisor is a module of its own, in tests/runsc: nothing of it is linked here.
$(RUNSC): tests/runsc/go.mod tests/runsc/go.sum
	cd tests/runsc && CGO_ENABLED=0 go build -trimpath -ldflags='-s -w -X gvisor.dev/gvisor/runsc/version.version=$(RUNSC_VERSION)' -o $(CURDIR)/$@ gvisor.dev/gvisor/runsc
	@touch $@

# A Temporal cluster, for the test of what the compose file starts.
$(TEMPORAL): go.mod scripts/temporal.sh
	scripts/temporal.sh $(@D)
	@touch $@

$(AGENTS): tests/package.json tests/package-lock.json tests/.npmrc | need
	cd tests && npm ci --ignore-scripts
	@touch $@
