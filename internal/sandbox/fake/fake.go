// Package fake is a provider that keeps its sandboxes in memory, over real
// processes in folders of its own. It is the reference for the contract, and
// the provider of every test that needs processes but no isolation: there is
// none.
//
// What is absolute in a sandbox ([sandbox.Workspace], [sandbox.Home], /opt and
// /tmp) stands below a folder of the host. The paths given to Upload and
// Download, Cmd.Dir and Cmd.Stdin are translated, and so is every argument
// and every value of Cmd.Env that as a whole is such a path. A path in the
// middle of a word, as in a shell script, is not: scripts must name files
// relative to their folder or through $HOME. In the same way the address of
// the gateway, 127.0.0.1:[sandbox.GatewayPort], is replaced by that of a
// forwarder of the sandbox's own, wherever it stands in an argument or a
// value.
//
// Unlike those of a real provider, the sandboxes are known only to the
// Provider that made them, and die with the test.
package fake

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// ProviderName is the name of the provider.
const ProviderName = "fake"

var (
	_ sandbox.Provider    = (*Provider)(nil)
	_ sandbox.HostBound   = (*Provider)(nil)
	_ sandbox.Snapshotter = (*Provider)(nil)
	_ sandbox.Pauser      = (*Provider)(nil)
	_ sandbox.PortDialer  = (*Provider)(nil)
)

// A Provider makes sandboxes. It must be made by [New].
type Provider struct {
	dir string

	mu    sync.Mutex
	made  int             // how many sandboxes ever were
	boxes map[string]*box // by key; also those being made
	bases map[string]base // by key

	storing sync.Mutex // held while a base is made
}

// New returns a provider that keeps its files in dir, which must exist. Who
// destroys its sandboxes, or calls [Provider.Close], finds dir empty again but
// for bases.
func New(dir string) *Provider {
	return &Provider{dir: dir, boxes: map[string]*box{}, bases: map[string]base{}}
}

// Name returns [ProviderName].
func (p *Provider) Name() string { return ProviderName }

// HostBound marks the sandboxes as reachable from this process only.
func (p *Provider) HostBound() {}

// Close destroys all sandboxes that are left.
func (p *Provider) Close() error {
	p.mu.Lock()
	boxes := maps.Clone(p.boxes)
	p.mu.Unlock()
	var errs []error
	for _, b := range boxes {
		<-b.made
		errs = append(errs, p.end(context.Background(), b))
	}
	return errors.Join(errs...)
}

// Create makes the folders of a sandbox.
func (p *Provider) Create(ctx context.Context, spec sandbox.Spec) (sandbox.Ref, error) {
	const op = "fake: create sandbox"
	switch {
	case !sandbox.ValidID(spec.Key):
		return sandbox.Ref{}, fault.New(op, fault.Invalid, "%q is not a key of a sandbox", spec.Key)
	case spec.Deadline.IsZero():
		return sandbox.Ref{}, fault.New(op, fault.Invalid, "a sandbox needs a deadline")
	case ctx.Err() != nil:
		return sandbox.Ref{}, fault.New(op, fault.Cancelled, "%w", context.Cause(ctx))
	}
	p.mu.Lock()
	b := p.boxes[spec.Key]
	if b != nil {
		p.mu.Unlock()
		<-b.made
		return b.ref, b.err
	}
	p.made++
	instance := fmt.Sprintf("%s.%d", spec.Key, p.made)
	b = &box{
		ref:  sandbox.Ref{Provider: ProviderName, Version: 1, ID: spec.Key, Handle: instance},
		made: make(chan struct{}), dir: filepath.Join(p.dir, "sandbox-"+instance), created: time.Now(), spec: spec,
		processes: map[string]*process{}, over: make(chan struct{}),
	}
	p.boxes[spec.Key] = b
	p.mu.Unlock()
	defer close(b.made)
	err := p.useBase(op, spec.Base)
	if err == nil {
		err = fault.Wrap(op, b.open(ctx, p.basePath(spec.Base)))
	}
	if err != nil {
		b.err = err
		return sandbox.Ref{}, errors.Join(b.err, p.end(ctx, b))
	}
	b.timer = time.AfterFunc(time.Until(spec.Deadline), func() {
		<-b.made
		_ = p.end(context.Background(), b) // nobody is there to hear it
	})
	return b.ref, nil
}

// must is find for what needs a living sandbox.
func (p *Provider) must(op string, ref sandbox.Ref) (*box, error) {
	b, err := p.find(op, ref)
	if err == nil && (b == nil || b.isOver()) {
		err = fault.New(op, fault.NotFound, "sandbox %q is gone", ref.ID)
	}
	return b, err
}

// find returns the sandbox of ref, or nil when it is gone.
func (p *Provider) find(op string, ref sandbox.Ref) (*box, error) {
	if ref.Provider != ProviderName || ref.Version != 1 {
		return nil, fault.New(op, fault.Invalid, "the sandbox is one of provider %q, version %d", ref.Provider, ref.Version)
	}
	p.mu.Lock()
	b := p.boxes[ref.ID]
	p.mu.Unlock()
	if b == nil {
		return nil, nil
	}
	<-b.made
	if b.err != nil || b.ref != ref {
		return nil, nil
	}
	return b, nil
}

// Attach finds the sandbox in memory.
func (p *Provider) Attach(_ context.Context, ref sandbox.Ref) (sandbox.Sandbox, error) {
	const op = "fake: attach"
	b, err := p.must(op, ref)
	if err != nil {
		return nil, err
	}
	return b, nil
}

// Destroy kills what runs in the sandbox and removes its folder.
func (p *Provider) Destroy(ctx context.Context, ref sandbox.Ref) error {
	const op = "fake: destroy sandbox"
	b, err := p.find(op, ref)
	if err != nil || b == nil {
		return err
	}
	return fault.Wrap(op, p.end(ctx, b))
}

// end destroys b and then forgets it. A second call at the same time waits
// for the first.
func (p *Provider) end(ctx context.Context, b *box) error {
	b.ending.Lock()
	defer b.ending.Unlock()
	b.markOver()
	if err := errors.Join(b.kill(ctx), os.RemoveAll(b.dir)); err != nil {
		return err
	}
	p.mu.Lock()
	if p.boxes[b.ref.ID] == b {
		delete(p.boxes, b.ref.ID)
	}
	p.mu.Unlock()
	return nil
}

// List looks through the sandboxes in memory.
func (p *Provider) List(_ context.Context, labels map[string]string) ([]sandbox.Info, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var infos []sandbox.Info
	for _, b := range p.boxes {
		select {
		case <-b.made:
		default:
			continue
		}
		if b.err != nil || b.isOver() || !sandbox.HasLabels(b.spec.Labels, labels) {
			continue
		}
		infos = append(infos, sandbox.Info{Ref: b.ref, Labels: maps.Clone(b.spec.Labels), Created: b.created, Paused: b.isPaused()})
	}
	return infos, nil
}

// copyTree copies a file or a folder as it is, links and times included.
func copyTree(ctx context.Context, from, to string) error {
	out, err := exec.CommandContext(ctx, "cp", "-aH", from, to).CombinedOutput()
	if err != nil {
		return fmt.Errorf("copy %s: %w: %s", from, err, out)
	}
	return nil
}
