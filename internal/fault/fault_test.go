package fault

import (
	"errors"
	"fmt"
	"io"
	"testing"
)

func TestKindAndHintAreFoundThroughEveryWrapper(t *testing.T) {
	inner := New("git: fetch", Denied, "remote said: %w", io.EOF).Hinted("Set %s.", "GITHUB_TOKEN")
	err := Wrap("prepare base", fmt.Errorf("third try: %w", inner))
	if got := KindOf(err); got != Denied {
		t.Errorf("kind %q, want %q", got, Denied)
	}
	if got := HintOf(err); got != "Set GITHUB_TOKEN." {
		t.Errorf("hint %q", got)
	}
	if !errors.Is(err, io.EOF) {
		t.Error("the cause is lost")
	}
	if got, want := err.Error(), "prepare base: third try: git: fetch: remote said: EOF"; got != want {
		t.Errorf("text %q, want %q", got, want)
	}
}

func TestKindOfWhatIsNotOurs(t *testing.T) {
	if KindOf(nil) != "" || KindOf(io.EOF) != Internal || HintOf(io.EOF) != "" {
		t.Errorf("nil %q, EOF %q", KindOf(nil), KindOf(io.EOF))
	}
	if Wrap("x", nil) != nil {
		t.Error("wrapping nothing made an error")
	}
	if got := (&Error{Op: "pay", Kind: OverBudget}).Error(); got != "pay: over budget" {
		t.Errorf("text without cause %q", got)
	}
}

func TestOnlyPassingTroubleIsRetried(t *testing.T) {
	for _, k := range []Kind{Invalid, NotFound, Denied, Unsupported, OverBudget, Timeout, Lost, Cancelled, Conflict, Full} {
		if k.Retryable() {
			t.Errorf("%s would be retried", k)
		}
	}
	if !Unavailable.Retryable() || !Internal.Retryable() {
		t.Error("passing trouble would not be retried")
	}
}

func TestDistanceCountsEdits(t *testing.T) {
	for _, row := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"main", "main", 0}, {"main", "mian", 2}, {"fork", "forks", 1}, {"", "abc", 3}, {"kitten", "sitting", 3}} {
		if got := Distance(row.a, row.b); got != row.want || Distance(row.b, row.a) != got {
			t.Errorf("%q to %q: %d, want %d", row.a, row.b, got, row.want)
		}
	}
}
