package fake_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/fake"
)

func newProvider(t *testing.T) *fake.Provider {
	t.Helper()
	p := fake.New(t.TempDir())
	t.Cleanup(func() {
		if err := p.Close(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestConformance(t *testing.T) {
	p := newProvider(t)
	for i, check := range conformance.Checks {
		t.Run(check.Name, func(t *testing.T) {
			t.Parallel()
			if err := check.Run(t.Context(), p, fmt.Sprintf("check-%d-%d", os.Getpid(), i)); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestCommandsReachTheGatewayAndThePathsOfTheSandbox(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "gateway")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				line, _ := bufio.NewReader(c).ReadString('\n')
				fmt.Fprintf(c, "gateway got %s", line)
			}()
		}
	}()
	p := newProvider(t)
	ref, err := p.Create(t.Context(), sandbox.Spec{Key: "gate", Gateway: "unix:" + socket, Deadline: time.Now().Add(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	sb, err := p.Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	cmd := sandbox.Cmd{
		Args: []string{"bash", "-c", `exec 3<>"/dev/tcp/${URL//://}"; echo hello >&3; cat <&3; echo "$FILE" > out; cat "$FILE"`},
		Env:  []string{fmt.Sprintf("URL=127.0.0.1:%d", sandbox.GatewayPort), "FILE=" + sandbox.Workspace + "/out"},
	}
	out, stderr, exit, err := sandbox.Output(t.Context(), sb, "ask", cmd, 4096)
	if err != nil || exit.Code != 0 {
		t.Fatalf("%+v, %v: %s", exit, err, stderr)
	}
	var path string
	if _, err := fmt.Sscanf(string(out), "gateway got hello\n%s", &path); err != nil || filepath.Base(path) != "out" {
		t.Errorf("output %q: %v", out, err)
	}
}
