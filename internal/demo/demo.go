// Package demo holds what "sandbox-temporal demo" runs with: a small real
// repository with a real bug, the prompt that asks for a fix, and the script
// by which a stand-in for the model fixes it in three different ways.
package demo

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// ScriptName is the key of the demo's script in [Scripts].
const ScriptName = "demo"

// Prompt asks for the bug to be fixed. Its last line names the script that
// the stand-in plays; "@script demo#2" in its place forces the second variant.
const Prompt = `The tests of this repository fail: run go test ./... to see how.
Find the bug, fix it in the code (not in the tests), and make sure that all tests pass.

@script demo`

// Verify is the command that says whether a fork has fixed the bug.
const Verify = "go test ./..."

// Compile is the command that leaves in Go's build cache what the agents'
// commands need, and runs nothing of what it compiled.
const Compile = "go vet ./... && go test -run '^$' ./..."

// Setup is the command that prepares the base which the forks start from: it
// compiles what the tests need once, so that no fork has to. It succeeds.
const Setup = "go test -count=1 ./... >/dev/null 2>&1 || true"

// repo holds the states of the repository, one a folder. Every name ends in
// ".txt": a go.mod would end the embedding, and the Go files are no part of
// this module.
//
//go:embed repo
var repo embed.FS

// history is the repository's, oldest first: each commit lays a folder of
// repo over the state before.
var history = []struct{ layer, date, message string }{
	{"repo/1", "2026-01-05T09:00:00Z", "Add sets of half-open spans"},
	{"repo/2", "2026-01-06T10:30:00Z", "Print and parse sets"},
	{"repo/3", "2026-01-07T16:45:00Z", "Test that a span joins all that it bridges\n\nThe tests fail: the set counts numbers twice."},
}

// WriteRepo writes the demo's repository into dir, which is created when it
// is not there: a clean work tree on the branch "main" with three commits,
// whose ids are always the same. The tests of the last commit fail.
//
// It runs git, without the user's configuration, hooks or identity. A dir that
// holds something is left alone and is an error of kind [fault.Conflict].
func WriteRepo(ctx context.Context, dir string) error {
	const op = "write the demo repository"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return &fault.Error{Op: op, Kind: fault.Invalid, Err: err}
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return &fault.Error{Op: op, Kind: fault.Invalid, Err: err}
	}
	if len(entries) > 0 {
		return fault.New(op, fault.Conflict, "%s is not empty", dir).Hinted("Name a folder that is empty or not there.")
	}
	g := git{dir: dir}
	// "init -b main" wants a newer git than this.
	if err := errors.Join(g.run(ctx, "", "init", "--quiet", "--template="), g.run(ctx, "", "symbolic-ref", "HEAD", "refs/heads/main")); err != nil {
		return fault.Wrap(op, err)
	}
	for _, h := range history {
		if err := layer(dir, h.layer); err != nil {
			return &fault.Error{Op: op, Kind: fault.Unavailable, Err: err}
		}
		if err := g.run(ctx, h.date, "add", "--all"); err != nil {
			return fault.Wrap(op, err)
		}
		if err := g.run(ctx, h.date, "commit", "--quiet", "--message", h.message); err != nil {
			return fault.Wrap(op, err)
		}
	}
	return nil
}

// layer writes the files of one folder of repo into dir.
func layer(dir, from string) error {
	return fs.WalkDir(repo, from, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := repo.ReadFile(name)
		if err != nil {
			return err
		}
		rel := strings.TrimSuffix(strings.TrimPrefix(name, from+"/"), ".txt")
		to := filepath.Join(dir, filepath.FromSlash(path.Clean(rel)))
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			return err
		}
		return os.WriteFile(to, b, 0o644)
	})
}

// A git runs git in one folder, with nothing of the user's environment but
// PATH.
type git struct{ dir string }

func (g git) run(ctx context.Context, date string, args ...string) error {
	cmd := exec.CommandContext(ctx, "git", append([]string{
		"-c", "core.hooksPath=" + os.DevNull, "-c", "commit.gpgSign=false", "-c", "core.autocrlf=false", "-c", "gc.auto=0",
	}, args...)...)
	cmd.Dir = g.dir
	cmd.Env = []string{
		"PATH=" + os.Getenv("PATH"), "LC_ALL=C",
		"HOME=" + g.dir, // git wants one, and there is no .gitconfig in it
		"GIT_CONFIG_NOSYSTEM=1", "GIT_CONFIG_GLOBAL=" + os.DevNull, "GIT_DEFAULT_HASH=sha1",
		"GIT_AUTHOR_NAME=Ada Demo", "GIT_AUTHOR_EMAIL=ada@example.com", "GIT_AUTHOR_DATE=" + date,
		"GIT_COMMITTER_NAME=Ada Demo", "GIT_COMMITTER_EMAIL=ada@example.com", "GIT_COMMITTER_DATE=" + date,
	}
	var stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = io.Discard, &stderr
	err := cmd.Run()
	switch {
	case err == nil:
		return nil
	case errors.Is(err, exec.ErrNotFound):
		return (&fault.Error{Op: "git", Kind: fault.Unsupported, Err: err}).Hinted("Install git.")
	case ctx.Err() != nil:
		return &fault.Error{Op: "git " + args[0], Kind: fault.Cancelled, Err: ctx.Err()}
	}
	return fault.New("git "+args[0], fault.Internal, "%w: %s", err, strings.TrimSpace(stderr.String()))
}
