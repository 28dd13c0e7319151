package e2btest_test

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// killedMark is in the environment of a test program that is to be killed.
const killedMark = "E2BTEST_TO_BE_KILLED"

func TestAKilledServerTakesItsProcessesWithIt(t *testing.T) {
	t.Parallel()
	const word = "e2btest-killed-server"
	if os.Getenv(killedMark) != "" {
		b := one(t, e2btest.Options{})
		b.run("setsid sh -c 'while :; do sleep 0.05; done' " + word + " > /dev/null 2>&1 &")
		fmt.Println("\nup")
		select {}
	}
	if err := e2btest.Supported(); err != nil {
		t.Skipf("no sandbox can be made here: %v", err)
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), killedMark+"=1", "TMPDIR="+t.TempDir())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	up := false
	for lines := bufio.NewScanner(out); !up && lines.Scan(); {
		up = lines.Text() == "up"
	}
	if !up || len(naming(t, word)) == 0 {
		t.Error("the program that is to be killed does not run")
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // it was killed
	until(t, "its processes to be gone", func() bool { return len(naming(t, word)) == 0 })
}
