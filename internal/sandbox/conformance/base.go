package conformance

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// storing is one of the two ways to make a base.
type storing func(snap sandbox.Snapshotter, ctx context.Context, ref sandbox.Ref, key string) error

// withBase freezes a base that fill has made, starting from another one when
// below is not empty, and leaves it there for dropBases.
func withBase(ctx context.Context, p sandbox.Provider, key, below, baseKey string, fill func(sb sandbox.Sandbox) error) error {
	return stored(ctx, p, sandbox.Snapshotter.Freeze, key, below, baseKey, fill)
}

func stored(ctx context.Context, p sandbox.Provider, store storing, key, below, baseKey string, fill func(sb sandbox.Sandbox) error) error {
	s := spec(key)
	s.Base = below
	s.Labels = map[string]string{sandbox.LabelRun: key, sandbox.LabelCommit: "of " + key}
	snap, _ := sandbox.As[sandbox.Snapshotter](p)
	return with(ctx, p, s, func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		if err := fill(sb); err != nil {
			return err
		}
		if err := store(snap, ctx, ref, baseKey); err != nil {
			return failed("store base: %w", err)
		}
		if err := snap.Base(ctx, baseKey); err != nil {
			return failed("base after it was stored: %w", err)
		}
		return nil
	})
}

// dropBases removes the bases of a check, uppermost first, also when ctx is
// done.
func dropBases(ctx context.Context, p sandbox.Provider, err *error, keys ...string) {
	snap, _ := sandbox.As[sandbox.Snapshotter](p)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
	defer cancel()
	for _, key := range keys {
		if removeErr := snap.RemoveBase(ctx, key); removeErr != nil {
			*err = errors.Join(*err, failed("remove base %s: %w", key, removeErr))
		}
	}
}

// findBase looks for a base in the list.
func findBase(ctx context.Context, snap sandbox.Snapshotter, key string) (sandbox.BaseInfo, bool, error) {
	infos, err := snap.Bases(ctx)
	if err != nil {
		return sandbox.BaseInfo{}, false, failed("list bases: %w", err)
	}
	for _, i := range infos {
		if i.Key == key {
			return i, true, nil
		}
	}
	return sandbox.BaseInfo{}, false, nil
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

func freeze(ctx context.Context, p sandbox.Provider, key string) (err error) {
	if !hasBases(p) {
		return nil
	}
	base := key + "-base"
	defer dropBases(ctx, p, &err, base)
	err = withBase(ctx, p, key+"-make", "", base, func(sb sandbox.Sandbox) error {
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

func freezeTwice(ctx context.Context, p sandbox.Provider, key string) (err error) {
	if !hasBases(p) {
		return nil
	}
	base := key + "-base"
	defer dropBases(ctx, p, &err, base)
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
	return storeOnBase(ctx, p, key, sandbox.Snapshotter.Freeze)
}

func snapshotOnBase(ctx context.Context, p sandbox.Provider, key string) error {
	return storeOnBase(ctx, p, key, sandbox.Snapshotter.Snapshot)
}

func storeOnBase(ctx context.Context, p sandbox.Provider, key string, store storing) (err error) {
	if !hasBases(p) {
		return nil
	}
	lower, upper := key+"-lower", key+"-upper"
	defer dropBases(ctx, p, &err, upper, lower)
	err = withBase(ctx, p, key+"-one", "", lower, func(sb sandbox.Sandbox) error {
		_, err := run(ctx, sb, "fill", shell("mkdir dir old && echo 1 > kept && echo 1 > changed && echo 1 > removed && echo 1 > dir/file && echo 1 > old/file"))
		return err
	})
	if err != nil {
		return err
	}
	err = stored(ctx, p, store, key+"-two", lower, upper, func(sb sandbox.Sandbox) error {
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

func snapshot(ctx context.Context, p sandbox.Provider, key string) (err error) {
	snap, ok := sandbox.As[sandbox.Snapshotter](p)
	if !ok {
		return nil
	}
	base := key + "-base"
	defer dropBases(ctx, p, &err, base)
	return with(ctx, p, spec(key), func(ref sandbox.Ref, sb sandbox.Sandbox) error {
		// Each number is in b only when it is in a already.
		count := shell("i=0; while :; do i=$((i+1)); echo $i > .a && mv .a a && echo $i > .b && mv .b b; done")
		if _, err := sb.Start(ctx, "count", count); err != nil {
			return failed("start: %w", err)
		}
		if err := counted(ctx, sb, 3); err != nil {
			return err
		}
		for range 2 { // the second finds the base of the first
			if err := snap.Snapshot(ctx, ref, base); err != nil {
				return failed("snapshot: %w", err)
			}
		}
		if err := sb.Health(ctx); err != nil {
			return failed("the sandbox after the snapshot: %w", err)
		}
		now, err := readCount(ctx, sb, "now")
		if err != nil {
			return err
		}
		if err := counted(ctx, sb, now[0]+3); err != nil {
			return failed("its processes do not go on: %w", err)
		}
		for _, fork := range []string{"-x", "-y"} { // nor does one that starts from it change it
			err := from(ctx, p, key+fork, base, func(sb sandbox.Sandbox) error {
				then, err := readCount(ctx, sb, "look")
				if err != nil {
					return err
				}
				if d := then[0] - then[1]; d < 0 || d > 1 || then[1] < 3 || then[0] > now[0] {
					return failed("the files are not of one moment: %d and %d, and %d soon after", then[0], then[1], now[0])
				}
				return wantOutput(ctx, sb, "write", shell("echo 0 > a; echo 0 > b; cat a b"), "0\n0")
			})
			if err != nil {
				return err
			}
		}
		return nil
	})
}

// counted waits until the counter of snapshot has come to n.
func counted(ctx context.Context, sb sandbox.Sandbox, n int) error {
	tries := 0
	return until(ctx, "the counter goes on", func() (bool, error) {
		tries++
		now, err := readCount(ctx, sb, "count-"+strconv.Itoa(n)+"-"+strconv.Itoa(tries))
		return now[1] >= n, err
	})
}

// readCount returns what a and b hold; 0 while they are not there.
func readCount(ctx context.Context, sb sandbox.Sandbox, id string) (n [2]int, err error) {
	// b first: it is never ahead.
	out, err := run(ctx, sb, id, shell("b=$(cat b 2>&-); a=$(cat a 2>&-); echo ${a:-0} ${b:-0}"))
	if err != nil {
		return n, err
	}
	for i, word := range strings.Fields(out) {
		if n[min(i, 1)], err = strconv.Atoi(word); err != nil {
			return n, failed("the counter holds %q", out)
		}
	}
	return n, nil
}

func listBases(ctx context.Context, p sandbox.Provider, key string) (err error) {
	snap, ok := sandbox.As[sandbox.Snapshotter](p)
	if !ok {
		return nil
	}
	lower, upper := key+"-lower", key+"-upper"
	defer dropBases(ctx, p, &err, upper, lower)
	begun := time.Now().Add(-time.Minute) // clocks of other machines
	fill := func(sb sandbox.Sandbox) error {
		return sb.Upload(ctx, sandbox.Workspace+"/file", strings.NewReader(strings.Repeat("a large file\n", 20_000)))
	}
	if err := withBase(ctx, p, key+"-one", "", lower, fill); err != nil {
		return err
	}
	info, ok, err := findBase(ctx, snap, lower)
	switch {
	case err != nil:
		return err
	case !ok:
		return failed("a base that was just frozen is not listed")
	case info.Labels[sandbox.LabelCommit] != "of "+key+"-one" || info.Created.Before(begun) || info.Created.After(time.Now().Add(time.Minute)):
		return failed("what is listed is of another base: %+v", info)
	case info.Bytes < 100_000 || info.Bytes > 10<<20:
		return failed("a base with a file of 260 kB takes %d bytes", info.Bytes)
	case !info.Used.IsZero() || info.Users != 0 || info.Layers != 1 || info.Damaged:
		return failed("a base that nobody has used yet: %+v", info)
	}
	// The sandbox, and what becomes of it, stand on the base.
	err = stored(ctx, p, sandbox.Snapshotter.Snapshot, key+"-two", lower, upper, func(sandbox.Sandbox) error {
		info, ok, err := findBase(ctx, snap, lower)
		if err == nil && (!ok || info.Users != 1 || info.Used.Before(begun)) {
			err = failed("a base with a sandbox on it: %+v", info)
		}
		return err
	})
	if err != nil {
		return err
	}
	if info, ok, err = findBase(ctx, snap, upper); err != nil || !ok || info.Users != 0 || info.Layers < 1 || info.Layers > 2 {
		return failed("a base on a base: %+v, %w", info, err)
	}
	// One of a single layer was copied, and stands on nothing.
	users := info.Layers - 1
	if info, ok, err = findBase(ctx, snap, lower); err != nil || !ok || info.Users != users {
		return failed("a base with a base on it: %+v, want %d users, %w", info, users, err)
	}
	return nil
}

func removeBase(ctx context.Context, p sandbox.Provider, key string) (err error) {
	snap, ok := sandbox.As[sandbox.Snapshotter](p)
	if !ok {
		return nil
	}
	lower, upper := key+"-lower", key+"-upper"
	defer dropBases(ctx, p, &err, upper, lower)
	fill := func(sb sandbox.Sandbox) error {
		return sb.Upload(ctx, sandbox.Workspace+"/file", strings.NewReader("base"))
	}
	if err := withBase(ctx, p, key+"-one", "", lower, fill); err != nil {
		return err
	}
	inUse := func(what string) error {
		if err := wantKind("remove a base with "+what+" on it", snap.RemoveBase(ctx, lower), fault.Conflict); err != nil {
			return err
		}
		return snap.Base(ctx, lower)
	}
	err = stored(ctx, p, sandbox.Snapshotter.Snapshot, key+"-two", lower, upper, func(sb sandbox.Sandbox) error {
		if err := inUse("a sandbox"); err != nil {
			return err
		}
		return wantFile(ctx, sb, sandbox.Workspace+"/file", "base")
	})
	if err != nil {
		return err
	}
	if info, ok, err := findBase(ctx, snap, upper); err != nil || !ok {
		return failed("a base on a base is not listed: %w", err)
	} else if info.Layers > 1 { // else it was copied, and stands on nothing
		if err := inUse("a base"); err != nil {
			return err
		}
	}
	for _, base := range []string{upper, lower, lower} { // what is gone already is no error
		if err := snap.RemoveBase(ctx, base); err != nil {
			return failed("remove a base that nobody uses: %w", err)
		}
		if err := wantKind("look up a base that was removed", snap.Base(ctx, base), fault.NotFound); err != nil {
			return err
		}
		if _, ok, err := findBase(ctx, snap, base); err != nil || ok {
			return failed("a base that was removed is listed: %v, %w", ok, err)
		}
	}
	return nil
}
