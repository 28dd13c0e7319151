//go:build deps

// Package floors holds the pinned modules until code imports them.
package floors

import (
	_ "github.com/BurntSushi/toml"
	_ "github.com/google/go-cmp/cmp"
	_ "github.com/prometheus/client_golang/prometheus/promhttp"
	_ "github.com/rogpeppe/go-internal/testscript"
	_ "github.com/spf13/cobra"
	_ "github.com/temporalio/ui-server/v2/server"
	_ "go.temporal.io/sdk/contrib/envconfig"
	_ "go.temporal.io/sdk/contrib/opentelemetry"
	_ "go.temporal.io/sdk/worker"
	_ "go.temporal.io/server/temporal"
	_ "gocloud.dev/blob/fileblob"
	_ "github.com/pressly/goose/v3"
	_ "modernc.org/sqlite"
	_ "github.com/charmbracelet/bubbletea"
	_ "github.com/charmbracelet/lipgloss"
	_ "golang.org/x/sys/unix"
	_ "golang.org/x/term"
	_ "github.com/elastic/go-seccomp-bpf"
	_ "github.com/landlock-lsm/go-landlock/landlock"
	_ "github.com/google/uuid"
)
