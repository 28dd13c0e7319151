package activities

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/sandbox-temporal/sandbox-temporal/internal/orchestrator"
)

// Activities are plain functions: this makes a sandbox, runs a command in it
// and then an agent, without any Temporal. The agent is the built-in one; its
// model is scripted.
func Example() {
	dir, err := os.MkdirTemp("", "act")
	check(err)
	defer os.RemoveAll(dir)
	a, done, err := newWorld(dir)
	check(err)
	defer done()
	source := filepath.Join(dir, "source")
	check(os.Mkdir(source, 0o755))
	check(newRepo(source))

	ctx := context.Background()
	spec, ref, err := a.begin(ctx, "sandbox-orch-00000001", plan(source, "Play @script write")) // prepare_base, create_sandbox
	check(err)

	command, err := a.ExecuteCommand(ctx, orchestrator.ExecuteCommandInput{Ref: ref, ID: "list", Args: []string{"ls"}})
	check(err)
	fmt.Printf("execute_command: %s", command.Stdout)

	run, err := a.RunAgent(ctx, runInput(spec, ref)) // run_claude_agent
	check(err)
	fmt.Printf("run_claude_agent: %s after %d turns: %s\n", run.Status, run.Turns, run.Output)

	work, err := a.CollectResult(ctx, orchestrator.CollectResultInput{Spec: spec, Ref: ref})
	check(err)
	fmt.Printf("collect_result: %s, %d file\n", work.Branch, work.FilesChanged)
	// Output:
	// execute_command: a.txt
	// run_claude_agent: success after 2 turns: I wrote.
	// collect_result: sandbox/sandbox-orch-00000001/1, 1 file
}

func check(err error) {
	if err != nil {
		panic(err)
	}
}
