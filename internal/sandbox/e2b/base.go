package e2b

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// A base is a snapshot, whose name says whose and which it is. E2B has no
// place for more: what else is known of it stands in a file of this
// installation, so others do not see it, and do not remove the base.
const basePrefix = "sandbox-temporal-"

// A description is what is known of a base.
type description struct {
	Key     string            `json:"key"`
	Labels  map[string]string `json:"labels,omitempty"`
	Below   string            `json:"below,omitempty"` // the base that its sandbox was made of
	Created time.Time         `json:"created"`
	Used    time.Time         `json:"used,omitzero"`
	Bytes   int64             `json:"bytes"`
}

// baseName names the snapshot of a base, which is of one template.
func (c *client) baseName(key string) string { return c.basePrefix() + key }

func (c *client) basePrefix() string {
	sum := sha256.Sum256([]byte(c.template()))
	return basePrefix + hex.EncodeToString(sum[:3]) + "-"
}

func (c *client) template() string {
	if c.settings.Template != "" {
		return c.settings.Template
	}
	return DefaultTemplate
}

// Base asks E2B for the snapshot.
func (p *Provider) Base(ctx context.Context, key string) error {
	const op = "e2b: look up base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	c, err := p.connect()
	if err != nil {
		return fault.Wrap(op, err)
	}
	_, err = p.base(ctx, c, key)
	return asFault(op, err)
}

func (p *Provider) base(ctx context.Context, c *client, key string) (snapshot, error) {
	s, ok, err := c.findSnapshot(ctx, c.baseName(key))
	if err == nil && !ok {
		err = fault.New("", fault.NotFound, "no base %q", key)
	}
	return s, err
}

// Freeze ends what runs in the sandbox and makes a snapshot of it.
func (p *Provider) Freeze(ctx context.Context, ref sandbox.Ref, key string) error {
	return p.store(ctx, "e2b: freeze sandbox", ref, key, true)
}

// Snapshot makes a snapshot of a sandbox that lives on. A snapshot of E2B has
// the processes too, so they are stopped in it: who is made of it ends them
// before they can do anything.
func (p *Provider) Snapshot(ctx context.Context, ref sandbox.Ref, key string) error {
	return p.store(ctx, "e2b: snapshot sandbox", ref, key, false)
}

func (p *Provider) store(ctx context.Context, op string, ref sandbox.Ref, key string, end bool) error {
	if err := p.Base(ctx, key); fault.KindOf(err) != fault.NotFound {
		return err // nil: it is there
	}
	unlock, err := p.lock(ctx, basePrefix+key)
	if err != nil {
		return asFault(op, err)
	}
	defer unlock()
	b, m, err := p.look(ctx, op, ref)
	if err != nil {
		return err
	}
	err = p.Base(ctx, key)
	if fault.KindOf(err) != fault.NotFound {
		return err
	}
	save := func() error { return p.save(ctx, b, m, key, end) }
	if m.State == statePaused {
		return asFault(op, b.awake(ctx, save))
	}
	return asFault(op, save())
}

func (p *Provider) save(ctx context.Context, b *box, m machine, key string, end bool) (err error) {
	stop := holdScript
	if end {
		stop = killScript
	}
	if _, err := b.script(ctx, userAgentOf, stop); err != nil {
		return err
	}
	if !end && m.State != statePaused {
		defer func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			_, letErr := b.script(ctx, userAgentOf, letScript)
			err = errors.Join(err, letErr)
		}()
	}
	d := description{Key: key, Labels: labels(m.Metadata), Below: m.Metadata[metaBase], Created: time.Now().UTC()}
	r, err := b.script(ctx, userRoot, "sync; du -s -B1 "+sandbox.Workspace+" "+sandbox.Home)
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(r.stdout)) {
		size, _, _ := strings.Cut(line, "\t")
		n, _ := strconv.ParseInt(size, 10, 64) // 0: not known
		d.Bytes += n
	}
	if below, ok := p.describe(d.Below); ok {
		d.Bytes = max(d.Bytes-below.Bytes, 0)
	}
	if _, err := b.c.snapshot(ctx, b.id, b.c.baseName(key)); err != nil {
		return err
	}
	return p.write(d)
}

func (p *Provider) descriptionPath(key string) string {
	return filepath.Join(p.o.Dir, "base-"+key+".json")
}

func (p *Provider) describe(key string) (d description, ok bool) {
	if key == "" || p.o.Dir == "" || !sandbox.ValidID(key) {
		return d, false
	}
	b, err := os.ReadFile(p.descriptionPath(key))
	return d, err == nil && json.Unmarshal(b, &d) == nil && d.Key == key
}

func (p *Provider) write(d description) error {
	if p.o.Dir == "" {
		return nil
	}
	b, err := json.Marshal(d)
	if err != nil {
		return err
	}
	name := p.descriptionPath(d.Key)
	half := name + "." + newNonce()
	if err := errors.Join(os.MkdirAll(p.o.Dir, 0o700), os.WriteFile(half, b, 0o600)); err != nil {
		return err
	}
	return os.Rename(half, name)
}

// useBase notes that a sandbox was made of the base. It is for who prunes
// bases, and no reason to fail.
func (p *Provider) useBase(key string) {
	d, ok := p.describe(key)
	if !ok {
		return
	}
	d.Used = time.Now().UTC()
	if err := p.write(d); err != nil {
		p.o.Logger.Warn("The use of a base was not noted", "base", key, "error", err)
	}
}

// Bases lists the snapshots that are ours. One that another installation made
// has no labels here.
func (p *Provider) Bases(ctx context.Context) ([]sandbox.BaseInfo, error) {
	const op = "e2b: list bases"
	c, err := p.connect()
	if err != nil {
		return nil, fault.Wrap(op, err)
	}
	all, err := c.snapshots(ctx)
	if err != nil {
		return nil, asFault(op, err)
	}
	users, err := p.users(ctx, c)
	if err != nil {
		return nil, asFault(op, err)
	}
	known := map[string]description{}
	var keys []string
	for _, s := range all {
		for _, name := range append(s.Names, s.ID) {
			key, ok := strings.CutPrefix(bareName(name), c.basePrefix())
			if _, twice := known[key]; !ok || twice || !sandbox.ValidID(key) {
				continue
			}
			d, ok := p.describe(key)
			if !ok {
				d = description{Key: key, Created: time.Now(), Used: time.Now()}
			}
			known[key] = d
			keys = append(keys, key)
		}
	}
	for _, d := range known {
		users[d.Below]++
	}
	var infos []sandbox.BaseInfo
	for _, key := range keys {
		d := known[key]
		info := sandbox.BaseInfo{Key: key, Labels: d.Labels, Created: d.Created, Used: d.Used, Bytes: d.Bytes, Layers: 1, Users: users[key]}
		for at := d.Below; at != "" && info.Layers <= len(known); at = known[at].Below {
			info.Layers++
		}
		infos = append(infos, info)
	}
	return infos, nil
}

// users counts the sandboxes that were made of each base.
func (p *Provider) users(ctx context.Context, c *client) (map[string]int, error) {
	all, err := c.list(ctx, map[string]string{metaOwner: metaVersion})
	n := map[string]int{}
	for _, m := range all {
		if m.Metadata[metaOwner] == metaVersion {
			n[m.Metadata[metaBase]]++
		}
	}
	return n, err
}

// RemoveBase deletes the snapshot.
func (p *Provider) RemoveBase(ctx context.Context, key string) error {
	const op = "e2b: remove base"
	if !sandbox.ValidID(key) {
		return fault.New(op, fault.Invalid, "%q is not a key of a base", key)
	}
	c, err := p.connect()
	if err != nil {
		return fault.Wrap(op, err)
	}
	infos, err := p.Bases(ctx)
	if err != nil {
		return fault.Wrap(op, err)
	}
	for _, i := range infos {
		if i.Key == key && i.Users > 0 {
			return fault.New(op, fault.Conflict, "base %s has %d users", key, i.Users)
		}
	}
	s, ok, err := c.findSnapshot(ctx, c.baseName(key))
	if err == nil && ok {
		err = c.removeTemplate(ctx, s.ID)
	}
	if err != nil && fault.KindOf(err) != fault.Unsupported { // who makes no snapshots has none
		return asFault(op, err)
	}
	if p.o.Dir == "" {
		return nil
	}
	if err := os.Remove(p.descriptionPath(key)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.New(op, fault.Internal, "%w", err)
	}
	return nil
}
