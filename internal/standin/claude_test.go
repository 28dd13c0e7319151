package standin_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/standin"
)

// realClaude returns the Claude Code program, or skips the test.
func realClaude(t *testing.T) string {
	t.Helper()
	if p := os.Getenv("SANDBOX_TEMPORAL_CLAUDE"); p != "" {
		return p
	}
	if p, err := exec.LookPath("claude"); err == nil {
		return p
	}
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		up := filepath.Dir(dir)
		if up == dir {
			break
		}
		dir = up
	}
	p := filepath.Join(dir, "tests", "node_modules", "@anthropic-ai", "claude-code-linux-x64", "claude")
	if _, err := os.Stat(p); err != nil {
		t.Skip("the real Claude Code is not installed: set SANDBOX_TEMPORAL_CLAUDE, or run npm install --prefix tests @anthropic-ai/claude-code")
	}
	return p
}

// A session is one run of the real Claude Code.
type session struct {
	claude string
	url    string
	dir    string // working directory
	id     string
	prompt string
	model  string
	resume bool
	env    []string
	home   string // kept between runs of one session
}

type claudeEnd struct {
	code   int
	events []map[string]any
	result map[string]any
	stderr string
}

// run plays the session, or fails the test.
func (s session) run(t *testing.T) claudeEnd {
	t.Helper()
	end, err := s.try(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return end
}

func (s session) try(ctx context.Context) (claudeEnd, error) {
	ctx, cancel := context.WithTimeout(ctx, 90*time.Second)
	defer cancel()
	args := []string{"-p", s.prompt, "--output-format", "stream-json", "--verbose", "--model", s.model, "--dangerously-skip-permissions"}
	if s.resume {
		args = append(args, "--resume", s.id)
	} else {
		args = append(args, "--session-id", s.id)
	}
	cmd := exec.CommandContext(ctx, s.claude, args...)
	cmd.Dir = s.dir
	cmd.WaitDelay = 5 * time.Second
	cmd.Env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + s.home, "CLAUDE_CONFIG_DIR=" + filepath.Join(s.home, "claude"), "CLAUDE_CODE_TMPDIR=" + s.home, "IS_SANDBOX=1",
		"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1", "DISABLE_AUTOUPDATER=1",
		"ANTHROPIC_BASE_URL=" + s.url, "ANTHROPIC_API_KEY=good-key-of-the-test", "CLAUDE_CODE_MAX_OUTPUT_TOKENS=32000",
	}, s.env...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState == nil {
		return claudeEnd{}, fmt.Errorf("claude did not start: %w", err)
	}
	end := claudeEnd{code: cmd.ProcessState.ExitCode(), stderr: stderr.String()}
	for line := range strings.Lines(stdout.String()) {
		var e map[string]any
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			return claudeEnd{}, fmt.Errorf("claude wrote %q: %w", line, err)
		}
		end.events = append(end.events, e)
		if e["type"] == "result" {
			end.result = e
		}
	}
	if end.result == nil {
		return claudeEnd{}, fmt.Errorf("claude gave no result: exit %d, %s\n%s", end.code, stderr.String(), stdout.String())
	}
	return end, nil
}

func (e claudeEnd) cost() float64 {
	c, _ := e.result["total_cost_usd"].(float64)
	return c
}

func (e claudeEnd) retries() int {
	n := 0
	for _, ev := range e.events {
		if ev["subtype"] == "api_retry" {
			n++
		}
	}
	return n
}

func serve(t *testing.T, opts standin.Options) (*standin.Server, string) {
	t.Helper()
	s := standin.New(opts)
	h := httptest.NewServer(http.Handler(s))
	t.Cleanup(h.Close)
	t.Cleanup(s.Close) // before h.Close, which waits for the calls in flight
	return s, h.URL
}

// price is the list price of claude-sonnet-5-5 in dollars, as Claude Code
// 2.1.330 has it: per million tokens 2 in, 10 out, 2.50 written for five
// minutes, 4 for an hour, 0.10 read.
func price(rs []standin.Request) float64 {
	var usd float64
	for _, r := range rs {
		u := r.Usage
		usd += (2*float64(u.Input) + 10*float64(u.Output) + 2.5*float64(u.Creation.FiveMinutes) + 4*float64(u.Creation.OneHour) + 0.1*float64(u.CacheRead)) / 1e6
	}
	return usd
}

func uuid(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

var touch = standin.Script{Steps: []standin.Step{
	{Text: "I write a file.", Tools: []standin.Tool{{Name: "Bash", Input: json.RawMessage(`{"command":"echo done >out.txt","description":"Write a file"}`)}}},
	{Text: "The file is written."},
}}

func withFault(s standin.Script, step int, f standin.Fault) standin.Script {
	steps := append([]standin.Step(nil), s.Steps...)
	steps[step].Faults = []standin.Fault{f}
	return standin.Script{Steps: steps}
}

func TestClaudeCodePlaysAScriptAndAgreesOnTheCost(t *testing.T) {
	claude := realClaude(t)
	rows := []struct {
		name    string
		script  standin.Script
		calls   int
		retries int
	}{
		{"plain", touch, 2, 0},
		{"overloaded once", withFault(touch, 0, standin.Fault{Kind: standin.FaultStatus, Status: 529, Headers: map[string]string{"retry-after-ms": "10"}}), 3, 1},
		{"limited once", withFault(touch, 1, standin.Fault{Kind: standin.FaultStatus, Status: 429, Headers: map[string]string{"retry-after-ms": "10"}}), 3, 1},
	}
	for _, row := range rows {
		t.Run(row.name, func(t *testing.T) {
			s, url := serve(t, standin.Options{Scripts: map[string]standin.Script{"touch": row.script}, Keys: []string{"good-key-of-the-test"}})
			dir := t.TempDir()
			end := session{claude: claude, url: url, dir: dir, home: t.TempDir(), id: uuid(1), model: "sonnet", prompt: "Please do this: @script touch"}.run(t)
			if end.code != 0 || end.result["result"] != "The file is written." || end.result["is_error"] != false {
				t.Errorf("exit %d, %v\n%s", end.code, end.result, end.stderr)
			}
			if b, err := os.ReadFile(filepath.Join(dir, "out.txt")); err != nil || string(b) != "done\n" {
				t.Errorf("the tool was not run: %q, %v", b, err)
			}
			rs := s.Requests()
			if len(rs) != row.calls || end.retries() != row.retries {
				t.Errorf("%d calls, %d retries: %+v", len(rs), end.retries(), rs)
			}
			if want := price(rs); want == 0 || math.Abs(end.cost()-want) > 1e-12 {
				t.Errorf("Claude Code reckons $%v, the stand-in $%v", end.cost(), want)
			}
		})
	}
}

func TestClaudeCodeRecoversFromABrokenStream(t *testing.T) {
	claude := realClaude(t)
	for _, f := range []standin.Fault{
		{Kind: standin.FaultCut, After: 4},
		{Kind: standin.FaultError, After: 4},
	} {
		t.Run(string(f.Kind), func(t *testing.T) {
			s, url := serve(t, standin.Options{Scripts: map[string]standin.Script{"touch": withFault(touch, 0, f)}})
			dir := t.TempDir()
			end := session{claude: claude, url: url, dir: dir, home: t.TempDir(), id: uuid(2), model: "sonnet", prompt: "@script touch"}.run(t)
			if end.code != 0 || end.result["result"] != "The file is written." {
				t.Errorf("exit %d, %v\n%s", end.code, end.result, end.stderr)
			}
			if _, err := os.Stat(filepath.Join(dir, "out.txt")); err != nil {
				t.Error(err)
			}
			rs := s.Requests()
			if len(rs) != 3 || rs[0].Outcome != standin.Broken {
				t.Errorf("%+v", rs)
			}
			// Claude Code may or may not count the broken call, and guesses
			// the tokens of what it got to read of it.
			const guess = 100 * 10 / 1e6
			if least, most := price(rs[1:]), price(rs)+guess; end.cost() < least-1e-12 || end.cost() > most+1e-12 {
				t.Errorf("Claude Code reckons $%v, the stand-in $%v to $%v", end.cost(), least, most)
			}
		})
	}
}

func TestParallelSessionsOfClaudeCodeDoNotDisturbEachOther(t *testing.T) {
	claude := realClaude(t)
	steps := func(n int) []standin.Step {
		return []standin.Step{
			{Tools: []standin.Tool{{Name: "Bash", Input: json.RawMessage(fmt.Sprintf(`{"command":"echo %d >out.txt"}`, n))}}},
			{Text: fmt.Sprintf("variant %d", n)},
		}
	}
	s, url := serve(t, standin.Options{Scripts: map[string]standin.Script{"vary": {Variants: [][]standin.Step{steps(1), steps(2), steps(3)}}}})
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen, total := map[string]int{}, 0.0
	for i := range 3 {
		dir, home := t.TempDir(), t.TempDir()
		wg.Go(func() {
			end, err := session{claude: claude, url: url, dir: dir, home: home, id: uuid(10 + i), model: "sonnet", prompt: "@script vary"}.try(t.Context())
			if err != nil {
				t.Error(err)
				return
			}
			b, err := os.ReadFile(filepath.Join(dir, "out.txt"))
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			seen[fmt.Sprintf("variant %s", bytes.TrimSpace(b))]++
			if end.result["result"] != fmt.Sprintf("variant %s", bytes.TrimSpace(b)) {
				t.Errorf("wrote %s, said %v", b, end.result["result"])
			}
			total += end.cost()
		})
	}
	wg.Wait()
	if len(seen) != 3 {
		t.Errorf("variants were played as %v", seen)
	}
	if want := price(s.Requests()); math.Abs(total-want) > 1e-12 {
		t.Errorf("together they reckon $%v, the stand-in $%v", total, want)
	}
}

func TestClaudeCodeResumesWhereTheScriptStands(t *testing.T) {
	claude := realClaude(t)
	script := withFault(touch, 1, standin.Fault{Kind: standin.FaultStatus, Status: 402})
	_, url := serve(t, standin.Options{Scripts: map[string]standin.Script{"touch": script}})
	run := session{claude: claude, url: url, dir: t.TempDir(), home: t.TempDir(), id: uuid(20), model: "sonnet", prompt: "@script touch"}
	if end := run.run(t); end.code != 1 || end.result["api_error_status"] != 402.0 {
		t.Fatalf("exit %d, %v", end.code, end.result)
	}
	run.resume, run.prompt = true, "Continue where you left off."
	if end := run.run(t); end.code != 0 || end.result["result"] != "The file is written." {
		t.Errorf("exit %d, %v", end.code, end.result)
	}
}
