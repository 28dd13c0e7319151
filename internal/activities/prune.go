package activities

import (
	"context"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// BaseAge is how long a base is kept that no sandbox is started from. The
// clean-up removes it then; the next run that needs it makes it anew.
const BaseAge = 30 * 24 * time.Hour

// pruneBases removes the bases of this installation that nobody has used for
// long. It is no part of what the clean-up is asked for, so what goes wrong is
// only logged.
func (a *Activities) pruneBases(ctx context.Context) {
	for _, name := range a.Providers.Names() {
		snap, ok := sandbox.As[sandbox.Snapshotter](a.Providers[name])
		if !ok || !ready(ctx, a.Providers[name]) {
			continue
		}
		// What stands on each other goes from the top down, round by round.
		for again := true; again && ctx.Err() == nil; {
			again = false
			bases, err := snap.Bases(ctx)
			if err != nil {
				a.Logger.WarnContext(ctx, "Bases are not pruned", "provider", name, "error", err)
				break
			}
			for _, b := range (sandbox.Retention{Age: BaseAge, Bytes: -1}).Expired(bases, time.Now()) {
				if b.Damaged && time.Since(b.LastUse()) < BaseAge || !sandbox.HasLabels(b.Labels, a.ours()) {
					continue
				}
				err := snap.RemoveBase(ctx, b.Key)
				switch {
				case err == nil:
					again = true
					a.Logger.InfoContext(ctx, "Base removed: nobody has used it for long", "base", b.Key, "provider", name)
				case fault.KindOf(err) != fault.Conflict: // somebody came just now
					a.Logger.WarnContext(ctx, "Base not removed", "base", b.Key, "provider", name, "error", err)
				}
			}
		}
	}
}

// ours are the labels of everything that this installation has made.
func (a *Activities) ours() map[string]string {
	return map[string]string{sandbox.LabelDeployment: a.Deployment, sandbox.LabelNamespace: a.Namespace}
}
