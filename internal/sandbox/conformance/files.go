package conformance

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// read downloads a file.
func read(ctx context.Context, sb sandbox.Sandbox, name string) ([]byte, error) {
	f, err := sb.Download(ctx, name)
	if err != nil {
		return nil, failed("download %s: %w", name, err)
	}
	b, err := io.ReadAll(io.LimitReader(f, limit))
	return b, errors.Join(err, f.Close())
}

func wantFile(ctx context.Context, sb sandbox.Sandbox, name, want string) error {
	got, err := read(ctx, sb, name)
	if err != nil {
		return err
	}
	if string(got) != want {
		return failed("%s holds %q, want %q", name, got, want)
	}
	return nil
}

func roundTrip(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		noise := make([]byte, 8<<20)
		source := rand.NewChaCha8([32]byte{1})
		if _, err := source.Read(noise); err != nil {
			return err
		}
		for i, data := range [][]byte{nil, {0}, []byte("\xff\xfe\r\n\x00text"), noise} {
			for _, dir := range []string{sandbox.Workspace, sandbox.Home, "/tmp"} {
				name := fmt.Sprintf("%s/file-%d", dir, i)
				if err := sb.Upload(ctx, name, bytes.NewReader(data)); err != nil {
					return failed("upload %s: %w", name, err)
				}
				got, err := read(ctx, sb, name)
				if err != nil {
					return err
				}
				if !bytes.Equal(got, data) {
					return failed("%s: %d bytes came back of %d, or others", name, len(got), len(data))
				}
			}
		}
		return nil
	})
}

func uploadReplaces(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		name := sandbox.Workspace + "/a/deep/folder/file name"
		for _, text := range []string{"a long first text", "short", ""} {
			if err := sb.Upload(ctx, name, strings.NewReader(text)); err != nil {
				return failed("upload: %w", err)
			}
			if err := wantFile(ctx, sb, name, text); err != nil {
				return err
			}
		}
		err := sb.Upload(ctx, sandbox.Workspace+"/a/deep", strings.NewReader("x"))
		return wantKind("upload over a folder", err, fault.Invalid)
	})
}

// broken reads some bytes and then fails.
type broken struct{ left int }

var errBroken = errors.New("broken off")

func (b *broken) Read(p []byte) (int, error) {
	if b.left == 0 {
		return 0, errBroken
	}
	n := min(len(p), b.left)
	b.left -= n
	return n, nil
}

func uploadBreaksOff(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		old, fresh := sandbox.Workspace+"/old", sandbox.Workspace+"/new"
		if err := sb.Upload(ctx, old, strings.NewReader("whole")); err != nil {
			return failed("upload: %w", err)
		}
		for _, name := range []string{old, fresh} {
			if err := sb.Upload(ctx, name, &broken{1 << 20}); !errors.Is(err, errBroken) {
				return failed("upload that breaks off: %v, want the reader's error", err)
			}
		}
		if err := wantFile(ctx, sb, old, "whole"); err != nil {
			return err
		}
		_, err := sb.Download(ctx, fresh)
		if err := wantKind("download what was not uploaded whole", err, fault.NotFound); err != nil {
			return err
		}
		// What was begun may take a moment to go.
		n := 0
		return until(ctx, "nothing but the whole file is left", func() (bool, error) {
			n++
			out, err := run(ctx, sb, fmt.Sprintf("ls-%d", n), shell("ls -A"))
			return out == "old\n", err
		})
	})
}

func filesMeet(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		if err := sb.Upload(ctx, sandbox.Workspace+"/up", strings.NewReader("from outside")); err != nil {
			return failed("upload: %w", err)
		}
		// The file is the agent's own: it can be changed.
		if err := wantOutput(ctx, sb, "read", shell("cat up; echo more >> up; cat up > down; ln -s down link"), "from outside"); err != nil {
			return err
		}
		if err := wantFile(ctx, sb, sandbox.Workspace+"/down", "from outsidemore\n"); err != nil {
			return err
		}
		return wantFile(ctx, sb, sandbox.Workspace+"/link", "from outsidemore\n")
	})
}

func downloadMissing(ctx context.Context, p sandbox.Provider, key string) error {
	return in(ctx, p, key, func(sb sandbox.Sandbox) error {
		if _, err := run(ctx, sb, "make", shell("mkdir dir && mkfifo pipe && ln -s nowhere dangling && ln -s dir to-dir")); err != nil {
			return err
		}
		kinds := map[string]fault.Kind{
			"not-there": fault.NotFound, "not/there": fault.NotFound, "dangling": fault.NotFound,
			"dir": fault.Invalid, "to-dir": fault.Invalid, "pipe": fault.Invalid,
		}
		for name, kind := range kinds {
			f, err := sb.Download(ctx, sandbox.Workspace+"/"+name)
			if err == nil {
				_ = f.Close()
			}
			if err := wantKind("download "+name, err, kind); err != nil {
				return err
			}
		}
		return nil
	})
}

// mounts is for providers on this host: others show what their template holds.
func mounts(ctx context.Context, p sandbox.Provider, key string) (err error) {
	if _, ok := sandbox.As[sandbox.HostBound](p); !ok {
		return in(ctx, p, key, func(sb sandbox.Sandbox) error {
			out, err := run(ctx, sb, "path", shell(`printf '%s:' "$PATH"`))
			if err == nil && !strings.HasPrefix(out, sandbox.ProgramDir+":") {
				err = failed("PATH is %q and does not begin with %s", out, sandbox.ProgramDir)
			}
			return err
		})
	}
	dir, err := os.MkdirTemp("", "conformance-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// The program has a name that the system has too: ours must be first.
	const text = "#!/bin/sh\necho ours\n"
	program := filepath.Join(dir, "uname")
	if err := errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, []byte(text), 0o755), os.Chmod(program, 0o755)); err != nil {
		return err
	}
	s := spec(key)
	s.Mounts = []sandbox.Mount{
		{Source: program, Target: sandbox.ProgramDir + "/uname"},
		{Source: dir, Target: "/opt/sandbox/share"},
	}
	return with(ctx, p, s, func(_ sandbox.Ref, sb sandbox.Sandbox) error {
		if err := wantOutput(ctx, sb, "ours", sandbox.Cmd{Args: []string{"uname"}}, "ours"); err != nil {
			return failed("a mounted program is not first on the path: %w", err)
		}
		if err := wantOutput(ctx, sb, "shell", shell("uname"), "ours"); err != nil {
			return failed("a mounted program is not first on the shell's path: %w", err)
		}
		for _, name := range []string{sandbox.ProgramDir + "/uname", "/opt/sandbox/share/uname"} {
			if err := wantFile(ctx, sb, name, text); err != nil {
				return err
			}
		}
		if _, err := run(ctx, sb, "spoil", shell(`p=$(command -v uname); (echo spoilt >> "$p"; rm -f "$p"; chmod 777 "$p") 2>/dev/null; true`)); err != nil {
			return err
		}
		now, err := os.ReadFile(program)
		if err != nil || string(now) != text {
			return failed("the host's file was changed through a mount: %q, %v", now, err)
		}
		return nil
	})
}
