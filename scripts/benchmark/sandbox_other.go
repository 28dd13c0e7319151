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

// e2bWord: see e2b_linux.go.
const e2bWord = "e2b"

// serveE2B serves nothing: see measureE2B.
func serveE2B(string) error { return errors.New("the client of E2B is measured on Linux") }

// measureE2B has nothing to measure: the server that it is measured with makes
// its sandboxes of Linux's namespaces.
func measureE2B(_ context.Context, o options) ([]table, error) {
	o.logf("the client of E2B is measured on Linux")
	return nil, nil
}
