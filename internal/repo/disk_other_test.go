//go:build !linux

package repo

import "testing"

func smallDisk(t *testing.T, _ string) string {
	t.Skip("needs a tmpfs")
	return ""
}
