package orchestrator

import (
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
)

// Cleanup is one round of the reaper: it removes the sandboxes that belong to
// us, are old enough and are used by no run. A schedule starts it; see
// [Client.StartCleanup].
func Cleanup(ctx workflow.Context, in CleanupInput) (CleanupOutput, error) {
	found, err := attempt(ctx, finding, FindOrphanedSandboxes, FindOrphanedSandboxesInput(in))
	if err != nil {
		return CleanupOutput{}, failure(err)
	}
	out := CleanupOutput{Found: len(found.Orphans)}
	for _, orphan := range found.Orphans {
		if _, err := attempt(ctx, cleaning, CleanupSandbox, orphan); err != nil {
			workflow.GetLogger(ctx).Error("Orphan left behind", logs.Run, orphan.Run, logs.Fork, orphan.Num, logs.Sandbox, orphan.Ref.ID, logs.Error, err)
			continue
		}
		out.Removed++
	}
	return out, nil
}
