package engine

import (
	"net"
	"strconv"
	"strings"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func wantKind(t *testing.T, err error, kind fault.Kind) {
	t.Helper()
	if err == nil || fault.KindOf(err) != kind {
		t.Fatalf("got %v (%s), want %s", err, fault.KindOf(err), kind)
	}
}

// taken returns a port on which somebody listens.
func taken(t *testing.T) int {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ln.Close() })
	return ln.Addr().(*net.TCPAddr).Port
}

// wantTaken checks that a user can tell which port to change, and how.
func wantTaken(t *testing.T, err error, port int, name portName) {
	t.Helper()
	wantKind(t, err, fault.Conflict)
	if !strings.Contains(err.Error(), "port "+strconv.Itoa(port)) {
		t.Errorf("%v does not name port %d", err, port)
	}
	for _, word := range []string{name.flag + " ", name.variable} {
		if !strings.Contains(fault.HintOf(err), word) {
			t.Errorf("hint %q does not name %s", fault.HintOf(err), word)
		}
	}
}

func TestPortThatIsTakenIsNamed(t *testing.T) {
	port := taken(t)
	_, err := choosePorts(t.Context(), loopback, port)
	wantTaken(t, err, port, grpcPort)
	_, err = listen(t.Context(), uiPort, loopback, port)
	wantTaken(t, err, port, uiPort)
	_, err = listen(t.Context(), uiPort, "192.0.2.1", 0)
	wantKind(t, err, fault.Invalid)
}

func TestFreePortsAreNotGivenTwiceAndCanBeHad(t *testing.T) {
	seen := map[int]bool{}
	for range 50 {
		p, err := choosePorts(t.Context(), loopback, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range []int{p.frontend, p.history, p.matching, p.worker} {
			if seen[port] {
				t.Fatalf("port %d was chosen twice", port)
			}
			seen[port] = true
		}
	}
	for port := range seen {
		ln, err := listen(t.Context(), grpcPort, loopback, port)
		if err != nil {
			t.Fatalf("a chosen port cannot be had: %v", err)
		}
		_ = ln.Close()
	}
}

func TestDialable(t *testing.T) {
	for host, want := range map[string]string{"127.0.0.1": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1", "::1": "::1", "10.1.2.3": "10.1.2.3"} {
		if got := dialable(host); got != want {
			t.Errorf("%s: %s", host, got)
		}
	}
}
