package orchestrator

import (
	"fmt"
	"slices"
	"time"

	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// What a CleanupItem can be.
const (
	KindSandbox = "sandbox"
	KindBase    = "base"   // what sandboxes are started from
	KindBundle  = "bundle" // a commit on its way to sandboxes that start from no base
	KindRun     = "run"    // transcripts, and the repository with the branches, of a run
)

// Bounds of a clean-up. Whatever is left behind there, payloads stay small:
// what does not fit in one page comes in the next, and what does not fit in
// one workflow in the one that it continues as.
const (
	CleanupPage     = 50  // orphans that are looked for at once
	CleanupItems    = 200 // items that the output names; the others are counted
	cleanupPages    = 10  // pages of one workflow
	cleanupProblems = 20  // problems that the output tells
	problemText     = 500 // bytes of one
)

// CleanupGrace is how long after the end of its workflows a sandbox is left
// to those who tidy up after them.
const CleanupGrace = 2 * time.Minute

// Cleanup is one round of the reaper: it removes the sandboxes that belong to
// us, are old enough and are used by no run. A schedule starts it; see
// [Client.StartCleanup]. What cannot be looked at or removed is in its output
// and does not keep it from the rest.
func Cleanup(ctx workflow.Context, in CleanupInput) (CleanupOutput, error) {
	out := CleanupOutput{DryRun: in.DryRun}
	if in.Sofar != nil {
		out = *in.Sofar
	}
	if in.Grace == 0 {
		in.Grace = CleanupGrace
	}
	rule := OrphanRule{MaxAge: in.MaxAge, Grace: in.Grace}
	for range cleanupPages {
		work := ctx
		if in.Queue != "" { // a page goes on where the last one was found
			work = workflow.WithTaskQueue(ctx, in.Queue)
		}
		found, err := attempt(work, finding, FindOrphanedSandboxes, FindOrphanedSandboxesInput{
			OrphanRule: rule, DryRun: in.DryRun, After: in.After, Limit: CleanupPage,
		})
		if err != nil {
			return CleanupOutput{}, failure(err)
		}
		if in.After == "" {
			out.Kept = found.Kept
		}
		in.Queue = found.Queue
		if in.Queue != "" {
			work = workflow.WithTaskQueue(ctx, in.Queue)
		}
		for _, p := range found.Problems {
			out.problem(p)
		}
		for _, item := range found.Stored {
			out.add(item)
		}
		for i, orphan := range found.Orphans {
			item := CleanupItem{Kind: KindSandbox, Provider: orphan.Provider, ID: orphan.Ref.ID, Run: orphan.Run, ForkNum: orphan.Num}
			if i < len(found.Sandboxes) {
				item = found.Sandboxes[i]
			}
			if !in.DryRun {
				remove(work, orphan, &item, &out)
			}
			out.add(item)
		}
		if found.Next == "" {
			return out, nil
		}
		in.After = found.Next
	}
	in.Sofar = &out
	return CleanupOutput{}, workflow.NewContinueAsNewError(ctx, CleanupName, in)
}

func remove(ctx workflow.Context, orphan CleanupSandboxInput, item *CleanupItem, out *CleanupOutput) {
	done, err := attempt(ctx, cleaning, CleanupSandbox, orphan)
	switch {
	case err != nil:
		workflow.GetLogger(ctx).Error("Orphan left behind", logs.Run, orphan.Run, logs.Fork, orphan.Num, logs.Sandbox, orphan.Ref.ID, logs.Error, err)
		item.Kept = fork.Cut(err.Error(), problemText)
		out.problem(fmt.Sprintf("sandbox %s of %s was not removed: %v", orphan.Ref.ID, orphan.Provider, err))
	case done.Kept != "":
		item.Kept = done.Kept
	default:
		item.Removed = true
	}
}

func (o *CleanupOutput) add(item CleanupItem) {
	o.Found++
	if item.Removed {
		o.Removed++
	}
	if len(o.Items) < CleanupItems {
		o.Items = append(o.Items, item)
	}
}

func (o *CleanupOutput) problem(text string) {
	text = fork.Cut(text, problemText)
	if len(o.Problems) < cleanupProblems && !slices.Contains(o.Problems, text) {
		o.Problems = append(o.Problems, text)
	}
}
