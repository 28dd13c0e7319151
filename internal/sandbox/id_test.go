package sandbox

import (
	"strings"
	"testing"
)

func TestIDsAreWhatTheContractSays(t *testing.T) {
	for _, id := range []string{"a", "0", ".", "..", "run-1_a.b", strings.Repeat("x", 64)} {
		if !ValidID(id) {
			t.Errorf("%q is refused", id)
		}
	}
	for _, id := range []string{"", "A", "a/b", "a b", "é", "a\n", "a\x00", strings.Repeat("x", 65)} {
		if ValidID(id) {
			t.Errorf("%q is taken", id)
		}
	}
}
