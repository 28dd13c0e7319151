#!/usr/bin/env bash
# temporal.sh DIR builds a Temporal server, the tool for its PostgreSQL schema
# and its web page into DIR, from the modules that go.mod pins: what the
# compose file runs, and what the tests of deploy/ run without Docker.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: temporal.sh DIR}
mkdir -p "$dir/temporal-ui"
export CGO_ENABLED=0
go build -ldflags='-s -w' -o "$dir/temporal-server" go.temporal.io/server/cmd/server
go build -ldflags='-s -w' -o "$dir/temporal-sql-tool" go.temporal.io/server/cmd/tools/sql
go build -ldflags='-s -w' -o "$dir/temporal-ui-server" github.com/temporalio/ui-server/v2/cmd/server
# The page reads its settings from files that stand in its module.
rm -rf "$dir/temporal-ui/config"
cp -r "$(go list -m -f '{{.Dir}}' github.com/temporalio/ui-server/v2)/config" "$dir/temporal-ui/config"
chmod -R u+w "$dir/temporal-ui"
