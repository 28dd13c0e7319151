package host

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/activities"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway"
	"github.com/sandbox-temporal/sandbox-temporal/internal/gateway/egress"
	"github.com/sandbox-temporal/sandbox-temporal/internal/logs"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// doors are the sockets that the sandboxes of this host reach the gateway by,
// one for each. They are kept in files, so that the next host opens them again
// for the sandboxes that lived on.
//
//	<name>.json     whose it is, and what may pass
//	<name>.sock     the socket
//	<name>.refused  what did not pass, a line each
type doors struct {
	dir     string
	gateway *gateway.Gateway
	log     *slog.Logger
	ctx     context.Context // done when the host stops
	serving *sync.WaitGroup

	mu   sync.Mutex
	open map[string]*door
}

// A door is one that is open.
type door struct {
	record doorRecord
	stop   context.CancelFunc
	done   chan struct{}

	mu    sync.Mutex
	times map[egress.Refusal]int
}

// A doorRecord is what the file of a door holds.
type doorRecord struct {
	Run     string    `json:"run"`
	Fork    int       `json:"fork"`
	Egress  string    `json:"egress"`
	Repo    string    `json:"repo"` // decides which forge may be reached
	Created time.Time `json:"created"`
}

const (
	doorName = 24 // characters of a door's name
	// doorAge is longer than any fork lives: a week, and what comes before and
	// after.
	doorAge = 9 * 24 * time.Hour
	// maxRefused bounds the different refusals of one door that are kept.
	maxRefused = 500
)

var _ activities.Doors = (*doors)(nil)

// newDoors opens the doors that an earlier host left.
func newDoors(ctx context.Context, home string, g *gateway.Gateway, serving *sync.WaitGroup, log *slog.Logger) (*doors, error) {
	dir, err := doorsPath(home)
	if err != nil {
		return nil, fault.Wrap("gateway", err)
	}
	d := &doors{dir: dir, gateway: g, log: log, ctx: ctx, serving: serving, open: map[string]*door{}}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fault.Wrap("gateway", err)
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok {
			continue
		}
		var r doorRecord
		b, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil || name != nameOf(r.Run, r.Fork) || time.Since(r.Created) > doorAge {
			d.remove(name)
			continue
		}
		if err := d.serve(name, r); err != nil {
			return nil, err
		}
	}
	return d, nil
}

func nameOf(run string, num int) string {
	sum := sha256.Sum256([]byte(run + "/" + strconv.Itoa(num)))
	return hex.EncodeToString(sum[:doorName/2])
}

// Open returns the address of the fork's door, which is opened at the first
// call.
func (d *doors) Open(_ context.Context, in activities.Door) (addr string, err error) {
	const op = "open door"
	r := doorRecord{Run: in.Run, Fork: in.Fork, Egress: cmp.Or(in.Egress, egress.Registries), Repo: in.Repo, Created: time.Now().UTC()}
	if _, err := egress.ParsePolicy(r.Egress, r.Repo); err != nil {
		return "", fault.Wrap(op, err)
	}
	name := nameOf(r.Run, r.Fork)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.open[name] == nil {
		b, err := json.Marshal(r)
		if err == nil {
			err = os.WriteFile(d.path(name, ".json"), b, 0o600)
		}
		if err == nil {
			err = d.serve(name, r)
		}
		if err != nil {
			d.remove(name)
			return "", fault.Wrap(op, err)
		}
	}
	return "unix:" + d.path(name, ".sock"), nil
}

func (d *doors) path(name, suffix string) string { return filepath.Join(d.dir, name+suffix) }

// serve listens. Nobody else does: the state folder is locked by this host.
func (d *doors) serve(name string, r doorRecord) error {
	policy, err := egress.ParsePolicy(r.Egress, r.Repo)
	if err != nil {
		return err
	}
	path := d.path(name, ".sock")
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	if err := os.Chmod(path, 0o600); err != nil {
		_ = ln.Close()
		return err
	}
	ctx, stop := context.WithCancel(d.ctx)
	o := &door{record: r, stop: stop, done: make(chan struct{}), times: map[egress.Refusal]int{}}
	proxy := egress.New(egress.Options{Policy: policy, Refused: func(why egress.Refusal) { d.refused(name, o, why) }})
	d.open[name] = o
	d.serving.Go(func() {
		defer close(o.done)
		err := d.gateway.ServeDoor(ctx, ln, gateway.Door{Run: r.Run, Fork: r.Fork, Proxy: proxy, Inside: inside})
		if err != nil && ctx.Err() == nil {
			d.log.Error("a door of the gateway does not work any more", logs.Run, r.Run, logs.Fork, r.Fork, logs.Error, err)
		}
	})
	return nil
}

// inside is a door as its sandbox sees it.
var inside = net.JoinHostPort("127.0.0.1", strconv.Itoa(sandbox.GatewayPort))

// refused writes down what the sandbox was not let do, each thing once.
func (d *doors) refused(name string, o *door, why egress.Refusal) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.times[why] == 0 && len(o.times) >= maxRefused {
		return
	}
	o.times[why]++
	if o.times[why] > 1 {
		return
	}
	d.log.Info("a connection of a sandbox was refused", logs.Run, o.record.Run, logs.Fork, o.record.Fork, logs.Host, strconv.Quote(why.Host), logs.Reason, why.Reason)
	line, err := json.Marshal(fork.Refusal{Time: time.Now().UTC(), Host: why.Host, Reason: why.Reason})
	if err != nil {
		return // strings always encode
	}
	f, err := os.OpenFile(d.path(name, ".refused"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err == nil {
		_, err = f.Write(append(line, '\n'))
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		d.log.Warn("a refused connection is not in the fork's log", logs.Run, o.record.Run, logs.Fork, o.record.Fork, logs.Error, err)
	}
}

// Refused returns what did not pass the fork's door so far: lines of JSON, see
// fork.Refusal.
func (d *doors) Refused(run string, num int) ([]byte, error) {
	f, err := os.Open(d.path(nameOf(run, num), ".refused"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap("read refused connections", err)
	}
	defer f.Close()
	var buf bytes.Buffer
	_, err = io.Copy(&buf, io.LimitReader(f, 1<<20))
	return buf.Bytes(), fault.Wrap("read refused connections", err)
}

// Close closes the fork's door for good. One that is not open is no error.
func (d *doors) Close(run string, num int) {
	name := nameOf(run, num)
	d.mu.Lock()
	o := d.open[name]
	delete(d.open, name)
	d.mu.Unlock()
	if o != nil {
		o.stop()
		<-o.done
	}
	d.remove(name)
}

// leave removes the folder, which may be outside the state folder, unless there
// is a door that the next host is to open. Nobody serves any more.
func (d *doors) leave() { _ = os.Remove(d.dir) }

func (d *doors) remove(name string) {
	for _, suffix := range []string{".json", ".sock", ".refused"} {
		if err := os.Remove(d.path(name, suffix)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.log.Warn("a closed door is not removed", logs.Error, fmt.Sprint(err))
		}
	}
}
