#!/usr/bin/env bash
# golden.sh rewrites the golden files of every package that has an -update
# flag, by running its tests with it.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/env.sh
. scripts/env.sh

packages=$(grep -rlE --include='*_test.go' --exclude-dir=node_modules 'flag\.Bool\("update"' . | xargs -r -n1 dirname | sort -u || true)
[[ -n $packages ]] || { echo "golden: no package has an -update flag" >&2; exit 1; }
# shellcheck disable=SC2086 # one word a package
CGO_ENABLED=0 go test -vet=off -tags noembed -count=1 -p 2 $packages -update </dev/null
git status --short -- '*/testdata/*'
