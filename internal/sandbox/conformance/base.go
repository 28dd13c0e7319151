package conformance

import (
	"context"
	"errors"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// withBase freezes a base that fill has made, starting from another one when
// below is not empty, and leaves it there: the contract has no way to remove
// a base, so its key must be new with each run of the checks.
func withBase(ctx context.Context, p sandbox.Provider, key, below, baseKey string, fill func(sb sandbox.Sandbox) error) error {
	s := spec(key)
	s.Base = below
	snap, _ := sandbox.As[sandbox.Snapshotter](p)
	return with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if err := fill(sb); err != nil {
			return err
		}
		if err := snap.Freeze(ctx, ref, baseKey); err != nil {
			return failed("freeze: %w", err)
		}
		if err := snap.Base(ctx, baseKey); err != nil {
			return failed("base after freeze: %w", err)
		}
		return nil
	})
}

// from creates a sandbox from a base.
func from(ctx context.Context, p sandbox.Provider, key, baseKey string, f func(sb sandbox.Sandbox) error) error {
	s := spec(key)
	s.Base = baseKey
	return with(ctx, p, s, func(_ sandbox.Ref, sb sandbox.Sandbox) error { return f(sb) })
}

// hasBases reports whether there is anything to check.
func hasBases(p sandbox.Provider) bool {
	_, ok := sandbox.As[sandbox.Snapshotter](p)
	return ok
}

func baseNotFound(ctx context.Context, p sandbox.Provider, key string) error {
	snap, ok := sandbox.As[sandbox.Snapshotter](p)
	if !ok {
		return nil
	}
	if err := wantKind("base", snap.Base(ctx, key+"-none"), fault.NotFound); err != nil {
		return err
	}
	s := spec(key)
	s.Base = key + "-none"
	ref, err := p.Create(ctx, s)
	if err == nil {
		return errors.Join(failed("a sandbox was made from a base that is not there"), destroy(ctx, p, ref))
	}
	return wantKind("create from a base that is not there", err, fault.NotFound)
}

func freeze(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasBases(p) {
		return nil
	}
	base := key + "-base"
	err := withBase(ctx, p, key+"-make", "", base, func(sb sandbox.Sandbox) error {
		_, err := run(ctx, sb, "fill", shell(`mkdir -p dir "$HOME/.cache" && echo base > dir/file && echo cached > "$HOME/.cache/file" && echo gone > removed && ln -s dir/file link && echo '#!/bin/sh' > tool && chmod 755 tool || exit; while :; do sleep 0.05; done &`))
		return err
	})
	if err != nil {
		return err
	}
	err = from(ctx, p, key+"-a", base, func(a sandbox.Sandbox) error {
		return from(ctx, p, key+"-b", base, func(b sandbox.Sandbox) error {
			if err := wantOutput(ctx, a, "change", shell(`cat link "$HOME/.cache/file" && ./tool && echo a >> dir/file && rm removed && echo new > new && mkdir sub && cat dir/file`), "base\ncached\nbase\na"); err != nil {
				return err
			}
			return wantOutput(ctx, b, "look", shell(`cat dir/file removed; ls; echo b > dir/file; cat link`), "base\ngone\ndir\nlink\nremoved\ntool\nb")
		})
	})
	if err != nil {
		return err
	}
	// Neither has changed the base.
	return from(ctx, p, key+"-c", base, func(c sandbox.Sandbox) error {
		return wantOutput(ctx, c, "look", shell(`cat dir/file removed; ls`), "base\ngone\ndir\nlink\nremoved\ntool")
	})
}

func freezeTwice(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasBases(p) {
		return nil
	}
	base := key + "-base"
	for _, text := range []string{"first", "second"} {
		err := withBase(ctx, p, key+"-"+text, "", base, func(sb sandbox.Sandbox) error {
			return sb.Upload(ctx, sandbox.Workspace+"/file", strings.NewReader(text))
		})
		if err != nil {
			return err
		}
	}
	return from(ctx, p, key+"-look", base, func(sb sandbox.Sandbox) error {
		return wantFile(ctx, sb, sandbox.Workspace+"/file", "first")
	})
}

func freezeOnBase(ctx context.Context, p sandbox.Provider, key string) error {
	if !hasBases(p) {
		return nil
	}
	lower, upper := key+"-lower", key+"-upper"
	err := withBase(ctx, p, key+"-one", "", lower, func(sb sandbox.Sandbox) error {
		_, err := run(ctx, sb, "fill", shell("mkdir dir old && echo 1 > kept && echo 1 > changed && echo 1 > removed && echo 1 > dir/file && echo 1 > old/file"))
		return err
	})
	if err != nil {
		return err
	}
	err = withBase(ctx, p, key+"-two", lower, upper, func(sb sandbox.Sandbox) error {
		_, err := run(ctx, sb, "fill", shell("echo 2 > changed && rm removed && echo 2 > dir/more && rm -r old && mkdir old && echo 2 > old/other"))
		return err
	})
	if err != nil {
		return err
	}
	const look = "ls . dir old; cat kept changed dir/file dir/more old/other"
	const want = ".:\nchanged\ndir\nkept\nold\n\ndir:\nfile\nmore\n\nold:\nother\n1\n2\n1\n2\n2"
	err = from(ctx, p, key+"-three", upper, func(sb sandbox.Sandbox) error { return wantOutput(ctx, sb, "look", shell(look), want) })
	if err != nil {
		return err
	}
	return from(ctx, p, key+"-four", lower, func(sb sandbox.Sandbox) error {
		return wantOutput(ctx, sb, "look", shell("ls . dir old; cat changed removed"), ".:\nchanged\ndir\nkept\nold\nremoved\n\ndir:\nfile\n\nold:\nfile\n1\n1")
	})
}
