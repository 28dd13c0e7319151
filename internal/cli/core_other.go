//go:build !linux

package cli

func dumpNoCore() error { return nil }
