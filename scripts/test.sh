#!/usr/bin/env bash
# test.sh runs every test there is, once, and closes with one line:
# "N passed, N failed, N skipped". It fails when a test fails or none ran.
#
# The embedded Temporal server takes minutes to compile, so it is compiled
# once, without the race detector, by "make build". Three runs keep it at that:
# all packages under the race detector with the server left out (noembed),
# then the engine, which is the server, then what reads and starts deploy/. The sessions of cmd/sandbox-temporal
# run the program in bin/, server and all.
#
# Nothing comes from the test cache: it does not know of bin/ or of the agents
# in tests/node_modules, and would call a stale result a pass.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/env.sh
. scripts/env.sh

# vet has a run of its own (scripts/lint.sh); two packages at a time, because
# many start sandboxes, agents or whole engines.
flags=(-json -count=1 -vet=off -p 2 -timeout 25m)

report=$(mktemp -d)
trap 'rm -rf "$report"' EXIT
CGO_ENABLED=0 go build -o "$report/testsum" ./scripts/testsum

# What takes longest begins first, or one core is idle while it ends.
long=(./internal/sandbox/local ./cmd/sandbox-temporal ./internal/sandbox/gvisor)

(
  status=0
  go test "${flags[@]}" -race -tags noembed "${long[@]}" ./... || status=1
  CGO_ENABLED=0 go test "${flags[@]}" ./internal/engine/ || status=1
  (cd tests/deploy && CGO_ENABLED=0 go test "${flags[@]}" ./...) || status=1
  exit $status
) </dev/null | "$report/testsum"
