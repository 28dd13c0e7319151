package activities

import (
	"context"
	"log/slog"
	"strconv"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// about returns the logger for what happens to a fork, or with a num of 0 to a
// base; an empty id is that of no sandbox yet.
func (a *Activities) about(run string, num int, id string) *slog.Logger {
	log := a.Logger.With(logs.Run, run, logs.Fork, num)
	if id != "" {
		log = log.With(logs.Sandbox, id)
	}
	return log
}

// create makes a sandbox, fills it when there is something to fill it with,
// and takes down what came of it.
func (a *Activities) create(ctx context.Context, p sandbox.Provider, spec sandbox.Spec, fill func(sandbox.Ref) error) (sandbox.Ref, error) {
	began := time.Now()
	ref, err := p.Create(ctx, spec)
	if err == nil && fill != nil {
		err = fill(ref)
	}
	took := time.Since(began)
	a.Metrics.SandboxCreated(p.Name(), took, err)
	num, _ := strconv.Atoi(spec.Labels[sandbox.LabelFork]) // 0: a base
	log := a.about(spec.Labels[sandbox.LabelRun], num, ref.ID).With(logs.Provider, p.Name(), logs.Took, took.Seconds())
	if err != nil {
		log.WarnContext(ctx, "Sandbox not created", logs.Error, err)
		return sandbox.Ref{}, err
	}
	log.InfoContext(ctx, "Sandbox created")
	return ref, nil
}

// ended says how a fork ended.
func (a *Activities) ended(ctx context.Context, in orchestrator.RecordMetricsInput) {
	r := in.Result
	log := a.Logger
	if in.Run != "" { // a run of an older version does not say whose it is
		log = a.about(in.Run, r.ForkNum, r.SandboxID)
	}
	level := slog.LevelInfo
	if r.Status != fork.Success && r.Status != fork.Cancelled {
		level = slog.LevelWarn
	}
	log.Log(ctx, level, "Fork ended", logs.Status, string(r.Status), logs.Model, r.Model, logs.Agent, r.Agent, logs.Cost, r.Cost.String(),
		logs.Turns, r.NumTurns, logs.Took, r.Duration)
}

func (f *follower) about() *slog.Logger {
	return f.a.about(f.in.Spec.Run, f.in.Spec.Num, f.in.Ref.ID)
}
