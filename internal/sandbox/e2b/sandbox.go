package e2b

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A box is a connection to one sandbox.
type box struct {
	p     *Provider
	c     *client
	ref   sandbox.Ref
	id    string               // E2B's
	first string               // the deadline that it was made with
	link  atomic.Pointer[envd] // replaced when the token changes

	noRange atomic.Bool // the service sends files whole, whatever is asked for

	mu   sync.Mutex // guards what follows
	end  time.Time  // when E2B ends it, as far as is known; zero: not known
	look time.Time  // when the end is next looked at

	told     atomic.Bool // that the service cannot give it more time
	renewing sync.Mutex  // held by who moves the end
	waking   sync.Mutex  // held by who looks into it while it is paused
}

func (b *box) envd() *envd { return b.link.Load() }

// errPaused is what is met in a sandbox that stands still.
var errPaused = errors.New("the sandbox is paused")

// try has f speak to the sandbox, again when the connection broke and f may be
// done again, and says what became of a sandbox that does not answer.
func (b *box) try(ctx context.Context, again bool, f func() error) error {
	wait := 50 * time.Millisecond
	for n := 1; ; n++ {
		err := f()
		if err == nil || ctx.Err() != nil || errors.Is(err, errNoRange) || untrusted(err) || err == io.EOF { //nolint:errorlint // the end of a file, and not that of a connection
			return err
		}
		switch status := statusOf(err); {
		case status == http.StatusTooManyRequests:
		case status == http.StatusUnauthorized:
			// The token is another after some resumes. It is no good in any
			// other way: an answer that is no Connect.
			if n > 1 {
				return err
			}
		case status >= 400 && status < 500:
			return err
		}
		// E2B's proxy does not tell a sandbox that is gone from one that
		// could not be reached just now. The control plane does.
		m, getErr := b.c.get(ctx, b.id)
		switch {
		case statusOf(getErr) == http.StatusNotFound:
			return fmt.Errorf("%w: %w", gone("", b.ref.ID), err)
		case getErr != nil:
			if ctx.Err() == nil {
				err = errors.Join(err, getErr)
			}
			return err
		case m.State == statePaused:
			return &fault.Error{Kind: fault.Conflict, Err: errPaused, Hint: "Resume it first."}
		}
		if m.Token != "" && m.Token != b.envd().token {
			e := *b.envd()
			e.token = m.Token
			b.link.Store(&e)
		}
		if n == tries || !again {
			return err
		}
		if err := sleep(ctx, wait); err != nil {
			return err
		}
		wait = min(2*wait, 2*time.Second)
	}
}

// script runs one of our scripts to its end. All of them may be run again.
func (b *box) script(ctx context.Context, user, text string, args ...string) (r result, err error) {
	cmd := command{Cmd: "/bin/sh", Args: append([]string{"-c", text, "sh"}, args...), Cwd: "/"}
	err = b.try(ctx, true, func() (err error) {
		r, err = b.envd().run(ctx, user, cmd, b.p.watchdog())
		return err
	})
	return r, err
}

// awake has f look into the sandbox also while it is paused: it is resumed for
// as long as that takes. A user's pause stopped every process of the agent
// before E2B's did, so none goes on meanwhile. One that was paused by nobody
// is not paused again: a crossing of the plan's end was cut off.
func (b *box) awake(ctx context.Context, f func() error) error {
	const long = 15 * time.Minute // whatever happens to us, the next one finds it
	// Who is done pauses it again, which is no good to another who is not.
	b.waking.Lock()
	defer b.waking.Unlock()
	if _, err := b.c.connect(ctx, b.id, min(long, b.c.plan.lifetime)); err != nil {
		return err
	}
	r, err := b.script(ctx, userRoot, "[ -e "+pausedFile+" ]")
	if err != nil {
		return err
	}
	err = f()
	if r.code == 0 {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), callTime)
		defer cancel()
		if pauseErr := b.c.pause(ctx, b.id); statusOf(pauseErr) != http.StatusNotFound {
			err = errors.Join(err, pauseErr)
		}
		return err
	}
	b.forgetEnd()
	return err
}

// reading does what also works in a paused sandbox.
func (b *box) reading(ctx context.Context, f func() error) error {
	err := f()
	if errors.Is(err, errPaused) {
		return b.awake(ctx, f)
	}
	return err
}

// Start launches the command.
func (b *box) Start(ctx context.Context, id string, cmd sandbox.Cmd) (sandbox.Process, error) {
	const op = "e2b: start"
	switch {
	case !sandbox.ValidID(id):
		return nil, fault.New(op, fault.Invalid, "%q is not an id of a process", id)
	case len(cmd.Args) == 0:
		return nil, fault.New(op, fault.Invalid, "there is no command")
	}
	if err := b.keep(ctx); err != nil {
		return nil, asFault(op, err)
	}
	dir := cmd.Dir
	if dir == "" {
		dir = sandbox.Workspace
	}
	proc := b.process(id)
	env, err := environment(cmd.Env)
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	env["RUN"] = runScript
	full := command{Cmd: "/bin/sh", Cwd: "/", Envs: env,
		Args: append([]string{"-c", `PATH=` + sandbox.ProgramDir + `:${ASKED_PATH:-$PATH:/home/user/.local/bin}; export PATH; unset ASKED_PATH; ` + launchScript, "sh", proc.dir, dir, cmd.Stdin}, cmd.Args...)}
	var r result
	err = b.try(ctx, true, func() (err error) {
		r, err = b.envd().run(ctx, userAgentOf, full, b.p.watchdog())
		return err
	})
	switch {
	case err != nil:
		return nil, asFault(op, err)
	case r.code == codeInvalid:
		return nil, fault.New(op, fault.Invalid, "the folder %q or the input %q is not there", dir, cmd.Stdin)
	case r.code != 0:
		return nil, fault.New(op, fault.Unavailable, "the command was not started: status %d: %s", r.code, clean(string(r.stderr), maxErrorText, nil))
	}
	return proc, nil
}

// environment makes a map of what is added to the environment.
func environment(added []string) (map[string]string, error) {
	env := map[string]string{"HOME": sandbox.Home}
	for _, kv := range added {
		k, v, ok := strings.Cut(kv, "=")
		if !ok || k == "" {
			return nil, fault.New("", fault.Invalid, "%q is no variable", k)
		}
		if k == "PATH" {
			k = "ASKED_PATH" // ours is first in any case
		}
		env[k] = v
	}
	return env, nil
}

// Process looks for the folder of the process.
func (b *box) Process(ctx context.Context, id string) (sandbox.Process, error) {
	const op = "e2b: find process"
	if !sandbox.ValidID(id) {
		return nil, fault.New(op, fault.Invalid, "%q is not an id of a process", id)
	}
	p := b.process(id)
	err := b.reading(ctx, func() error {
		return b.try(ctx, true, func() error {
			_, err := b.envd().readAt(ctx, p.dir+"/runner", make([]byte, 1), 0)
			if err == io.EOF { //nolint:errorlint // as in try
				return nil // it is being started
			}
			return err
		})
	})
	if statusOf(err) == http.StatusNotFound && fault.KindOf(err) != fault.NotFound {
		return nil, fault.New(op, fault.NotFound, "no process was started as %q", id)
	}
	if err != nil {
		return nil, asFault(op, err)
	}
	return p, nil
}

// Upload writes a file beside, and then moves it to its place.
func (b *box) Upload(ctx context.Context, name string, r io.Reader) (err error) {
	const op = "e2b: upload"
	if !path.IsAbs(name) || strings.ContainsRune(name, 0) {
		return fault.New(op, fault.Invalid, "%q is no absolute path", name)
	}
	if err := b.keep(ctx); err != nil {
		return asFault(op, err)
	}
	half := uploadDir + "/" + newNonce()
	source := &remembering{r: r}
	// What was read from r is gone: this is done once.
	err = b.try(ctx, false, func() error { return b.envd().upload(ctx, half, source) })
	if err != nil || source.err != nil {
		if source.err != nil {
			err = &fault.Error{Kind: fault.KindOf(source.err), Err: source.err}
		}
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		_, _ = b.script(clean, userAgentOf, `rm -f "$1"`, half) // it is in a folder of ours
		return asFault(op, err)
	}
	res, err := b.script(ctx, userAgentOf, settleScript, half, path.Clean(name))
	switch {
	case err != nil:
		return asFault(op, err)
	case res.code == codeInvalid:
		return fault.New(op, fault.Invalid, "%s is a folder, or is below a file", name)
	case res.code != 0:
		return fault.New(op, fault.Invalid, "%s: %s", name, clean(string(res.stderr), maxErrorText, nil))
	}
	return nil
}

// remembering keeps the error of a reader apart from those of who reads it.
type remembering struct {
	r   io.Reader
	err error
}

func (r *remembering) Read(p []byte) (int, error) {
	n, err := r.r.Read(p)
	if err != nil && !errors.Is(err, io.EOF) {
		r.err = err
	}
	return n, err
}

// uploadPiece is how much of a file is sent at once. What net/http does by
// itself has so small pieces that half of the time goes to their edges.
const uploadPiece = 256 << 10

// WriteTo sends all that is read, in large pieces.
func (r *remembering) WriteTo(w io.Writer) (int64, error) {
	// Neither has a way of its own: the errors have to come by here.
	return io.CopyBuffer(struct{ io.Writer }{w}, struct{ io.Reader }{r}, make([]byte, uploadPiece))
}

// Download reads a file.
func (b *box) Download(ctx context.Context, name string) (io.ReadCloser, error) {
	const op = "e2b: download"
	if !path.IsAbs(name) || strings.ContainsRune(name, 0) {
		return nil, fault.New(op, fault.Invalid, "%q is no absolute path", name)
	}
	var body io.ReadCloser
	err := b.reading(ctx, func() error {
		r, err := b.script(ctx, userAgentOf, lookScript, name)
		switch {
		case err != nil:
			return err
		case r.code == codeNotFound:
			return fault.New("", fault.NotFound, "there is no file %s", name)
		case r.code != 0:
			return fault.New("", fault.Invalid, "%s is no regular file", name)
		}
		return b.try(ctx, true, func() (err error) {
			body, err = b.envd().download(ctx, name)
			return err
		})
	})
	if err != nil {
		return nil, asFault(op, err)
	}
	return body, nil
}

// Health asks envd.
func (b *box) Health(ctx context.Context) error {
	if err := b.keep(ctx); err != nil {
		return asFault("e2b: health", err)
	}
	return asFault("e2b: health", b.try(ctx, true, func() error { return b.envd().health(ctx) }))
}

// Close has nothing to let go of: connections are the client's.
func (b *box) Close() error { return nil }
