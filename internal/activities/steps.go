package activities

import (
	"context"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// Each step that a fork is told of stays in its history. What is shown may be
// older, the longer the agent has worked: a fork of two hours is told of
// twenty steps.
const (
	showFirst = 5 * time.Second
	showMost  = 10 * time.Minute
)

// steps is what the fork was told of its agent's progress.
type steps struct {
	step fork.Step
	next time.Time     // when it is told again, if there is news; zero: the agent was not looked at yet
	gap  time.Duration // between the next time and the one after it
}

// showStep tells the fork how far its agent is. What fails is tried again at
// the next step: nothing depends on it.
func (f *follower) showStep(ctx context.Context, now time.Time) {
	s := &f.steps
	if s.next.IsZero() {
		s.next, s.gap = now.Add(showFirst), showFirst
	}
	f.mu.Lock()
	step := fork.Step{Turns: f.sum.Turns, Cost: f.cost, Doing: f.sum.Doing}
	f.mu.Unlock()
	if f.a.Progress == nil || step == s.step || now.Before(s.next) {
		return
	}
	if err := f.a.Progress(ctx, f.in.Spec.Run, f.in.Spec.Num, step); err != nil && ctx.Err() == nil {
		f.about().DebugContext(ctx, "A fork is not told how far its agent is", logs.Error, err)
	}
	s.step = step
	s.gap = min(2*s.gap, showMost)
	s.next = now.Add(s.gap)
}
