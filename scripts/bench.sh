#!/usr/bin/env bash
# bench.sh [TIME [FLAG...]] measures, and writes docs/benchmarks.md. First it
# runs every benchmark of every package for about TIME (1s), one package at a
# time and without the race detector, so that the numbers are worth comparing;
# then the program scripts/benchmark, which compares local sandboxes with other
# ways to make one. The FLAGs are that program's: with -only=sandbox,… the other
# sections of the document stay as they are.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-1s}
shift || true

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

only=,go,
for flag in "$@"; do
  [[ $flag != -only=* ]] || only=,${flag#-only=},
done
if [[ $only == *,go,* ]]; then
  packages=$(grep -rlE --include='*_test.go' --exclude-dir=node_modules '^func Benchmark[A-Z]' . | xargs -r -n1 dirname | sort -u || true)
  [[ -n $packages ]] || { echo "bench: found no benchmark" >&2; exit 1; }
  # shellcheck disable=SC2086 # one word a package
  CGO_ENABLED=0 go test -vet=off -tags noembed -p 1 -timeout 30m -run '^$' -bench . -benchmem -benchtime "$time" $packages </dev/null | tee "$work/go"
  set -- -go "$work/go" "$@"
fi
CGO_ENABLED=0 go build -ldflags='-s -w' -o "$work/" ./cmd/sandbox-supervisor ./scripts/benchmark
"$work/benchmark" -supervisor "$work/sandbox-supervisor" -o docs/benchmarks.md "$@"
