package cli

import (
	"context"
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// cellar is a provider that has bases and nothing else.
type cellar struct {
	sandbox.Provider
	bases []sandbox.BaseInfo
	below map[string]string // what a base stands on
}

var _ sandbox.Snapshotter = (*cellar)(nil)

func (*cellar) Name() string                                        { return "local" }
func (*cellar) Base(context.Context, string) error                  { return nil }
func (*cellar) Freeze(context.Context, sandbox.Ref, string) error   { return nil }
func (*cellar) Snapshot(context.Context, sandbox.Ref, string) error { return nil }
func (c *cellar) Bases(context.Context) ([]sandbox.BaseInfo, error) {
	return slices.Clone(c.bases), nil
}
func (c *cellar) RemoveBase(_ context.Context, key string) error {
	i := slices.IndexFunc(c.bases, func(b sandbox.BaseInfo) bool { return b.Key == key })
	if i < 0 {
		return nil
	}
	if c.bases[i].Users > 0 {
		return fault.New("remove base", fault.Conflict, "base %s is in use", key).Hinted("Wait.")
	}
	c.bases = slices.Delete(c.bases, i, i+1)
	if j := slices.IndexFunc(c.bases, func(b sandbox.BaseInfo) bool { return b.Key == c.below[key] }); j >= 0 {
		c.bases[j].Users--
	}
	return nil
}

func (c *cellar) keys() (keys []string) {
	for _, b := range c.bases {
		keys = append(keys, b.Key)
	}
	return keys
}

// newCellar has one base of each sort.
func newCellar() *cellar {
	now := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	const day = 24 * time.Hour
	labels := func(repo, commit string) map[string]string {
		return map[string]string{sandbox.LabelRepository: repo, sandbox.LabelBranch: "main", sandbox.LabelCommit: strings.Repeat(commit, 20), sandbox.LabelRun: testRun}
	}
	return &cellar{
		bases: []sandbox.BaseInfo{
			{Key: "base-aaaaaaaa11111111", Labels: labels("https://github.com/user/repo", "a1"), Created: ago(20 * day), Used: ago(time.Hour), Bytes: 1_234_567_890, Layers: 1, Users: 3},
			{Key: "base-bbbbbbbb22222222", Labels: labels("/home/me/\x1b[31mrepo", "b2"), Created: ago(10 * day), Bytes: 5 << 20, Layers: 1, Users: 1},
			{Key: "base-bbbbbbbb33333333", Labels: labels("/home/me/repo", "c3"), Created: ago(9 * day), Used: ago(8 * day), Bytes: 700, Layers: 2},
			{Key: "base-cccccccc44444444", Labels: labels("/home/me/repo", "d4"), Created: ago(2 * time.Hour), Bytes: 30 << 30, Layers: 1},
			{Key: "snapshot", Created: ago(time.Hour), Layers: 1, Damaged: true},
		},
		below: map[string]string{"base-bbbbbbbb33333333": "base-bbbbbbbb22222222"},
	}
}

func withCellar(t *testing.T) (*session, *cellar) {
	t.Helper()
	s, c := newSession(t, newMemory()), newCellar()
	s.env.Providers = func(Globals) (sandbox.Set, error) { return sandbox.NewSet(c), nil }
	s.env.Runs = func(context.Context, Globals) (Runs, error) {
		t.Error("a command about bases asked Temporal")
		return nil, fault.New("", fault.Unreachable, "no")
	}
	return s, c
}

func TestBasesAreListed(t *testing.T) {
	s, c := withCellar(t)
	s.want(t, exitOK, "bases")
	golden(t, "bases.golden", s.out.Bytes())
	table := s.out.String()
	s.want(t, exitOK, "bases", "list")
	if s.out.String() != table {
		t.Errorf("bases list:\n%s", &s.out)
	}
	s.want(t, exitOK, "bases", "-o", "json")
	golden(t, "bases-json.golden", s.out.Bytes())
	c.bases = nil
	s.want(t, exitOK, "bases")
	if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "sandbox-temporal prepare") {
		t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
	}
	s.want(t, exitOK, "bases", "-o", "json")
	if s.out.String() != "[]\n" {
		t.Errorf("%q", &s.out)
	}
	s.want(t, exitUsage, "bases", "lsit")
	if !strings.Contains(s.errors.String(), "Did you mean list?") {
		t.Errorf("%s", &s.errors)
	}
}

func TestPruneRemovesWhatItSaysAndNothingInUse(t *testing.T) {
	for _, row := range []struct {
		args []string
		left []string
	}{
		// The younger of the b's has kept the older one.
		{nil, []string{"base-aaaaaaaa11111111"}},
		{[]string{"--keep-bytes", "100GiB"}, []string{"base-aaaaaaaa11111111", "base-cccccccc44444444"}},
		{[]string{"--keep-bytes", "100GiB", "--older-than", "9d"}, []string{"base-aaaaaaaa11111111", "base-bbbbbbbb22222222", "base-bbbbbbbb33333333", "base-cccccccc44444444"}},
		{[]string{"--older-than", "1000h", "--keep-bytes", "31.15 GiB"}, []string{"base-aaaaaaaa11111111", "base-cccccccc44444444"}},
		{[]string{"--older-than", "1000h", "--keep-bytes", "0"}, []string{"base-aaaaaaaa11111111"}},
		{[]string{"--all"}, []string{"base-aaaaaaaa11111111"}},
		{[]string{"--all", "--dry-run"}, newCellar().keys()},
	} {
		s, c := withCellar(t)
		s.want(t, exitOK, append([]string{"bases", "prune"}, row.args...)...)
		if diff := cmp.Diff(row.left, c.keys()); diff != "" {
			t.Errorf("%q: -want +got:\n%s", row.args, diff)
		}
		if slices.Contains(row.args, "--dry-run") && (!strings.Contains(s.errors.String(), "3 bases would be removed, 30.0 GiB") || !strings.Contains(s.out.String(), "base-bbbbbbbb33333333  700 B")) {
			t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
		}
	}
	s, c := withCellar(t)
	s.want(t, exitOK, "bases", "prune", "--all", "-o", "json")
	var got []struct{ Key string }
	if err := json.Unmarshal(s.out.Bytes(), &got); err != nil || len(got) != 4 || len(c.bases) != 1 {
		t.Errorf("%v: %s", err, &s.out)
	}
	for _, args := range [][]string{{"--older-than", "soon"}, {"--older-than", "-1h"}, {"--older-than", "9999999d"}, {"--keep-bytes", "many"}, {"--keep-bytes", "-1"}, {"--keep-bytes", "0x10"}, {"--keep-bytes", "1e30GB"}, {"--keep-bytes", "5XB"}, {"--all", "--keep-bytes", "1"}, {"extra"}} {
		s.want(t, exitUsage, append([]string{"bases", "prune"}, args...)...)
	}
}

func TestOneBaseIsRemoved(t *testing.T) {
	s, c := withCellar(t)
	s.want(t, exitUsage, "bases", "rm")
	s.want(t, exitUsage, "bases", "rm", "bbbbbbbb") // which of the two?
	s.want(t, exitNotFound, "bases", "rm", "ffff")
	s.want(t, exitNotFound, "bases", "rm", "")
	s.want(t, exitFailed, "bases", "rm", "base-aaaa")
	if !strings.Contains(s.errors.String(), "is in use\nWait.") {
		t.Errorf("%s", &s.errors)
	}
	s.want(t, exitOK, "bases", "rm", "cccc")
	if s.out.String() != "base-cccccccc44444444\n" || len(c.bases) != 4 {
		t.Errorf("%q, %v", &s.out, c.keys())
	}
	s.want(t, exitOK, "__complete", "bases", "rm", "base-")
	if want := "base-bbbbbbbb33333333\t/home/me/repo c3c3c3c3c3c3\n:4\n"; s.out.String() != want {
		t.Errorf("%q, want %q", &s.out, want)
	}
}

func TestSizesAreShownAsTheyAreRead(t *testing.T) {
	for n, want := range map[int64]string{0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1<<20 - 1: "1.0 MiB", 1536 << 20: "1.5 GiB", 20 << 30: "20.0 GiB", 1<<63 - 1: "8.0 EiB"} {
		if got := byteText(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
	for text, want := range map[string]int64{"0": 0, "500MB": 500_000_000, "20GiB": 20 << 30, "1.5 gib": 3 << 29, "7k": 7 << 10} {
		var n int64
		if err := newByteFlag(&n, 1).Set(text); err != nil || n != want {
			t.Errorf("%s: %d, %v, want %d", text, n, err, want)
		}
	}
	for text, want := range map[string]time.Duration{"7d": 7 * 24 * time.Hour, "90m": 90 * time.Minute, "168h": 168 * time.Hour, "0d": 0} {
		var d time.Duration
		if err := newSpanFlag(&d, 1).Set(text); err != nil || d != want {
			t.Errorf("%s: %s, %v, want %s", text, d, err, want)
		}
	}
}

func TestPreparePrintsTheKeyTheSizeAndTheTime(t *testing.T) {
	m := newMemory()
	s := newSession(t, m)
	dir := newRepo(t, "main")
	m.base = orchestrator.Base{Frozen: "base-1", Commit: "c0ffee", Branch: "main", Bytes: 3 << 20, Made: true}
	var lent []string
	s.env.BeforeStart = func(_ context.Context, _ Globals, id string, plan *fork.Plan) error {
		lent = append(lent, id)
		plan.AgentPath = "/found/here"
		return nil
	}
	s.want(t, exitOK, "prepare", dir, "--setup", "make deps", "-b", "main", "--agent", "mini")
	if s.out.String() != "base-1  3.0 MiB  2.0s\n" {
		t.Errorf("%q", &s.out)
	}
	if len(lent) != 1 || !strings.HasPrefix(lent[0], fork.PreparePrefix) {
		t.Errorf("%q", lent)
	}
	want := fork.Plan{Repo: dir, Branch: "main", Provider: "local", Agent: "mini", Setup: "make deps", Egress: "registries", AgentPath: "/found/here"}
	if diff := cmp.Diff(want, m.plans[lent[0]]); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	s.want(t, exitOK, "prepare", dir, "--agent", "mini", "-o", "json")
	if want := "{\n  \"key\": \"base-1\",\n  \"commit\": \"c0ffee\",\n  \"branch\": \"main\",\n  \"bytes\": 3145728,\n  \"made\": true,\n  \"duration_seconds\": 2\n}\n"; s.out.String() != want {
		t.Errorf("%s", &s.out)
	}
	m.base.Made = false
	s.want(t, exitOK, "prepare", dir, "--agent", "mini")
	if !strings.Contains(s.errors.String(), "It was there already.") {
		t.Errorf("%s", &s.errors)
	}
	s.want(t, exitUsage, "prepare")
	s.want(t, exitUsage, "prepare", dir, "--agent", "nobody")
	s.want(t, exitUsage, "prepare", dir, "-b", "a b")
	s.want(t, exitNotFound, "prepare", dir, "-b", "no-such-branch", "--agent", "mini")
	s.want(t, exitNotFound, "prepare", dir+"/nowhere", "--agent", "mini")
	for kind, code := range map[fault.Kind]int{fault.Invalid: exitUsage, fault.Full: exitFailed, fault.Timeout: exitTimeout, fault.Denied: exitDenied, fault.Unreachable: exitUnreachable} {
		m.failure = fault.New("setup", kind, "--setup ended with status 1; the end of its log:\nline one\nline two").Hinted("Try again.")
		s.want(t, code, "prepare", dir, "--agent", "mini")
		if s.out.Len() > 0 || !strings.Contains(s.errors.String(), "line one\nline two\nTry again.\n") {
			t.Errorf("stdout %q, stderr %q", &s.out, &s.errors)
		}
	}
}

func TestInterruptedPrepareSaysThatItGoesOn(t *testing.T) {
	m := newMemory()
	s := newSession(t, m)
	ctx, cancel := context.WithCancel(t.Context())
	s.env.BeforeStart = func(context.Context, Globals, string, *fork.Plan) error {
		cancel()
		m.failure = context.Canceled
		return nil
	}
	s.env.Args = []string{"prepare", newRepo(t, "main"), "--agent", "mini"}
	if code := Main(ctx, s.env); code != exitDetached || !strings.Contains(s.errors.String(), "sandbox-temporal bases") {
		t.Errorf("exit %d: %s", code, &s.errors)
	}
}
