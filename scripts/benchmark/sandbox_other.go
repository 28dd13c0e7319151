//go:build !linux

package main

import "context"

// measureSandboxes has nothing to measure: local sandboxes are Linux's.
func measureSandboxes(_ context.Context, o options) ([]table, error) {
	o.logf("local sandboxes need Linux")
	return nil, nil
}
