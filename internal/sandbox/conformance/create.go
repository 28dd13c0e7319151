package conformance

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

func createTwice(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if ref.Provider != p.Name() || ref.ID == "" {
			return failed("the ref says provider %q and id %q", ref.Provider, ref.ID)
		}
		if err := sb.Upload(ctx, sandbox.Workspace+"/first", strings.NewReader("1")); err != nil {
			return failed("upload: %w", err)
		}
		again, err := p.Create(ctx, spec(key))
		if err != nil {
			return failed("create again: %w", err)
		}
		return errors.Join(same(ctx, p, ref, again), holdsFile(ctx, p, again, "first"))
	})
}

// same destroys the second sandbox when it is another one.
func same(ctx context.Context, p sandbox.Provider, first, second sandbox.Ref) error {
	if first == second {
		return nil
	}
	return errors.Join(failed("one key, two refs: %+v and %+v", first, second), destroy(ctx, p, second))
}

// holdsFile looks for a file of the workspace through a new Sandbox.
func holdsFile(ctx context.Context, p sandbox.Provider, ref sandbox.Ref, name string) error {
	sb, err := p.Attach(ctx, ref)
	if err != nil {
		return failed("attach: %w", err)
	}
	defer sb.Close()
	f, err := sb.Download(ctx, sandbox.Workspace+"/"+name)
	if err != nil {
		return failed("the sandbox is not the one that was made first: %w", err)
	}
	return f.Close()
}

func createAtOnce(ctx context.Context, p sandbox.Provider, key string) error {
	const n = 4
	var refs [n]sandbox.Ref
	var errs [n]error
	var all sync.WaitGroup
	for i := range n {
		all.Go(func() { refs[i], errs[i] = p.Create(ctx, spec(key)) })
	}
	all.Wait()
	err := errors.Join(errs[:]...)
	for i := range n {
		if errs[i] != nil {
			continue
		}
		if i > 0 && errs[0] == nil && refs[i] != refs[0] {
			err = errors.Join(err, failed("one key, two refs: %+v and %+v", refs[0], refs[i]))
		}
		err = errors.Join(err, destroy(ctx, p, refs[i]))
	}
	return err
}

func twoKeys(ctx context.Context, p sandbox.Provider, key string) error {
	return with(ctx, p, spec(key+"-a"), func(a sandbox.Ref, sa sandbox.Sandbox) error {
		return with(ctx, p, spec(key+"-b"), func(b sandbox.Ref, sb sandbox.Sandbox) error {
			if a == b {
				return failed("two keys, one ref: %+v", a)
			}
			if err := sa.Upload(ctx, sandbox.Workspace+"/mine", strings.NewReader("a")); err != nil {
				return failed("upload: %w", err)
			}
			_, err := sb.Download(ctx, sandbox.Workspace+"/mine")
			return wantKind("download what is in another sandbox", err, fault.NotFound)
		})
	})
}

func keyAgain(ctx context.Context, p sandbox.Provider, key string) error {
	var old sandbox.Ref
	err := with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		old = ref
		return sb.Upload(ctx, sandbox.Workspace+"/old", strings.NewReader("old"))
	})
	if err != nil {
		return err
	}
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if ref == old {
			return failed("the ref is that of the sandbox before: %+v", ref)
		}
		_, err := sb.Download(ctx, sandbox.Workspace+"/old")
		if err := wantKind("download what was in the sandbox before", err, fault.NotFound); err != nil {
			return err
		}
		_, err = p.Attach(ctx, old)
		if err := wantKind("attach to the sandbox before", err, fault.NotFound); err != nil {
			return err
		}
		if err := p.Destroy(ctx, old); err != nil {
			return failed("destroy the sandbox before once more: %w", err)
		}
		if err := sb.Health(ctx); err != nil {
			return failed("destroying the sandbox before hurt its successor: %w", err)
		}
		return nil
	})
}

func createInvalid(ctx context.Context, p sandbox.Provider, key string) error {
	timeless := spec(key)
	timeless.Deadline = time.Time{}
	specs := map[string]sandbox.Spec{
		"no key": spec(""), "a path as key": spec("../" + key), "a capital": spec("A" + key),
		"a long key": spec(strings.Repeat("x", 65)), "no deadline": timeless,
	}
	for what, s := range specs {
		ref, err := p.Create(ctx, s)
		if err == nil {
			return errors.Join(failed("%s: a sandbox was made", what), destroy(ctx, p, ref))
		}
		if err := wantKind(what, err, fault.Invalid); err != nil {
			return err
		}
	}
	return nil
}

func newWorker(ctx context.Context, p sandbox.Provider, another func() (sandbox.Provider, error), key string) error {
	s := spec(key)
	s.Labels = map[string]string{sandbox.LabelRun: key}
	return with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if _, err := sb.Start(ctx, "long", shell("echo before; while [ ! -e go ]; do sleep 0.02; done; echo after; exit 5")); err != nil {
			return failed("start: %w", err)
		}
		q, err := another()
		if err != nil {
			return failed("make another provider: %w", err)
		}
		// From here on only the other worker acts.
		again, err := q.Create(ctx, s)
		if err != nil {
			return failed("create again: %w", err)
		}
		if again != ref {
			return errors.Join(failed("one key, two refs: %+v and %+v", ref, again), destroy(ctx, q, again))
		}
		other, err := q.Attach(ctx, ref)
		if err != nil {
			return failed("attach: %w", err)
		}
		defer other.Close()
		proc, err := other.Process(ctx, "long")
		if err != nil {
			return failed("find process: %w", err)
		}
		if err := other.Upload(ctx, sandbox.Workspace+"/go", strings.NewReader("")); err != nil {
			return failed("upload: %w", err)
		}
		exit, err := proc.Wait(ctx)
		if err != nil || exit != (sandbox.Exit{Code: 5}) {
			return failed("wait: %+v, %v, want exit code 5", exit, err)
		}
		out, err := sandbox.ReadAll(ctx, proc, sandbox.Stdout, limit)
		if err != nil || string(out) != "before\nafter\n" {
			return failed("output %q, %v", out, err)
		}
		infos, err := q.List(ctx, s.Labels)
		if err != nil || len(infos) != 1 || infos[0].Ref != ref {
			return failed("list: %+v, %v", infos, err)
		}
		if err := q.Destroy(ctx, ref); err != nil {
			return failed("destroy: %w", err)
		}
		_, err = p.Attach(ctx, ref)
		return wantKind("attach after the other worker destroyed it", err, fault.NotFound)
	})
}
