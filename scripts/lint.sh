#!/usr/bin/env bash
# lint.sh runs every check that reads the code and runs none of it. All of them
# run, also when one fails; the last line names those that did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
: "${GOLANGCI_LINT:?set by make lint}" "${WORKFLOWCHECK:?set by make lint}"

# The checks load what "make build" compiled, and leave the embedded Temporal
# server out: with it each of them takes a quarter of an hour.
export CGO_ENABLED=0
flags="$(go env GOFLAGS) -tags=noembed"

failed=()
step() {
  local name=$1 start=$SECONDS
  shift
  if "$@"; then
    echo "ok    $name ($((SECONDS - start)) s)"
  else
    echo "FAIL  $name ($((SECONDS - start)) s)"
    failed+=("$name")
  fi
}

formatted() {
  local files
  files=$(git ls-files --cached --others --exclude-standard '*.go' | grep -v /testdata/ | xargs -r ls -d 2>/dev/null | xargs -r gofmt -l)
  [[ -z $files ]] || { echo "not formatted:" "$files"; return 1; }
}

tidy() {
  local dir
  for dir in . tests/deploy; do
    (cd "$dir" && go mod tidy -diff) || return 1
  done
}

# Workflow code is replayed, so it may not see the clock, chance, or the order
# of a map.
replayable() { GOFLAGS=$flags "$WORKFLOWCHECK" ./internal/orchestrator; }

step 'gofmt' formatted
step 'go mod tidy' tidy
step 'go vet' go vet -tags noembed ./...
step 'golangci-lint' "$GOLANGCI_LINT" run ./...
step 'workflowcheck' replayable

((${#failed[@]} == 0)) || { echo "lint: failed: ${failed[*]}" >&2; exit 1; }
