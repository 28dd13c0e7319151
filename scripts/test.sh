#!/usr/bin/env bash
# test.sh [full] runs every test there is, once, and closes with one line:
# "N passed, N failed, N skipped". It fails when a test fails or none ran.
#
# "make test" is the quick form: no race detector, and what a test does a
# hundred times or to gigabytes it does fewer times or to less (-short). No test
# is left out for it. "full" is the form of "make check", and so of CI: the same
# tests at full size, under the race detector.
#
# The embedded Temporal server takes minutes to compile, so it is compiled
# once, without the race detector, by "make build". Three runs keep it at that:
# all packages with the server left out (noembed), then the engine, which is the
# server, then what reads and starts deploy/. The sessions of
# cmd/sandbox-temporal run the program in bin/, server and all.
#
# Nothing comes from the test cache: it does not know of bin/ or of the agents
# in tests/node_modules, and would call a stale result a pass.
set -euo pipefail
cd "$(dirname "$0")/.."

# shellcheck source=scripts/env.sh
. scripts/env.sh

# vet has a run of its own (scripts/lint.sh).
flags=(-json -count=1 -vet=off -timeout 25m)
case ${1-} in
  '') # Three packages at a time: many of them wait, for an agent, a clock or a disk.
    flags+=(-short -p 3 -parallel 3)
    race=() cgo=0 beside=1
    ;;
  full) # Two: many start sandboxes, agents or whole engines, and the detector is slow.
    flags+=(-p 2)
    race=(-race) cgo=1 beside=0
    ;;
  *)
    echo "usage: scripts/test.sh [full]" >&2
    exit 2
    ;;
esac

report=$(mktemp -d)
trap 'rm -rf "$report"' EXIT
CGO_ENABLED=0 go build -o "$report/testsum" ./scripts/testsum

# Where nothing is in the build cache, compilers would have the processors for
# minutes while the first tests wait for agents and clocks with them.
CGO_ENABLED=$cgo go list -export -deps -test "${race[@]}" -tags noembed ./... >/dev/null
CGO_ENABLED=0 go list -export -deps -test ./internal/engine/ >/dev/null
(cd tests/deploy && CGO_ENABLED=0 go list -export -deps -test ./... >/dev/null)

# What takes longest begins first, or one core is idle while it ends.
long=(./internal/sandbox/local ./cmd/sandbox-temporal ./internal/sandbox/gvisor ./internal/gateway)

most() { CGO_ENABLED=$cgo go test "${flags[@]}" "${race[@]}" -tags noembed "${long[@]}" ./...; }

rest() {
  local status=0
  CGO_ENABLED=0 go test "${flags[@]}" ./internal/engine/ || status=1
  (cd tests/deploy && CGO_ENABLED=0 go test "${flags[@]}" ./...) || status=1
  return $status
}

(
  status=0
  if ((beside)); then
    # No "&", which would have them ignore Ctrl-C.
    rest >"$report/rest" | most </dev/null || status=1
    cat "$report/rest"
  else
    most || status=1
    rest || status=1
  fi
  exit $status
) </dev/null | "$report/testsum"
