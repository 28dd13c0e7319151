package local

import (
	"cmp"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"
)

// Most of what Create takes is the start of two programs and of namespaces,
// which is the same for all sandboxes. So it can be done ahead: a spare is a
// supervisor, with init in its namespaces and the host's system in init's root,
// in a folder that has no name yet. Create gives the folder its spec and its
// name and calls the supervisor in. No agent was ever in it, and none will be
// in a spare that is not called.
//
// A spare ends, and removes what it has made, when the worker's end of its pipe
// is closed, as it is when the worker dies. Of one that is killed, the next
// worker that tidies up finds the folder, as that of any sandbox.

// spareTime is how long spares are kept after the last Create.
const spareTime = 20 * time.Second

// lull is how long nothing must have been asked of any sandbox for spares to be
// started: whoever makes one wants to do something in it, and starts of spares
// beside it would take that twice as long. Who makes more of them in a row than
// were kept waits as long as if there were none.
const lull = 50 * time.Millisecond

// A spares is what a worker keeps ready.
type spares struct {
	most int
	kept time.Duration // after the last Create; 0 is spareTime
	lull time.Duration // 0 is lull

	mu      sync.Mutex
	list    []*spare
	at      int           // Creates that are under way
	asked   time.Time     // when something was last asked of a sandbox
	filling chan struct{} // closed when nobody starts spares any more; nil: nobody does
	closing bool          // they are being ended, and no new ones are started
	idle    *time.Timer   // ends them
	soon    *time.Timer   // has more of them started
	failed  time.Time     // when one could not be made
	ends    sync.Mutex    // held while spares are ended
}

// A spare is a dwelling whose supervisor waits to be called.
type spare struct {
	*dwelling
	ready chan struct{} // closed when it can be called, or err is set
	err   error
}

// takeSpare returns one, or nil where there is none. It may be one that is on
// its way: that is there sooner than another one would be.
func (p *Provider) takeSpare(ctx context.Context) *dwelling {
	s := &p.spares
	if s.most == 0 {
		return nil
	}
	for {
		s.mu.Lock()
		if len(s.list) == 0 {
			s.at++
			s.mu.Unlock()
			return nil
		}
		one := s.list[0]
		s.list = s.list[1:]
		s.mu.Unlock()
		select {
		case <-one.ready:
		case <-ctx.Done():
			// The Create that finds out will fail.
		}
		select {
		case <-one.ready:
		default:
			go p.dismiss(one)
			continue
		}
		if one.err == nil && one.lives() {
			s.mu.Lock()
			s.at++
			s.mu.Unlock()
			return one.dwelling
		}
		go p.dismiss(one)
	}
}

// lives reports whether the supervisor has not ended.
func (d *dwelling) lives() bool {
	select {
	case <-d.ended:
		return false
	default:
		return true
	}
}

// busy is called when something is asked of a sandbox: the next lull begins then.
func (s *spares) busy() {
	if s.most == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked = time.Now()
}

// untilLull needs the lock.
func (s *spares) untilLull() time.Duration { return cmp.Or(s.lull, lull) - time.Since(s.asked) }

// refill is called when a Create is done, and has spares started in the next
// lull.
func (p *Provider) refill() {
	s := &p.spares
	if s.most == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.at--
	s.asked = time.Now()
	if s.idle != nil {
		s.idle.Stop()
	}
	s.idle = time.AfterFunc(cmp.Or(s.kept, spareTime), p.Close)
	p.awaitLull()
}

// wanted reports whether there are fewer than are kept and more can be made. It
// needs the lock.
func (s *spares) wanted() bool {
	return !s.closing && len(s.list) < s.most && time.Since(s.failed) >= spareTime
}

// awaitLull needs the lock.
func (p *Provider) awaitLull() {
	s := &p.spares
	if s.soon != nil || !s.wanted() {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(s.untilLull(), func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.soon != timer {
			return // it was closed
		}
		s.soon = nil
		if s.at == 0 && s.filling == nil {
			s.filling = make(chan struct{})
			go p.fill()
		}
	})
	s.soon = timer
}

// fill starts one spare after the other until there are enough, or something
// else is to be done.
func (p *Provider) fill() {
	s := &p.spares
	for {
		s.mu.Lock()
		if s.at > 0 || !s.wanted() || s.untilLull() > 0 {
			close(s.filling)
			s.filling = nil
			p.awaitLull()
			s.mu.Unlock()
			return
		}
		one := &spare{ready: make(chan struct{})}
		s.list = append(s.list, one)
		s.mu.Unlock()
		one.dwelling, one.err = p.newSpare(context.Background())
		if one.err != nil {
			p.log.Debug("no spare sandbox", "err", one.err)
			s.mu.Lock()
			s.failed = time.Now()
			s.list = slices.DeleteFunc(s.list, func(other *spare) bool { return other == one })
			s.mu.Unlock()
		}
		close(one.ready)
	}
}

// newSpare returns when the spare can be called.
func (p *Provider) newSpare(ctx context.Context) (*dwelling, error) {
	d, err := p.newDwelling(ctx, newInstance())
	if err != nil {
		return nil, err
	}
	if err = p.startSupervisor(d, spareWord); err == nil {
		_, err = d.hear(ctx)
	}
	if err != nil {
		err = errors.Join(err, p.demolish(ctx, d))
		d.close()
		return nil, err
	}
	return d, nil
}

// Close ends what is kept ready, and returns when it is gone. Sandboxes live on,
// and the provider can still be used.
func (p *Provider) Close() {
	s := &p.spares
	s.ends.Lock() // who comes second waits for the first
	defer s.ends.Unlock()
	s.mu.Lock()
	list, filling := s.list, s.filling
	s.list = nil
	s.closing = true
	s.soon = nil
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.closing = false
		s.mu.Unlock()
	}()
	var all sync.WaitGroup
	for _, one := range list {
		all.Go(func() { p.dismiss(one) })
	}
	all.Wait()
	if filling != nil {
		<-filling
	}
}

// dismiss ends a spare.
func (p *Provider) dismiss(one *spare) {
	<-one.ready
	if one.err != nil {
		return
	}
	d := one.dwelling
	defer d.close()
	_ = d.call.Close()
	select {
	case <-d.ended:
	case <-time.After(patience):
	}
	// Nothing is left to do, unless it was killed.
	if err := p.demolish(context.Background(), d); err != nil {
		p.log.Warn("spare sandbox not removed", "err", err)
	}
}

// A calling is what a spare becomes: the folder with the name it has now.
type calling struct {
	Path string `json:"path"`
}

// callIn tells the spare whose folder has its spec and its name.
func (d *dwelling) callIn() error {
	frame, err := encodeFrame(calling{d.box.path})
	if err != nil {
		return err
	}
	_, err = d.call.Write(frame)
	return err
}

// errNotNeeded ends a spare that was not called.
var errNotNeeded = errors.New("not needed")

// awaitCall makes a spare, says when it is ready, and returns when it has a
// sandbox to become.
func (s *supervisor) awaitCall(calls, hello *os.File) error {
	s.record.Identity, s.record.Instance = currentIdentity(), s.box.instance()
	if err := s.stage(); err != nil {
		return err
	}
	if err := s.awaitStage(); err != nil {
		return err
	}
	frame, err := encodeFrame(greeting{})
	if err != nil {
		return err
	}
	if _, err := hello.Write(frame); err != nil {
		return errNotNeeded // nobody is there
	}
	var c calling
	called := make(chan error, 1)
	go func() {
		defer calls.Close()
		called <- decodeFrame(calls, &c, maxReply)
	}()
	select {
	case err = <-called:
	case <-s.initDone:
		return errNotNeeded
	}
	if err != nil {
		return errNotNeeded
	}
	id, instance := s.record.Identity, s.record.Instance
	s.box.path = c.Path
	if err := s.arm(); err != nil {
		return err
	}
	if s.record.Identity != id || s.record.Instance != instance {
		return errors.New("the spec is another sandbox's")
	}
	return nil
}

// vanish removes a spare that was not called, and returns the exit code.
func (s *supervisor) vanish() int {
	s.abandon()
	if err := s.box.remove(filepath.Dir(filepath.Dir(s.box.path))); err != nil {
		s.log.Error("spare not removed", "err", err)
		return 1
	}
	return 0
}
