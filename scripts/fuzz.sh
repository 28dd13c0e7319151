#!/usr/bin/env bash
# fuzz.sh [TIME] runs every fuzz target of every package for TIME (30s), one
# after the other: go test takes one target at a time. An input that breaks a
# target is kept in that package's testdata/fuzz and fails its tests from then
# on.
set -euo pipefail
cd "$(dirname "$0")/.."
time=${1:-30s}

log=$(mktemp)
trap 'rm -f "$log"' EXIT

# late says whether all that is wrong is that the time was up in the middle of
# an input, which go test calls a failure until Go 1.27 (golang/go#75804). An input that
# breaks or hangs a target is told of and kept, and is none of this.
late() {
  grep -q '^    context deadline exceeded$' "$log" && ! grep -qE 'Failing input|seed corpus|hung or terminated|panic' "$log"
}

packages=$(grep -rlE --include='*_test.go' --exclude-dir=node_modules '^func Fuzz[A-Z]' . | xargs -r -n1 dirname | sort -u || true)
ran=0 failed=()
for package in $packages; do
  # In a variable of its own, so that a package that does not compile ends this.
  listed=$(CGO_ENABLED=0 go test -vet=off -tags noembed -list '^Fuzz' "$package")
  mapfile -t targets < <(grep '^Fuzz' <<<"$listed")
  for target in "${targets[@]}"; do
    echo "=== $package $target"
    ran=$((ran + 1))
    CGO_ENABLED=0 go test -vet=off -tags noembed -run '^$' -fuzz "^$target\$" -fuzztime "$time" "$package" </dev/null 2>&1 |
      tee "$log" || late || failed+=("$package:$target")
  done
done
((ran > 0)) || { echo "fuzz: found no target" >&2; exit 1; }
echo "$((ran - ${#failed[@]})) of $ran fuzz targets held for $time each"
((${#failed[@]} == 0)) || { printf 'fuzz: broken: %s\n' "${failed[@]}" >&2; exit 1; }
