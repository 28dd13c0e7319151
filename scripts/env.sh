# shellcheck shell=bash
# env.sh is sourced, at the root: what the tests are told of the things that
# make has built and installed for them.

# The program that the sessions of cmd/sandbox-temporal run.
export SANDBOX_TEMPORAL_BIN=$PWD/bin/sandbox-temporal
if [[ ! -x $SANDBOX_TEMPORAL_BIN ]]; then
  echo "There is no $SANDBOX_TEMPORAL_BIN: run this through make, which builds it first." >&2
  exit 1
fi

# The real Claude Code: the native program, as the one that npm links to wants
# an install script. Where there is none for this kind of machine, the tests
# that need it skip and say so.
agent=$(uname -m | sed 's/x86_64/x64/; s/aarch64/arm64/')
agent=$PWD/tests/node_modules/@anthropic-ai/claude-code-linux-$agent/claude
if [[ -x $agent ]]; then
  export SANDBOX_TEMPORAL_CLAUDE=$agent
fi

# gVisor, for the sandboxes that have a kernel of their own. The tests that
# need it skip where it was not built.
runsc=$PWD/.tools/runsc-$(awk '$1 == "gvisor.dev/gvisor" { print $2 }' tests/runsc/go.mod)/runsc
if [[ -x $runsc ]]; then
  export SANDBOX_TEMPORAL_RUNSC=$runsc
fi

# A Temporal cluster of its own programs, on PostgreSQL.
cluster=$PWD/.tools/temporal-$(awk '$1 == "go.temporal.io/server" { print $2 }' go.mod)
if [[ -x $cluster/temporal-server ]]; then
  export SANDBOX_TEMPORAL_CLUSTER=$cluster
fi
