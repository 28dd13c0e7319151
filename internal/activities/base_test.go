package activities

import (
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
)

func TestABaseSaysWhatItWasMadeFrom(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	p := plan(dir, "x")
	var bases []orchestrator.Base
	for _, run := range []string{"sandbox-orch-00000001", "sandbox-orch-00000002"} {
		base, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: p})
		if err != nil {
			t.Fatal(err)
		}
		bases = append(bases, base)
	}
	if !bases[0].Made || bases[1].Made || bases[0].Frozen != bases[1].Frozen || bases[0].Bytes <= 0 || bases[1].Bytes != bases[0].Bytes {
		t.Errorf("%+v", bases)
	}
	infos, err := w.fake.Bases(t.Context())
	if err != nil || len(infos) != 1 {
		t.Fatalf("%+v, %v", infos, err)
	}
	for label, want := range map[string]string{sandbox.LabelRepository: dir, sandbox.LabelBranch: "main", sandbox.LabelCommit: bases[0].Commit, sandbox.LabelRun: "sandbox-orch-00000001", sandbox.LabelDeployment: "d"} {
		if got := infos[0].Labels[label]; got != want {
			t.Errorf("%s: %q, want %q", label, got, want)
		}
	}
	// What else it depends on makes another one.
	for name, change := range map[string]func(p *fork.Plan){
		"setup": func(p *fork.Plan) { p.Setup = "true" },
		"agent": func(p *fork.Plan) { p.Agent, p.AgentCommand = "command", "true" },
		"mount": func(p *fork.Plan) { p.Mounts = []fork.Mount{{Source: dir, Target: "/opt/extra"}} },
	} {
		other := p
		change(&other)
		base, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000003", Plan: other})
		if err != nil || !base.Made || base.Frozen == bases[0].Frozen {
			t.Errorf("%s: %+v, %v", name, base, err)
		}
	}
	// One that is made ahead has no prompt, and is the same.
	p.Prompt = ""
	base, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: fork.PreparePrefix + "1", Plan: p})
	if err != nil || base.Made || base.Frozen != bases[0].Frozen || base.PromptKey != "" {
		t.Errorf("%+v, %v", base, err)
	}
}

// TestTheEndOfALongLogIsShown also has both outputs in it, in their order.
func TestTheEndOfALongLogIsShown(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	p := plan(dir, "x")
	p.Setup = "seq 20000; echo to stderr >&2; echo the last line; printf '\\033[31mred\\n'; exit 7"
	_, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000001", Plan: p})
	if fault.KindOf(err) != fault.Invalid {
		t.Fatalf("%v", err)
	}
	text := err.Error()
	if !strings.Contains(text, "status 7") || !strings.Contains(text, "\n20000\nto stderr\nthe last line\n") || strings.ContainsRune(text, 0x1b) || strings.Contains(text, "\n1000\n") || len(text) > 3000 {
		t.Errorf("%q", text)
	}
	infos, err := w.fake.Bases(t.Context())
	if err != nil || len(infos) > 0 {
		t.Errorf("kept: %+v, %v", infos, err)
	}
	left, err := w.fake.List(t.Context(), nil)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %+v, %v", left, err)
	}
}

// program writes a file that is what it begins with.
func program(t *testing.T, head []byte) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "program")
	if err := os.WriteFile(file, append(head, make([]byte, 100)...), 0o755); err != nil {
		t.Fatal(err)
	}
	return file
}

func elfOf(machine uint16) []byte {
	head := make([]byte, 64)
	copy(head, "\x7fELF\x02\x01\x01")
	binary.LittleEndian.PutUint16(head[18:], machine)
	return head
}

func TestAgentsThatCannotRunAreFoundBeforeTheBaseIsMade(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	other := uint16(183) // aarch64
	if runtime.GOARCH == "arm64" {
		other = 62 // x86-64
	}
	foreign := program(t, elfOf(other))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	mount := func(source, target string) func(*fork.Plan) {
		return func(p *fork.Plan) { p.Mounts = append(p.Mounts, fork.Mount{Source: source, Target: target}) }
	}
	command := func(line string, more ...func(*fork.Plan)) func(*fork.Plan) {
		return func(p *fork.Plan) {
			p.Agent, p.AgentCommand = "command", line
			for _, f := range more {
				f(p)
			}
		}
	}
	for name, row := range map[string]struct {
		change func(*fork.Plan)
		text   string // of the error; "": there is none
	}{
		"a path of another machine":        {func(p *fork.Plan) { p.AgentPath = foreign }, "is a program for"},
		"a path that leads nowhere":        {func(p *fork.Plan) { p.AgentPath = foreign + ".none" }, "is not a program that can be run"},
		"a path of another system":         {func(p *fork.Plan) { p.AgentPath = program(t, []byte("MZ\x90\x00")) }, "Windows"},
		"a mount of another machine":       {command("tool {prompt}", mount(foreign, "/opt/sandbox/bin/tool")), "is a program for"},
		"a mount that is gone":             {mount(foreign+".none", "/opt/x"), "no such file"},
		"a command that is nowhere":        {command("no-such-agent {prompt}"), "there is no program no-such-agent in a sandbox"},
		"a path of the host only":          {command("/root/bin/agent {prompt}"), "there is no program /root/bin/agent in a sandbox"},
		"a path that is not there":         {command("/usr/bin/no-such-agent {prompt}"), "there is no program /usr/bin/no-such-agent"},
		"a script without interpreter":     {command("tool", mount(program(t, []byte("#!/usr/bin/no-such-interpreter -x\n")), "/opt/sandbox/bin/tool")), "is a script for /usr/bin/no-such-interpreter"},
		"a script by env without it":       {command("tool", mount(program(t, []byte("#!/usr/bin/env no-such-interpreter\n")), "/opt/sandbox/bin/tool")), "is a script for no-such-interpreter"},
		"a script":                         {command("tool", mount(program(t, []byte("#!/usr/bin/env sh\n")), "/opt/sandbox/bin/tool")), ""},
		"this machine's own":               {command("tool", mount(self, "/opt/sandbox/bin/tool")), ""},
		"a path in a mounted folder":       {command("/opt/tools/program", mount(filepath.Dir(foreign), "/opt/tools")), "is a program for"},
		"a program of the system":          {command("cat {prompt}"), ""},
		"a word of the shell":              {command("cd . && cat"), ""},
		"a keyword":                        {command("if true; then cat; fi"), ""},
		"what the repository brings":       {command("./agent {prompt}"), ""},
		"what setup brings":                {command("/home/agent/.local/bin/agent {prompt}"), ""},
		"an assignment":                    {command("A=b no-such-agent"), ""},
		"something quoted":                 {command("'no such agent' x"), ""},
		"a file that is no program at all": {mount(program(t, []byte("just text")), "/opt/x"), ""},
	} {
		p := plan(dir, "x")
		row.change(&p)
		_, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: "sandbox-orch-00000001", Plan: p})
		switch {
		case row.text == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case row.text != "" && (fault.KindOf(err) != fault.Unsupported || !strings.Contains(fmt.Sprint(err), row.text) || fault.HintOf(err) == ""):
			t.Errorf("%s: %v (%s), want %q", name, err, fault.HintOf(err), row.text)
		}
	}
}

func FuzzProgramsAreReadWithoutHarm(f *testing.F) {
	f.Add(elfOf(62))
	f.Add([]byte("#!/usr/bin/env -S\n"))
	f.Add([]byte("\x7fELF"))
	f.Add([]byte("#! \x00/\n"))
	f.Fuzz(func(t *testing.T, head []byte) {
		file := filepath.Join(t.TempDir(), "p")
		if err := os.WriteFile(file, head, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := checkProgram(file, "p", nil); err != nil && fault.HintOf(err) == "" {
			t.Errorf("%q: %v", head, err)
		}
	})
}

func TestBasesThatNobodyUsesForLongAreRemovedByTheCleanUp(t *testing.T) {
	t.Parallel()
	w := setUp(t)
	old := time.Now().Add(-BaseAge - time.Hour)
	ours := map[string]string{sandbox.LabelDeployment: "d", sandbox.LabelNamespace: "n"}
	c := &aged{Provider: w.fake, infos: []sandbox.BaseInfo{
		{Key: "old", Created: old, Labels: ours},
		{Key: "used", Created: old, Used: time.Now(), Labels: ours},
		{Key: "in-use", Created: old, Users: 1, Labels: ours},
		{Key: "young", Created: time.Now(), Labels: ours},
		{Key: "damaged-just-now", Created: time.Now(), Damaged: true, Labels: ours},
		{Key: "foreign", Created: old, Labels: map[string]string{sandbox.LabelDeployment: "other", sandbox.LabelNamespace: "n"}},
		{Key: "unlabelled", Created: old},
	}}
	w.Providers = sandbox.NewSet(c)
	in := orchestrator.FindOrphanedSandboxesInput{OrphanRule: rule, DryRun: true}
	dry, err := w.FindOrphanedSandboxes(t.Context(), in)
	if err != nil || len(dry.Stored) != 1 || dry.Stored[0].ID != "old" || dry.Stored[0].Removed || len(c.removed) > 0 {
		t.Fatalf("a dry run: %+v, %v, removed %v", dry.Stored, err, c.removed)
	}
	in.DryRun = false
	if _, err := w.FindOrphanedSandboxes(t.Context(), in); err != nil {
		t.Fatal(err)
	}
	if strings.Join(c.removed, " ") != "old" {
		t.Errorf("removed: %q", c.removed)
	}
}

// aged has bases of other times.
type aged struct {
	sandbox.Provider
	infos   []sandbox.BaseInfo
	removed []string
}

func (a *aged) Base(context.Context, string) error                  { return nil }
func (a *aged) Freeze(context.Context, sandbox.Ref, string) error   { return nil }
func (a *aged) Snapshot(context.Context, sandbox.Ref, string) error { return nil }
func (a *aged) Bases(context.Context) ([]sandbox.BaseInfo, error)   { return slices.Clone(a.infos), nil }
func (a *aged) RemoveBase(_ context.Context, key string) error {
	a.removed = append(a.removed, key)
	a.infos = slices.DeleteFunc(a.infos, func(b sandbox.BaseInfo) bool { return b.Key == key })
	return nil
}

// unfrozen could freeze, and what is behind it does not.
type unfrozen struct{ *fake.Provider }

func (unfrozen) Base(context.Context, string) error {
	return fault.New("", fault.Unsupported, "the service cannot make snapshots").Hinted("It speaks only a part.")
}
func (unfrozen) Freeze(context.Context, sandbox.Ref, string) error {
	panic("it was asked for all the same")
}

func TestWhereNoBaseCanBeKeptEachForkUnpacksTheRepository(t *testing.T) {
	t.Parallel()
	w, dir := setUp(t), t.TempDir()
	if err := newRepo(dir); err != nil {
		t.Fatal(err)
	}
	w.Providers = sandbox.NewSet(unfrozen{w.fake})
	const run = "sandbox-orch-00000001"
	base, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: plan(dir, "x")})
	if err != nil || base.Frozen != "" || base.Bundle == "" {
		t.Fatalf("%+v, %v", base, err)
	}
	spec, ref, err := w.begin(t.Context(), run, plan(dir, "Play @script write"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.HealthCheck(t.Context(), orchestrator.HealthCheckInput{Spec: spec, Ref: ref}); err != nil {
		t.Error(err)
	}
	p := plan(dir, "x")
	p.Setup = "make"
	if _, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: p}); fault.KindOf(err) != fault.Unsupported || !strings.Contains(fault.HintOf(err), "--setup") {
		t.Errorf("with --setup: %v, hint %q", err, fault.HintOf(err))
	}
	if _, err := w.PrepareBase(t.Context(), orchestrator.PrepareBaseInput{Run: run, Plan: plan(dir, "")}); fault.KindOf(err) != fault.Unsupported || fault.HintOf(err) == "" {
		t.Errorf("ahead of all runs: %v, hint %q", err, fault.HintOf(err))
	}
}
