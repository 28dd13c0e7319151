package host

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/ledger"
)

// A building is a gateway with doors.
type building struct {
	*doors
	gateway *gateway.Gateway
	home    string
	close   func()
}

// newBuilding opens one in home, as a host does.
func newBuilding(t *testing.T, home string) *building {
	t.Helper()
	prices, err := gateway.LoadPrices(nil)
	if err != nil {
		t.Fatal(err)
	}
	g, err := gateway.Open(t.Context(), gateway.Options{
		Ledger: ledger.Options{Dir: LedgerDir(home)}, Prices: prices,
		Credentials: func(context.Context) (gateway.Credentials, error) { return gateway.Credentials{}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	var serving sync.WaitGroup
	var once sync.Once
	shut := func() {
		once.Do(func() {
			stop()
			serving.Wait()
			if err := g.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	t.Cleanup(shut)
	d, err := newDoors(ctx, home, g, &serving, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return &building{doors: d, gateway: g, home: home, close: shut}
}

func (b *building) door(t *testing.T, run string, num int) string {
	t.Helper()
	addr, err := b.Open(t.Context(), activities.Door{Run: run, Fork: num, Egress: "example.com"})
	if err != nil {
		t.Fatal(err)
	}
	path, ok := strings.CutPrefix(addr, "unix:")
	if !ok {
		t.Fatalf("address %q", addr)
	}
	return path
}

// ask makes one request through a door and returns the status and the answer.
func ask(t *testing.T, socket, text string) (status int, said string) {
	t.Helper()
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(body)
}

func models(token string) string {
	return "GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Api-Key: " + token + "\r\n\r\n"
}

// short is a folder whose sockets have paths that are short enough.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "doors")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestATokenIsGoodOnlyAtItsOwnDoor(t *testing.T) {
	b := newBuilding(t, short(t))
	mine, other := b.door(t, "run", 1), b.door(t, "run", 2)
	token, err := b.gateway.Grant(t.Context(), gateway.Account{Run: "run", Fork: 1})
	if err != nil {
		t.Fatal(err)
	}
	// 401: the token was good, and then there is no key to go on with.
	if status, said := ask(t, mine, models(token)); status != http.StatusUnauthorized || !strings.Contains(said, "ANTHROPIC_API_KEY") {
		t.Errorf("at its own door: %d %s", status, said)
	}
	if status, said := ask(t, other, models(token)); status != http.StatusForbidden || !strings.Contains(said, "token") {
		t.Errorf("at another fork's door: %d %s, want it refused", status, said)
	}
	// A client that was told of a proxy may ask it for the gateway itself.
	if status, _ := ask(t, mine, strings.Replace(models(token), "/v1", "http://127.0.0.1:8484/v1", 1)); status != http.StatusUnauthorized {
		t.Errorf("as a proxy of itself: %d", status)
	}
}

func TestADoorOutlivesItsHostAndIsClosedForGood(t *testing.T) {
	home := short(t)
	b := newBuilding(t, home)
	path := b.door(t, "run", 1)
	if again := b.door(t, "run", 1); again != path {
		t.Errorf("the second time it is %s, the first time it was %s", again, path)
	}
	if status, said := ask(t, path, "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n"); status != http.StatusForbidden || !strings.Contains(said, "not on the list") {
		t.Errorf("%d %s", status, said)
	}
	b.close()

	b = newBuilding(t, home)
	if status, _ := ask(t, path, models("nobody's")); status != http.StatusForbidden {
		t.Errorf("after a restart: %d", status)
	}
	lines, err := b.Refused("run", 1)
	if err != nil || strings.Count(string(lines), "\n") != 1 || !strings.Contains(string(lines), "evil.example") {
		t.Errorf("refused: %q, %v", lines, err)
	}
	b.Close("run", 1)
	b.Close("run", 1)
	if left, err := os.ReadDir(filepath.Join(home, "doors")); err != nil || len(left) != 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
	if lines, err := b.Refused("run", 1); err != nil || len(lines) != 0 {
		t.Errorf("still refused: %q, %v", lines, err)
	}
}

func TestManyRefusalsOfOneKindAreOneLine(t *testing.T) {
	b := newBuilding(t, short(t))
	path := b.door(t, "run", 1)
	for range 3 {
		ask(t, path, "CONNECT evil.example:443 HTTP/1.1\r\nHost: evil.example:443\r\n\r\n")
	}
	if lines, err := b.Refused("run", 1); err != nil || strings.Count(string(lines), "\n") != 1 {
		t.Errorf("%q, %v", lines, err)
	}
}

func TestADeepStateFolderHasDoorsElsewhere(t *testing.T) {
	home := filepath.Join(short(t), strings.Repeat("deep/", 30))
	if err := os.MkdirAll(home, 0o700); err != nil {
		t.Fatal(err)
	}
	path, err := doorsPath(home)
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(path)
	if strings.HasPrefix(path, home) || len(path) > 80 {
		t.Errorf("doors at %s", path)
	}
	b := newBuilding(t, home)
	b.door(t, "run", 1)
	b.close()
	b.leave()
	if _, err := os.Stat(path); err != nil {
		t.Errorf("the next host does not find a door that is in use: %v", err)
	}
	b = newBuilding(t, home)
	b.Close("run", 1)
	b.close()
	b.leave()
	if _, err := os.Stat(path); !os.IsNotExist(err) {
		t.Errorf("a folder without a door is left: %v", err)
	}
}
