package gvisor

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// gateway answers every connection with what it was sent, after the caller has
// ended its half.
func gateway(t *testing.T, socket, name string) (stop func()) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				b, err := io.ReadAll(c)
				if err == nil {
					fmt.Fprintf(c, "%s got %d bytes ending in %s", name, len(b), strings.TrimSpace(string(b[max(0, len(b)-6):])))
				}
			}()
		}
	}()
	stop = sync.OnceFunc(func() { l.Close() })
	t.Cleanup(stop)
	return stop
}

// ask sends n bytes and "hello" to the gateway, ends its half and prints what
// comes back.
const ask = `perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new("127.0.0.1:8484") or die; print $s "x" x $ARGV[0], "hello\n"; shutdown($s, 1); print while <$s>; print "\n"' `

func TestTheGatewayIsTheOnlyWayOut(t *testing.T) {
	if sandbox.GatewayPort != 8484 {
		t.Fatal("the scripts here name another port")
	}
	p := newProvider(t)
	// Longer than the address of a socket may be.
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	socket := filepath.Join(dir, "gateway.sock")
	s := testSpec("gate")
	s.Gateway = "unix:" + socket
	ref, sb := newSandbox(t, p, s)
	_, alone := newSandbox(t, p, testSpec("nogate"))

	// Nobody there yet: an end, and no answer.
	if out := script(t, sb, "early", ask+"0 || true"); strings.Contains(out, "got") {
		t.Error(out)
	}
	stop := gateway(t, "gateway.sock", "first")
	if out := script(t, sb, "first", ask+"3000000"); out != "first got 3000006 bytes ending in hello" {
		t.Error(out)
	}
	stop()
	os.Remove(socket)
	gateway(t, "gateway.sock", "second")
	if out := script(t, sb, "second", ask+"0"); out != "second got 6 bytes ending in hello" {
		t.Error(out)
	}
	const many = 40
	out := script(t, sb, "many", fmt.Sprintf("for i in $(seq %d); do %s 10 & done; wait", many, ask))
	if n := strings.Count(out, "second got 16 bytes"); n != many {
		t.Errorf("%d answers of %d", n, many)
	}
	if out := script(t, alone, "none", ask+"0 || echo refused"); !strings.HasSuffix(out, "refused") {
		t.Errorf("a way out that nobody asked for: %s", out)
	}

	// A live fork has the gateway of its own spec, or none.
	gateway(t, "other.sock", "other")
	other := testSpec("fork")
	other.Gateway = "unix:" + filepath.Join(dir, "other.sock")
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{other, testSpec("fork-without")})
	if err != nil || forks[0].Err != nil || forks[1].Err != nil {
		t.Fatal(err, forks)
	}
	if out := script(t, attach(t, p, forks[0].Ref), "fork", ask+"0"); out != "other got 6 bytes ending in hello" {
		t.Error(out)
	}
	if out := script(t, attach(t, p, forks[1].Ref), "fork", ask+"0 || true"); strings.Contains(out, "got") {
		t.Errorf("a way out that nobody asked for: %s", out)
	}
	if out := script(t, sb, "still", ask+"0"); out != "second got 6 bytes ending in hello" {
		t.Error(out)
	}
}

// TestALiveForkLosesTheConnectionsOfItsSandbox holds a connection to the
// gateway over the fork: it goes on in the sandbox, and breaks in the fork.
func TestALiveForkLosesTheConnectionsOfItsSandbox(t *testing.T) {
	p := newProvider(t)
	dir := t.TempDir()
	t.Chdir(dir) // the path as a whole may be too long for an address
	l, err := net.Listen("unix", "g")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	s := testSpec("open")
	s.Gateway = "unix:" + filepath.Join(dir, "g")
	ref, sb := newSandbox(t, p, s)
	const talk = `use IO::Socket::INET; $s = IO::Socket::INET->new("127.0.0.1:8484") or die; $s->autoflush(1); print $s "hello\n"; $n = sysread $s, $l, 100; print defined $n ? "heard $l" : "cut: $!\n"`
	if _, err := sb.Start(t.Context(), "talk", sandbox.Cmd{Args: []string{"perl", "-e", talk}}); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	if line, err := r.ReadString('\n'); line != "hello\n" || err != nil {
		t.Fatalf("%q, %v", line, err)
	}
	fork := testSpec("fork")
	fork.Gateway = s.Gateway
	forks, err := p.ForkLive(t.Context(), ref, []sandbox.Spec{fork})
	if err != nil || forks[0].Err != nil {
		t.Fatal(err, forks)
	}
	for sb, want := range map[*attached]string{attach(t, p, forks[0].Ref): "cut: Connection reset by peer\n", sb: "heard you\n"} {
		if want == "heard you\n" {
			if _, err := c.Write([]byte("you\n")); err != nil {
				t.Fatal(err)
			}
		}
		proc, err := sb.Process(t.Context(), "talk")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := proc.Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
		if out, err := sandbox.ReadAll(t.Context(), proc, sandbox.Stdout, 4096); err != nil || string(out) != want {
			t.Errorf("%q, %v, want %q", out, err, want)
		}
	}
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}
