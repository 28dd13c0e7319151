//go:build !linux

package main

import (
	"context"
	"errors"
)

// measureSandboxes has nothing to measure: local sandboxes are Linux's.
func measureSandboxes(_ context.Context, o options) ([]table, error) {
	o.logf("local sandboxes need Linux")
	return nil, nil
}

// gatewayWord: see gateway_linux.go.
const gatewayWord = "gateway"

// serveGateway serves nothing: see measureGateway.
func serveGateway(string, string) error { return errors.New("the gateway is measured on Linux") }

// measureGateway has nothing to measure: what memory a process has is read as
// Linux tells it.
func measureGateway(_ context.Context, o options) ([]table, error) {
	o.logf("the gateway is measured on Linux")
	return nil, nil
}
