//go:build !linux

package artifact

import "testing"

func smallDisk(t *testing.T, _ string) string {
	t.Skip("needs a tmpfs")
	return ""
}
