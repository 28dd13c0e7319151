//go:build noembed

package engine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestBuildWithoutTheServerSaysSo(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	_, err := Start(t.Context(), Options{Dir: dir})
	wantKind(t, err, fault.Unsupported)
	if !strings.Contains(fault.HintOf(err), "TEMPORAL_ADDRESS") {
		t.Errorf("hint %q", fault.HintOf(err))
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Error("the folder was made all the same")
	}
}
