#!/usr/bin/env bash
# bench.sh [TIME] runs every benchmark of every package for about TIME (1s),
# one package at a time and without the race detector, so that the numbers are
# worth comparing.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-1s}

packages=$(grep -rlE --include='*_test.go' --exclude-dir=node_modules '^func Benchmark[A-Z]' . | xargs -r -n1 dirname | sort -u || true)
[[ -n $packages ]] || { echo "bench: found no benchmark" >&2; exit 1; }
# shellcheck disable=SC2086 # one word a package
CGO_ENABLED=0 go test -vet=off -tags noembed -p 1 -timeout 30m -run '^$' -bench . -benchmem -benchtime "$time" $packages </dev/null
