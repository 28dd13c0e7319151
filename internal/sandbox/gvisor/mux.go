package gvisor

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"
)

// A mux carries any number of streams, each of which can be opened from either
// end, over one pipe in each direction. A stream takes no more than its
// window until somebody reads from it, so one that nobody reads holds up no
// other.
//
// The link can be held: then either end has sent whole frames only, and init
// sends no more until it is told to go on. Whatever state init is saved in
// while it is held, the first bytes it sends after it was restored are the
// beginning of a frame.
type mux struct {
	r io.Reader
	w io.Writer

	accept func(*stream) // called in a goroutine of its own, for each stream from the other end
	done   chan struct{} // closed when the link is dead

	writing sync.Mutex // held for each frame, and while the link is held
	frame   []byte     // guarded by writing

	mu      sync.Mutex
	streams map[uint32]*stream
	next    uint32
	err     error         // why the link is dead
	held    chan struct{} // somebody waits for the other end to be held

	holdable bool // this is init's end
	isHeld   bool // the guardian holds it; of use to serve only
}

// Frames are a byte, the number of the stream, and the length of what
// follows: data, or for a credit four bytes.
const (
	frameOpen   = 'o'
	frameData   = 'd'
	frameEnd    = 'e' // the sender of it writes no more
	frameReset  = 'r' // the sender of it neither writes nor reads any more
	frameCredit = 'c' // so many bytes were read and can be sent again
	frameHold   = 'h'
	frameHeld   = 'H'
	frameGo     = 'g' // hold no longer
	frameRenew  = 'n' // the same, for another guardian: all streams are gone
)

const (
	frameHead  = 9
	maxData    = 64 << 10
	window     = 512 << 10
	maxStreams = 256 // that may be open at once for the other end to open one more
)

var (
	errReset    = errors.New("the stream was reset")
	errLinkDead = errors.New("the sandbox's init is gone")
	errMux      = errors.New("malformed frame")
)

// newMux returns the guardian's or init's end of a link. serve must be called.
func newMux(r io.Reader, w io.Writer, isInit bool, accept func(*stream)) *mux {
	m := &mux{
		r: bufio.NewReaderSize(r, frameHead+maxData), w: w, accept: accept, holdable: isInit, next: 1,
		done: make(chan struct{}), frame: make([]byte, 0, frameHead+maxData), streams: map[uint32]*stream{},
	}
	if isInit {
		m.next = 2 // so that the two never give a stream the same number
	}
	return m
}

// serve reads until the link is dead and says why.
func (m *mux) serve() error {
	head, data := make([]byte, frameHead), make([]byte, maxData)
	var err error
	for err == nil {
		if _, err = io.ReadFull(m.r, head); err != nil {
			break
		}
		kind, id, n := head[0], binary.BigEndian.Uint32(head[1:]), binary.BigEndian.Uint32(head[5:])
		if n > maxData {
			err = fmt.Errorf("%w: %d bytes", errMux, n)
			break
		}
		if _, err = io.ReadFull(m.r, data[:n]); err == nil {
			err = m.obey(kind, id, data[:n])
		}
	}
	m.fail(err)
	return err
}

func (m *mux) fail(err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return
	}
	m.err = errors.Join(errLinkDead, err)
	for _, s := range m.streams {
		s.end(m.err)
	}
	m.streams = nil
	close(m.done)
}

func (m *mux) obey(kind byte, id uint32, data []byte) error {
	switch kind {
	case frameHold:
		if m.isHeld || !m.holdable {
			return fmt.Errorf("%w: hold", errMux)
		}
		m.writing.Lock()
		m.isHeld = true
		return m.put(frameHeld, 0, nil)
	case frameHeld:
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.held != nil {
			close(m.held)
			m.held = nil
		}
		return nil
	case frameGo, frameRenew:
		if kind == frameRenew {
			m.renew()
		}
		if m.isHeld {
			m.isHeld = false
			m.writing.Unlock()
		}
		return nil
	case frameOpen:
		return m.accepted(id)
	}
	m.mu.Lock()
	s := m.streams[id]
	m.mu.Unlock()
	if s == nil {
		return nil // it was closed here while this was on its way
	}
	switch kind {
	case frameData:
		return s.arrived(data)
	case frameEnd:
		s.ended()
	case frameReset:
		m.drop(s)
		s.end(errReset)
	case frameCredit:
		if len(data) != 4 {
			return fmt.Errorf("%w: credit", errMux)
		}
		s.earn(int(binary.BigEndian.Uint32(data)))
	default:
		return fmt.Errorf("%w: kind %q", errMux, kind)
	}
	return nil
}

// accepted takes a stream that the other end has opened.
func (m *mux) accepted(id uint32) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.streams[id] != nil || id%2 == m.next%2 {
		return fmt.Errorf("%w: stream %d opened twice", errMux, id)
	}
	s := newStream(m, id)
	if m.accept == nil || len(m.streams) >= maxStreams {
		go func() { _ = m.send(frameReset, id, nil) }() // an error: the link is dead
		return nil
	}
	m.streams[id] = s
	go m.accept(s)
	return nil
}

// renew forgets all streams: who was at their other end is in another world.
func (m *mux) renew() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.streams {
		s.end(errReset)
	}
	clear(m.streams)
}

// open opens a stream.
func (m *mux) open() (*stream, error) {
	m.mu.Lock()
	if m.err != nil {
		m.mu.Unlock()
		return nil, m.err
	}
	s := newStream(m, m.next)
	m.streams[s.id] = s
	m.next += 2
	m.mu.Unlock()
	if err := m.send(frameOpen, s.id, nil); err != nil {
		m.drop(s)
		return nil, err
	}
	return s, nil
}

func (m *mux) drop(s *stream) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.streams[s.id] == s {
		delete(m.streams, s.id)
	}
}

// knows reports whether the stream is still one of the link's: not when the
// link was renewed, or is dead.
func (m *mux) knows(id uint32) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.streams[id] != nil
}

// send sends one frame. What belongs to a stream that was given up while the
// link was held is not sent any more.
func (m *mux) send(kind byte, id uint32, data []byte) error {
	m.writing.Lock()
	defer m.writing.Unlock()
	if kind != frameReset && !m.knows(id) {
		return errReset
	}
	return m.put(kind, id, data)
}

// put writes a frame. The caller holds writing.
func (m *mux) put(kind byte, id uint32, data []byte) error {
	f := append(m.frame[:0], kind)
	f = binary.BigEndian.AppendUint32(f, id)
	f = binary.BigEndian.AppendUint32(f, uint32(len(data)))
	f = append(f, data...)
	if _, err := m.w.Write(f); err != nil {
		m.fail(err)
		return errors.Join(errLinkDead, err)
	}
	return nil
}

// hold returns when the other end is held, and nothing is on its way in either
// direction. The link stands still until release is called.
func (m *mux) hold(patience time.Duration) (release func(), err error) {
	held := make(chan struct{})
	m.writing.Lock()
	m.mu.Lock()
	m.held = held
	m.mu.Unlock()
	release = func() {
		_ = m.put(frameGo, 0, nil) // an error: the link is dead
		m.writing.Unlock()
	}
	if err := m.put(frameHold, 0, nil); err != nil {
		m.writing.Unlock()
		return nil, err
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	select {
	case <-held:
		return release, nil
	case <-m.done:
		err = m.err
	case <-timer.C:
		err = errors.New("init does not hold still")
	}
	release()
	return nil, err
}

// takeOver tells an init that was restored that there is a new guardian.
func (m *mux) takeOver() error {
	m.writing.Lock()
	defer m.writing.Unlock()
	return m.put(frameRenew, 0, nil)
}

// A stream is one of the connections of a mux.
type stream struct {
	m  *mux
	id uint32

	mu      sync.Mutex
	change  *sync.Cond
	in      []byte // arrived and not read
	inEnd   bool   // nothing more arrives
	read    int    // read and not yet given as credit
	credit  int    // what may be sent
	outEnd  bool   // nothing more is sent
	err     error  // why the stream is dead
	dropped bool
}

func newStream(m *mux, id uint32) *stream {
	s := &stream{m: m, id: id, credit: window}
	s.change = sync.NewCond(&s.mu)
	return s
}

func (s *stream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
	s.change.Broadcast()
}

func (s *stream) arrived(data []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.in)+len(data)+s.read > window || s.inEnd {
		return fmt.Errorf("%w: more than the window of stream %d", errMux, s.id)
	}
	s.in = append(s.in, data...)
	s.change.Broadcast()
	return nil
}

func (s *stream) ended() {
	s.mu.Lock()
	s.inEnd = true
	over := s.overLocked()
	s.change.Broadcast()
	s.mu.Unlock()
	if over {
		s.m.drop(s)
	}
}

// overLocked reports, once, that both ends have ended the stream: the link
// can forget it. The lock of the link is never taken under that of a stream.
func (s *stream) overLocked() bool {
	if s.dropped || !s.inEnd || !s.outEnd {
		return false
	}
	s.dropped = true
	return true
}

func (s *stream) earn(n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.credit = min(s.credit+n, window)
	s.change.Broadcast()
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	s.mu.Lock()
	for len(s.in) == 0 && !s.inEnd && s.err == nil && len(p) > 0 {
		s.change.Wait()
	}
	n := copy(p, s.in)
	s.in = s.in[n:]
	if len(s.in) == 0 {
		s.in = nil
	}
	s.read += n
	credit := 0
	if s.read >= window/2 && !s.inEnd && s.err == nil {
		credit, s.read = s.read, 0
	}
	var err error
	if n == 0 && len(p) > 0 {
		if err = s.err; err == nil {
			err = io.EOF
		}
	}
	s.mu.Unlock()
	if credit > 0 {
		// An error shows again at whoever reads or writes next.
		_ = s.m.send(frameCredit, s.id, binary.BigEndian.AppendUint32(nil, uint32(credit)))
	}
	return n, err
}

// Write implements io.Writer.
func (s *stream) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		s.mu.Lock()
		for s.credit == 0 && s.err == nil && !s.outEnd {
			s.change.Wait()
		}
		if s.err != nil || s.outEnd {
			err := s.err
			s.mu.Unlock()
			if err == nil {
				err = io.ErrClosedPipe
			}
			return sent, err
		}
		n := min(len(p)-sent, maxData, s.credit)
		s.credit -= n
		s.mu.Unlock()
		if err := s.m.send(frameData, s.id, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// CloseWrite ends one direction.
func (s *stream) CloseWrite() error {
	s.mu.Lock()
	if s.outEnd || s.err != nil {
		s.mu.Unlock()
		return nil
	}
	s.outEnd = true
	s.change.Broadcast()
	s.mu.Unlock()
	err := s.m.send(frameEnd, s.id, nil)
	s.mu.Lock()
	over := s.overLocked()
	s.mu.Unlock()
	if over {
		s.m.drop(s)
	}
	return err
}

// Close gives the stream up. Who reads or writes at either end is told, unless
// both have ended it.
func (s *stream) Close() error {
	s.mu.Lock()
	finished := s.dropped || s.err != nil
	if s.err == nil {
		s.err = errReset
	}
	s.dropped = true
	s.change.Broadcast()
	s.mu.Unlock()
	if finished {
		return nil
	}
	s.m.drop(s)
	return s.m.send(frameReset, s.id, nil)
}

// A duplex is a connection whose directions end separately.
type duplex interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// splice carries both directions until both have ended, or one broke.
func splice(a, b duplex) {
	done := make(chan struct{})
	go func() {
		pass(a, b)
		close(done)
	}()
	pass(b, a)
	<-done
	_ = a.Close() // an error: it is closed
	_ = b.Close()
}

// pass copies until from ends, and says so to to. When something breaks, both
// are told.
func pass(to, from duplex) {
	if _, err := io.Copy(to, from); err != nil {
		breakOff(to)
		breakOff(from)
		return
	}
	_ = to.CloseWrite() // an error: the other side is gone already
}

// breakOff closes a connection so that its other end does not take it for an
// orderly end: an answer that is cut must not look whole.
func breakOff(d duplex) {
	if c, ok := d.(interface{ SetLinger(sec int) error }); ok {
		_ = c.SetLinger(0) // then a TCP connection is reset; an error: it is closed already
	}
	_ = d.Close()
}
