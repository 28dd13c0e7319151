//go:build !linux

package cli

import "github.com/sandbox-temporal/sandbox-temporal/internal/config"

// room says nothing: there are no local sandboxes here to share it.
func (c *checkup) room(*config.Config) {}
