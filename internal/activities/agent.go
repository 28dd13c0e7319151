package activities

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"github.com/sandbox-temporal/sandbox-temporal/internal/agent"
	"github.com/sandbox-temporal/sandbox-temporal/internal/artifact"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

const (
	taskFile   = sandbox.Home + "/.sandbox-task"
	graceOfInt = 1500 * time.Millisecond // an interrupted agent says its last words within this
)

// RunAgent runs the agent to its end: it starts it, or finds the one that an
// earlier call started, follows its output from the first byte, and judges.
// The agent is detached: it outlives the worker, and a worker that stops lets
// it be. When the sandbox is paused it lets the agent be too, and says so.
func (a *Activities) RunAgent(ctx context.Context, in orchestrator.RunAgentInput) (orchestrator.RunAgentOutput, error) {
	ctx, end := a.traceAgent(ctx, in)
	out, err := a.followAgent(ctx, in)
	end(out, err)
	if err != nil && !errors.Is(err, orchestrator.ErrWorkerStopping) && a.isPaused(ctx, in) {
		return orchestrator.RunAgentOutput{Paused: true}, nil
	}
	return out, err
}

func (a *Activities) followAgent(ctx context.Context, in orchestrator.RunAgentInput) (orchestrator.RunAgentOutput, error) {
	f := &follower{a: a, in: in, log: artifact.RunKey(in.Spec.Run, in.Spec.Num, fork.TranscriptName(in.Attempt)), hold: hold{long: heldBefore(ctx)}}
	defer beat(ctx, f.live)()
	ag, err := agent.ByName(in.Spec.Agent)
	if err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	f.agent = ag
	sb, err := a.attach(ctx, in.Ref)
	if err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	defer sb.Close()
	log := a.about(in.Spec.Run, in.Spec.Num, in.Ref.ID).With(logs.Agent, in.Spec.Agent, logs.Attempt, in.Attempt)
	p, found, err := a.startAgent(ctx, sb, ag, in)
	if err != nil {
		log.WarnContext(ctx, "Agent not started", logs.Error, err)
		return orchestrator.RunAgentOutput{}, fault.Wrap("start agent", err)
	}
	if found {
		log.InfoContext(ctx, "Agent found again")
	} else {
		log.InfoContext(ctx, "Agent started", logs.Model, in.Spec.Model)
	}
	f.sandbox = sb
	if !a.hostBound(in.Ref.Provider) {
		f.pace.most = pollAtMost
	}
	why, err := f.follow(ctx, p)
	if errors.Is(err, orchestrator.ErrWorkerStopping) {
		log.InfoContext(ctx, "Agent let go of: it runs on, and whoever comes next follows it")
	}
	if err != nil {
		return orchestrator.RunAgentOutput{}, fault.Wrap("follow agent", err)
	}
	if why == unended {
		return orchestrator.RunAgentOutput{Status: fork.Running, Unended: true, Held: f.hold.long}, nil
	}
	out, err := f.judge(context.WithoutCancel(ctx), p, why)
	if err == nil {
		log.InfoContext(ctx, "Agent ended", logs.Status, string(out.Status), logs.Turns, out.Turns, logs.Cost, out.Usage.Cost.String())
	}
	return out, err
}

// startAgent returns the process of this attempt, started now or found.
func (a *Activities) startAgent(ctx context.Context, sb sandbox.Sandbox, ag agent.Agent, in orchestrator.RunAgentInput) (p sandbox.Process, found bool, err error) {
	id := processID(in.Attempt)
	if p, err := sb.Process(ctx, id); fault.KindOf(err) != fault.NotFound {
		return p, true, err
	}
	// Two processes must not go on with one session: what is left of the
	// attempt before goes first.
	for n := 1; n < in.Attempt; n++ {
		if p, err := sb.Process(ctx, processID(n)); err == nil {
			if err := p.Signal(ctx, sandbox.Kill); err != nil {
				return nil, false, err
			}
		}
	}
	prompt, err := a.Artifacts.Get(ctx, in.Spec.PromptKey)
	if err != nil {
		return nil, false, err
	}
	text, err := io.ReadAll(io.LimitReader(prompt, fork.MaxPrompt))
	_ = prompt.Close()
	if err != nil {
		return nil, false, err
	}
	if err := sb.Upload(ctx, taskFile, bytes.NewReader(text)); err != nil {
		return nil, false, err
	}
	spec := agent.Spec{
		Task: string(text), TaskFile: taskFile, Model: in.Spec.Model, ModelID: a.Gateway.ModelID(in.Spec.Model), Session: session(in.Spec), Resume: in.Attempt > 1,
		Shell: in.Spec.AgentCommand, Patient: in.Spec.OnBudget == fork.OnBudgetPause,
	}
	if err := a.connect(ctx, &spec, in); err != nil {
		return nil, false, err
	}
	if err := ag.Check(spec); err != nil {
		return nil, false, err
	}
	cmd := ag.Command(spec)
	p, err = sb.Start(ctx, id, sandbox.Cmd{Args: cmd.Args, Env: append(a.proxyEnv(in.Spec.Provider), cmd.Env...), Stdin: cmd.Stdin})
	return p, false, err
}

func processID(attempt int) string { return fmt.Sprintf("agent-%d", attempt) }

// session is the id of the agent's conversation, the same for every attempt
// of a fork, and another for every fork.
func session(s fork.Spec) string {
	sum := sha256.Sum256([]byte(s.ID()))
	id, err := uuid.NewRandomFromReader(bytes.NewReader(sum[:]))
	if err != nil {
		panic(err) // 32 bytes are enough for a UUID
	}
	return id.String()
}

// follower reads what an agent prints, into a summary and into the artifact
// store.
type follower struct {
	a     *Activities
	in    orchestrator.RunAgentInput
	agent agent.Agent
	log   string // the transcript's key

	sandbox sandbox.Sandbox
	hold    hold
	steps   steps
	pace    pace

	turns  turns
	before bool // it ran before we followed it
	told   bool // that the artifact store is away

	measured bool // before and stored are known
	lines    agent.Lines
	offset   int64 // bytes read of the agent's output
	stored   int64 // bytes that the transcript held before us

	mu   sync.Mutex // guards what the heartbeat reads
	sum  agent.Summary
	cost fork.USD
	read int64
}

// live is the heartbeat.
func (f *follower) live() fork.Live {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := fork.Live{Phase: "agent", Turns: f.sum.Turns, Cost: f.cost, Action: f.sum.Action, Offset: f.read, Held: f.hold.why, HeldFor: f.hold.long}
	if l.Held != "" {
		l.Action = "waits for more money"
	}
	return l
}

// follow reads until the agent has ended, and says why it was ended, if it
// was us: "" or a status.
func (f *follower) follow(ctx context.Context, p sandbox.Process) (fork.Status, error) {
	for {
		_, ended, err := p.Exit(ctx)
		if err == nil {
			err = f.measure(ctx)
		}
		if err == nil {
			err = f.drain(ctx, p) // after Exit: what was printed before it is there
		}
		if f.away(ctx, err) {
			ended, err = false, nil
		}
		switch {
		case err != nil && ctx.Err() == nil:
			if fault.KindOf(err) == fault.NotFound {
				err = &fault.Error{Kind: fault.Lost, Err: err}
			}
			return "", err
		case err == nil && ended:
			return "", nil
		}
		if err == nil {
			f.tell(ctx)
			f.showStep(ctx, time.Now())
			if f.in.Spec.Credentials == fork.CredentialsDirect && f.denied() {
				// The gateway would have told the agent not to try again. By
				// itself, Claude Code was seen to do so for three minutes.
				return fork.Failed, f.end(ctx, p)
			}
			switch why := f.late(time.Now()); why {
			case "":
			case unended:
				return unended, nil
			default:
				if f.a.isPaused(ctx, f.in) {
					return "", f.letBe(ctx, p)
				}
				return why, f.end(ctx, p)
			}
		}
		select {
		case <-time.After(f.wait(time.Now())):
		case <-stopping(ctx):
			return "", orchestrator.ErrWorkerStopping
		case <-ctx.Done():
			if !cancelAsked(ctx) {
				return "", ctx.Err() // the fork is another worker's now
			}
			if f.a.isPaused(ctx, f.in) {
				return "", f.letBe(ctx, p)
			}
			return fork.Cancelled, f.end(ctx, p)
		}
	}
}

// measure looks, once, how much of the transcript is there already.
func (f *follower) measure(ctx context.Context) error {
	if f.measured {
		return nil
	}
	r, size, err := f.a.Artifacts.ReadLog(ctx, f.log, 0) // only its length
	switch {
	case err == nil:
		_ = r.Close()
		f.stored, f.before = size, size > 0
	case fault.KindOf(err) != fault.NotFound:
		return unstored{err}
	}
	f.measured = true
	return nil
}

// unstored is an error of the artifact store.
type unstored struct{ error }

func (u unstored) Unwrap() error { return u.error }

// away reports whether err says only that the artifact store is not there for
// now, which is no fault of the agent's: it works on, and its output waits in
// the sandbox.
func (f *follower) away(ctx context.Context, err error) bool {
	_, ok := errors.AsType[unstored](err)
	if !ok || fault.KindOf(err) != fault.Unavailable || ctx.Err() != nil {
		return false
	}
	if !f.told {
		f.told = true
		f.a.about(f.in.Spec.Run, f.in.Spec.Num, f.in.Ref.ID).WarnContext(ctx, "The transcript waits for the artifact store", logs.Error, err)
	}
	return true
}

// letBe takes what a paused agent printed before it stood still: nobody reads
// on until it is resumed.
func (f *follower) letBe(ctx context.Context, p sandbox.Process) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	return errors.Join(errPaused, f.drain(ctx, p))
}

// end stops the agent: it may say what it used, and then it is killed.
func (f *follower) end(ctx context.Context, p sandbox.Process) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := p.Signal(ctx, sandbox.Interrupt); err != nil {
		return err
	}
	wait, stop := context.WithTimeout(ctx, graceOfInt)
	defer stop()
	if _, err := p.Wait(wait); err != nil && wait.Err() == nil {
		return err
	}
	if err := p.Signal(ctx, sandbox.Kill); err != nil {
		return err
	}
	if _, err := p.Wait(ctx); err != nil {
		return err
	}
	return f.drain(ctx, p)
}

// drain reads what there is to read.
func (f *follower) drain(ctx context.Context, p sandbox.Process) error {
	pooled := pieces.Get().(*[64 << 10]byte)
	defer pieces.Put(pooled)
	buf := pooled[:]
	for {
		n, err := p.ReadAt(ctx, sandbox.Stdout, buf, f.offset)
		if n > 0 {
			if e := f.take(ctx, buf[:n]); e != nil {
				return e
			}
		}
		if errors.Is(err, io.EOF) || err == nil && n == 0 {
			break
		}
		if err != nil {
			return err
		}
	}
	f.mu.Lock()
	f.read = f.offset
	f.turns.note(ctx, f.sum.Turns, time.Now(), f.before)
	f.mu.Unlock()
	f.look(ctx)
	return nil
}

// take adds a piece of output to the transcript and to the summary.
func (f *follower) take(ctx context.Context, p []byte) error {
	if end := f.offset + int64(len(p)); end > f.stored {
		fresh := p[max(f.stored-f.offset, 0):]
		if err := f.a.Artifacts.Append(ctx, f.log, end-int64(len(fresh)), fresh); err != nil {
			return unstored{err}
		}
		f.stored = end
	}
	f.offset += int64(len(p))
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines.Feed(p, f.line)
	return nil
}

func (f *follower) line(line []byte) {
	for _, e := range f.agent.Decode(line) {
		f.sum.Add(e)
	}
}

// judge says how the agent ended.
func (f *follower) judge(ctx context.Context, p sandbox.Process, why fork.Status) (orchestrator.RunAgentOutput, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lines.Flush(f.line)
	stderr, err := sandbox.ReadAll(ctx, p, sandbox.Stderr, 1<<20)
	if err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	if f.stored > 0 {
		if err := f.a.Artifacts.Seal(ctx, f.log); err != nil {
			return orchestrator.RunAgentOutput{}, err
		}
	}
	if len(stderr) > 0 {
		key := artifact.RunKey(f.in.Spec.Run, f.in.Spec.Num, "stderr-"+processID(f.in.Attempt)+".txt")
		if err := f.a.Artifacts.Put(ctx, key, bytes.NewReader(stderr)); err != nil {
			return orchestrator.RunAgentOutput{}, err
		}
	}
	if err := f.refused(ctx); err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	exit, _, err := p.Exit(ctx)
	if err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	if err := f.repay(ctx); err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	spent, err := f.a.Gateway.Usage(ctx, f.in.Spec.Run, f.in.Spec.Num)
	if err != nil {
		return orchestrator.RunAgentOutput{}, err
	}
	o := f.agent.Judge(f.sum, agent.Clean(lastBytes(stderr, 8<<10)), exit.Code)
	kind := ""
	if (o.Status == fork.Failed || why == fork.Failed) && f.denied() {
		kind, o.Again = string(fault.Denied), false
	}
	switch {
	case why == fork.Failed:
		o.Status, o.Error, o.Hint = fork.Failed, "the model API refuses the key", "Set ANTHROPIC_API_KEY to a key that is valid."
	case why == fork.TimedOut:
		o.Status, o.Error, o.Again = fork.TimedOut, fmt.Sprintf("the fork's time of %s is used up", f.in.Spec.Timeout), false
		o.Hint = "Give it more with --timeout SECONDS."
	case why == fork.Cancelled:
		o.Status, o.Error, o.Hint, o.Again = fork.Cancelled, "the fork was cancelled", "", false
	case o.Status == fork.Failed && exit.Limit != "":
		o.Error, o.Hint = "the agent was ended: "+exceeded(exit.Limit, f.in.Spec.Limits), more(exit.Limit)
		o.Again = false // it would come to the same end
	case o.Status == fork.Failed && spent.Refused > 0:
		// An agent that cannot say why it failed was refused money.
		o.Status, o.Again = fork.BudgetExceeded, false
	}
	short := ""
	if o.Status == fork.BudgetExceeded {
		short = spent.Short
		if short != "" || o.Hint == "" {
			o.Hint = moreMoney(short)
		}
	}
	return orchestrator.RunAgentOutput{
		Status: o.Status, Output: fork.Cut(agent.Clean(o.Text), fork.MaxText), Error: fork.Cut(agent.Clean(o.Error), 4<<10), Hint: o.Hint,
		Turns: o.Turns, Usage: spent.Usage, Again: o.Again, Short: short, ErrorKind: kind, Held: f.hold.long,
	}, nil
}

// refused stores what the sandbox was not let do, for people to read.
func (f *follower) refused(ctx context.Context) error {
	if f.a.Doors == nil {
		return nil
	}
	lines, err := f.a.Doors.Refused(f.in.Spec.Run, f.in.Spec.Num)
	if err != nil || len(lines) == 0 {
		return err
	}
	return f.a.Artifacts.Put(ctx, artifact.RunKey(f.in.Spec.Run, f.in.Spec.Num, fork.RefusedName), bytes.NewReader(lines))
}

// moreMoney says what a user can do about a budget that is used up.
func moreMoney(short string) string {
	switch short {
	case fork.BudgetOfFork:
		return "Give each fork more with --budget-per-fork USD."
	case fork.BudgetOfDay:
		return "The budget of the day begins anew at midnight, UTC; the setting budget_per_day says how much it is."
	}
	return "Give the run more with --budget USD, or let it wait for more with --on-budget pause."
}

func lastBytes(b []byte, n int) string {
	if len(b) > n {
		b = b[len(b)-n:]
	}
	return strings.ToValidUTF8(string(b), "")
}
