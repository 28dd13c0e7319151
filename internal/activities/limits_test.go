package activities

import (
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func TestEveryLimitThatEndsACommandNamesTheFlagThatRaisesIt(t *testing.T) {
	asked := fork.Limits{MemoryBytes: 3 << 30, DiskBytes: 20e9}
	for limit, want := range map[sandbox.Limit][2]string{
		sandbox.MemoryLimit: {"3GiB", "--memory"},
		sandbox.DiskLimit:   {"20GB", "--disk"},
	} {
		err := limitFault("op", sandbox.Exit{Code: 137, Signal: "KILL", Limit: limit}, asked)
		if fault.KindOf(err) != fault.Invalid || !strings.Contains(err.Error(), want[0]) || !strings.Contains(fault.HintOf(err), want[1]) {
			t.Errorf("%s: %v (%s)", limit, err, fault.HintOf(err))
		}
		// The provider's own limit is not the user's number.
		if text := exceeded(limit, fork.Limits{}); strings.ContainsAny(text, "0123456789") {
			t.Errorf("%s: %s", limit, text)
		}
	}
	if err := limitFault("op", sandbox.Exit{Code: 137, Signal: "KILL"}, asked); err != nil {
		t.Errorf("a kill that no limit asked for: %v", err)
	}
}
