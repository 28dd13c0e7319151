package local

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
	_, sb := newSandbox(t, p, s)
	_, alone := newSandbox(t, p, testSpec("nogate"))

	// Nobody there yet: an end, and no answer.
	if out := script(t, sb, "early", ask+"0 || true"); strings.Contains(out, "got") {
		t.Error(out)
	}
	stop := gateway(t, "gateway.sock", "first")
	if out := script(t, sb, "first", ask+"100000"); out != "first got 100006 bytes ending in hello" {
		t.Error(out)
	}
	stop()
	os.Remove(socket)
	gateway(t, "gateway.sock", "second")
	if out := script(t, sb, "second", ask+"0"); out != "second got 6 bytes ending in hello" {
		t.Error(out)
	}
	// Many at once, more than are carried at once.
	out := script(t, sb, "many", fmt.Sprintf("for i in $(seq %d); do %s 10 & done; wait", maxForwards+40, ask))
	if n := strings.Count(out, "second got 16 bytes"); n != maxForwards+40 {
		t.Errorf("%d answers of %d", n, maxForwards+40)
	}
	if out := script(t, alone, "none", ask+"0 || echo refused"); !strings.HasSuffix(out, "refused") {
		t.Errorf("a way out that nobody asked for: %s", out)
	}
}

func TestDestroyEndsConnectionsToTheGateway(t *testing.T) {
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
	if _, err := sb.Start(t.Context(), "open", sandbox.Cmd{Args: []string{"bash", "-c", "exec 3<>/dev/tcp/127.0.0.1/8484; echo hello >&3; sleep 1000"}}); err != nil {
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
	if err := p.Destroy(t.Context(), ref); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); len(b) > 0 {
		t.Errorf("%q, %v", b, err)
	}
}
