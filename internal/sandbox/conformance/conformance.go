// Package conformance is the contract of package sandbox, written so that it
// can fail: each [Check] is one sentence of it, tried on a provider.
//
// The checks return errors and know nothing of package testing. A provider's
// test runs them, and so can a program, against the real thing. They make
// sandboxes of their own, under keys that begin with the key they are given,
// and destroy them whatever happens. Inside they need a POSIX shell, its
// usual companions and a Linux system.
//
// Scripts name files relative to their working directory or through $HOME and
// the like, so that a provider which moves the sandbox's absolute paths
// elsewhere, as package fake does, can be checked too.
package conformance

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A Check is one sentence of the contract.
type Check struct {
	Name string // the sentence

	// Run returns nil when p keeps the promise. The key tells the sandboxes
	// of one run from those of others; it is at most 48 of the characters of
	// a process id, and no two checks that run at once share one.
	Run func(ctx context.Context, p sandbox.Provider, key string) error
}

// Checks is the whole contract. Those of an optional capability pass on a
// provider that does not have it.
var Checks = []Check{
	{"create twice is one sandbox", createTwice},
	{"create twice at once is one sandbox", createAtOnce},
	{"two keys are two sandboxes", twoKeys},
	{"a key can be used again after destroy", keyAgain},
	{"an impossible spec is invalid", createInvalid},

	{"start twice is one process", startTwice},
	{"start twice at once is one process", startAtOnce},
	{"an impossible command is invalid", startInvalid},
	{"a process that was never started is not found", processNotFound},
	{"a program that does not exist exits 127", programNotFound},
	{"the exit code is reported, and stays", exitCode},
	{"the signal that ended a process is reported", exitSignal},
	{"exit and wait tell a running process from one that ended", exitWhileRunning},
	{"the two outputs are kept apart and whole", twoOutputs},
	{"output can be read again from any byte, also after attaching anew", rereadOutput},
	{"reading output never waits", readNeverWaits},
	{"arguments arrive as they are", argumentsArrive},
	{"the environment is added to the sandbox's own", environment},
	{"standard input is a file of the sandbox, or empty", standardInput},
	{"a command runs in the workspace or where it is told to", workingDirectory},
	{"the home is the agent's own", home},
	{"a signal reaches the whole process group", signalGroup},

	{"what was uploaded is downloaded, byte for byte", roundTrip},
	{"an upload replaces a file whole and makes its folders", uploadReplaces},
	{"an upload that breaks off leaves nothing", uploadBreaksOff},
	{"what a process wrote can be downloaded, and what was uploaded read", filesMeet},
	{"a missing file is not found and a folder is invalid", downloadMissing},
	{"mounts are there first on the path, and the host's file cannot be changed", mounts},

	{"a living sandbox is healthy", healthy},
	{"close lets the sandbox live", closeLets},
	{"attach after destroy is not found", attachAfterDestroy},
	{"destroy twice is fine", destroyTwice},
	{"destroy ends running processes", destroyEnds},
	{"list finds by labels, and only those", list},
	{"a deadline destroys the sandbox by itself", deadline},
	{"a deadline can be moved, both ways", moveDeadline},

	{"a base that was never frozen is not found", baseNotFound},
	{"sandboxes start from a base and do not see each other's writes", freeze},
	{"the base that is there first stays", freezeTwice},
	{"a base can be made on a base", freezeOnBase},
	{"a snapshot holds the files of one moment, and its sandbox goes on", snapshot},
	{"a snapshot can be made on a base", snapshotOnBase},
	{"bases are listed with what is known of them", listBases},
	{"a base is removed when nobody stands on it, and not before", removeBase},

	{"a paused sandbox stands still, and goes on from there", pauseStandsStill},
	{"a paused sandbox can be read, attached to and destroyed", pausedWorks},
	{"the deadline of a paused sandbox goes on", pausedDeadline},

	{"a terminal has a size, echoes, and says how its command ended", terminal},
	{"keys on a terminal send signals", terminalKeys},
	{"closing a terminal hangs it up", terminalHangUp},
	{"an impossible command on a terminal is told as one without", terminalNotFound},

	{"a port in the sandbox can be reached, and one where nobody listens is unavailable", dialPort},

	{"limits that no sandbox could live with are invalid", limitsInvalid},
	{"a process that needs too much memory is ended, and says so", memoryLimit},
	{"a fork bomb runs out of processes and the sandbox still answers", processLimit},
	{"a process that writes too much is ended, and says so", diskLimit},
	{"a sandbox gets no more CPU time than it may", cpuLimit},
}

// NewWorker returns the check that needs a second provider of the same host,
// as another worker has: what one made, the other finds by its Ref.
func NewWorker(another func() (sandbox.Provider, error)) Check {
	return Check{"another worker finds the sandbox by its ref", func(ctx context.Context, p sandbox.Provider, key string) error {
		return newWorker(ctx, p, another, key)
	}}
}

// lifetime is the deadline of a sandbox that a check forgets to destroy.
const lifetime = 10 * time.Minute

// limit bounds what is read from a sandbox.
const limit = 32 << 20

// failed makes the error of a check. What a sandbox said is cut: an error is
// for people.
func failed(format string, args ...any) error {
	const most = 400
	for i, a := range args {
		switch v := a.(type) {
		case string:
			args[i] = v[:min(len(v), most)]
		case []byte:
			args[i] = v[:min(len(v), most)]
		}
	}
	return fmt.Errorf(format, args...)
}

// wantKind checks the kind of an error that must be one.
func wantKind(what string, err error, want fault.Kind) error {
	if err == nil {
		return failed("%s: no error, want one of kind %s", what, want)
	}
	if got := fault.KindOf(err); got != want {
		return failed("%s: error of kind %s, want %s: %w", what, got, want, err)
	}
	return nil
}

// spec is what most checks create.
func spec(key string) sandbox.Spec {
	return sandbox.Spec{Key: key, Deadline: time.Now().Add(lifetime)}
}

// with creates a sandbox, runs f in it, and destroys it.
func with(ctx context.Context, p sandbox.Provider, s sandbox.Spec, f func(ref sandbox.Ref, sb sandbox.Sandbox) error) (err error) {
	ref, err := p.Create(ctx, s)
	if err != nil {
		return failed("create %s: %w", s.Key, err)
	}
	defer func() { err = errors.Join(err, destroy(ctx, p, ref)) }()
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return failed("attach %s: %w", s.Key, err)
	}
	return errors.Join(f(ref, sb), sb.Close())
}

// destroy works also when ctx is done.
func destroy(ctx context.Context, p sandbox.Provider, ref sandbox.Ref) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	if err := p.Destroy(ctx, ref); err != nil {
		return failed("destroy %s: %w", ref.ID, err)
	}
	return nil
}

// in makes a check of what happens in one sandbox.
func in(ctx context.Context, p sandbox.Provider, key string, f func(sb sandbox.Sandbox) error) error {
	return with(ctx, p, spec(key), func(_ sandbox.Ref, sb sandbox.Sandbox) error { return f(sb) })
}

// shell is the command that runs a script.
func shell(script string) sandbox.Cmd { return sandbox.Cmd{Args: []string{"sh", "-c", script}} }

// run runs cmd to its end and returns what it said on stdout. An exit code
// other than 0 is an error.
func run(ctx context.Context, sb sandbox.Sandbox, id string, cmd sandbox.Cmd) (string, error) {
	stdout, stderr, exit, err := sandbox.Output(ctx, sb, id, cmd, limit)
	if err != nil {
		return "", failed("run %q: %w", cmd.Args, err)
	}
	if exit.Code != 0 {
		return "", failed("run %q: exit %+v: %s", cmd.Args, exit, stderr)
	}
	return string(stdout), nil
}

// wantOutput runs cmd and compares its stdout, but for the last newline.
func wantOutput(ctx context.Context, sb sandbox.Sandbox, id string, cmd sandbox.Cmd, want string) error {
	got, err := run(ctx, sb, id, cmd)
	if err != nil {
		return err
	}
	if got = strings.TrimSuffix(got, "\n"); got != want {
		return failed("%q said %q, want %q", cmd.Args, got, want)
	}
	return nil
}

// until asks again and again, in steps that grow, until ok or ctx is done.
func until(ctx context.Context, what string, ok func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for step := 2 * time.Millisecond; ; step = min(2*step, 250*time.Millisecond) {
		done, err := ok()
		if err != nil {
			return failed("%s: %w", what, err)
		}
		if done {
			return nil
		}
		select {
		case <-ctx.Done():
			return failed("waited in vain: %s", what)
		case <-time.After(step):
		}
	}
}
