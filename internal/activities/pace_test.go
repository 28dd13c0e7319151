package activities

import (
	"slices"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

func TestWhoIsSilentFarAwayIsLookedAtLessOften(t *testing.T) {
	t.Parallel()
	read := []int64{0, 0, 0, 0, 10, 10, 20, 20, 20, 20, 21}
	for name, r := range map[string]struct {
		most time.Duration
		want []int // milliseconds
	}{
		"far away":     {pollAtMost, []int{250, 1000, 2000, 2000, 250, 1000, 250, 1000, 2000, 2000, 250}},
		"on this host": {0, []int{250, 250, 250, 250, 250, 250, 250, 250, 250, 250, 250}},
	} {
		p := pace{most: r.most}
		var got []int
		for _, n := range read {
			got = append(got, int(p.next(n).Milliseconds()))
		}
		if !slices.Equal(got, r.want) {
			t.Errorf("%s: %v, want %v", name, got, r.want)
		}
	}
}

func TestNobodyWaitsBeyondTheTimeOfAFork(t *testing.T) {
	t.Parallel()
	now := time.Now().Round(pollEvery)
	for name, r := range map[string]struct {
		hold        hold
		left, slack time.Duration
		want        time.Duration
	}{
		"far from it":             {hold{}, time.Hour, 0, pollAtMost},
		"near":                    {hold{}, time.Second, 0, time.Second},
		"held for a while before": {hold{long: time.Minute}, time.Second - time.Minute, time.Hour, time.Second},
		"held now":                {hold{why: "no money", at: now.Add(-time.Minute)}, time.Second, time.Hour, pollAtMost},
		"held to the activity's":  {hold{why: "no money", at: now.Add(-time.Minute)}, 0, time.Second, time.Second},
	} {
		f := &follower{in: orchestrator.RunAgentInput{Deadline: now.Add(r.left), Slack: r.slack}, hold: r.hold, pace: pace{most: pollAtMost, wait: pollAtMost}}
		if got := f.wait(now); got != r.want {
			t.Errorf("%s: %v, want %v", name, got, r.want)
		}
		if late := f.late(now.Add(r.want - time.Millisecond)); late != "" {
			t.Errorf("%s: it is %s before", name, late)
		}
	}
}

func TestForksFarAwayAreLookedAtInTheSameMoments(t *testing.T) {
	t.Parallel()
	begun := time.Now().Round(pollEvery)
	for early := -pollEvery / 2; early < pollEvery/2; early += pollEvery / 8 {
		f := &follower{in: orchestrator.RunAgentInput{Deadline: begun.Add(time.Hour)}, pace: pace{most: pollAtMost}}
		if at := begun.Add(early).Add(f.wait(begun.Add(early))); !at.Equal(begun.Add(pollEvery)) {
			t.Errorf("who begins %v later is looked at after %v", early, at.Sub(begun))
		}
	}
}
