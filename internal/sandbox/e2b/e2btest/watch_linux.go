package e2btest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

type watchRequest struct {
	Path         string `json:"path"`
	Recursive    bool   `json:"recursive"`
	IncludeEntry bool   `json:"includeEntry"`
}

// fileEvent is something that happened to a file.
type fileEvent struct {
	Name  string `json:"name"`
	Type  string `json:"type"`
	Entry *entry `json:"entry,omitempty"`
}

type watchEvent struct {
	Start      *struct{}  `json:"start,omitempty"`
	Filesystem *fileEvent `json:"filesystem,omitempty"`
	Keepalive  *struct{}  `json:"keepalive,omitempty"`
}

// A watcher sees what happens in a folder.
type watcher struct {
	v         *vm
	user      string
	dir       string
	recursive bool
	entries   bool
	notes     *os.File // of the kernel
	dirs      map[int]string
	events    chan fileEvent

	closing sync.Once
	over    chan struct{}

	mu   sync.Mutex
	kept []fileEvent // of one that is asked for them
}

const watched = syscall.IN_CREATE | syscall.IN_MODIFY | syscall.IN_DELETE | syscall.IN_MOVED_FROM | syscall.IN_MOVED_TO | syscall.IN_ATTRIB

// watch begins to watch.
func (v *vm) watch(user string, in watchRequest) (*watcher, error) {
	w := &watcher{v: v, user: user, recursive: in.Recursive, entries: in.IncludeEntry, dirs: map[int]string{}, events: make(chan fileEvent), over: make(chan struct{})}
	fd, err := syscall.InotifyInit1(syscall.IN_CLOEXEC | syscall.IN_NONBLOCK)
	if err != nil {
		return nil, os.NewSyscallError("inotify_init", err)
	}
	w.notes = os.NewFile(uintptr(fd), "inotify")
	err = v.as(user, func(a account) error {
		w.dir = a.resolve(in.Path)
		st, err := os.Stat(w.dir)
		if err != nil {
			return rpcErrorf("not_found", "path %s not found: %v", w.dir, err)
		}
		if !st.IsDir() {
			return rpcErrorf("invalid_argument", "path %s not a directory", w.dir)
		}
		return w.add(fd, w.dir)
	})
	if err != nil {
		return nil, errors.Join(err, w.notes.Close())
	}
	go w.run(fd)
	return w, nil
}

// add watches a folder, and those in it. It runs on the thread of the box.
func (w *watcher) add(fd int, dir string) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // it went away meanwhile
		}
		wd, err := syscall.InotifyAddWatch(fd, name, watched)
		if err == nil {
			w.dirs[wd] = name
		}
		if !w.recursive {
			return errors.Join(err, fs.SkipAll)
		}
		return err
	})
}

// run turns the notes of the kernel into events. It alone uses dirs.
func (w *watcher) run(fd int) {
	defer w.close()
	b := make([]byte, 64<<10)
	for {
		n, err := w.notes.Read(b)
		if err != nil {
			return
		}
		for rest := b[:n]; len(rest) >= syscall.SizeofInotifyEvent; {
			wd := int(int32(binary.NativeEndian.Uint32(rest)))
			mask := binary.NativeEndian.Uint32(rest[4:])
			size := int(binary.NativeEndian.Uint32(rest[12:]))
			name := string(bytes.TrimRight(rest[syscall.SizeofInotifyEvent:syscall.SizeofInotifyEvent+size], "\x00"))
			rest = rest[syscall.SizeofInotifyEvent+size:]
			if name != "" && !w.note(fd, w.dirs[wd], name, mask) {
				return
			}
		}
	}
}

// note passes an event on. It reports whether there is anybody to pass it to.
func (w *watcher) note(fd int, dir, name string, mask uint32) bool {
	full := filepath.Join(dir, name)
	if w.recursive && mask&syscall.IN_ISDIR != 0 && mask&(syscall.IN_CREATE|syscall.IN_MOVED_TO) != 0 {
		_ = w.v.as(w.user, func(account) error { return w.add(fd, full) }) // it may be gone already
	}
	e := fileEvent{Type: eventType(mask)}
	if e.Type == "" {
		return true
	}
	e.Name = strings.TrimPrefix(strings.TrimPrefix(full, w.dir), "/")
	if w.entries {
		_ = w.v.as(w.user, func(account) (err error) {
			e.Entry, err = entryOf(full)
			return err
		})
	}
	select {
	case w.events <- e:
		return true
	case <-w.over:
		return false
	}
}

func eventType(mask uint32) string {
	switch {
	case mask&(syscall.IN_CREATE|syscall.IN_MOVED_TO) != 0:
		return "EVENT_TYPE_CREATE"
	case mask&syscall.IN_MODIFY != 0:
		return "EVENT_TYPE_WRITE"
	case mask&syscall.IN_DELETE != 0:
		return "EVENT_TYPE_REMOVE"
	case mask&syscall.IN_MOVED_FROM != 0:
		return "EVENT_TYPE_RENAME"
	case mask&syscall.IN_ATTRIB != 0:
		return "EVENT_TYPE_CHMOD"
	}
	return ""
}

func (w *watcher) close() {
	w.closing.Do(func() {
		close(w.over)
		_ = w.notes.Close()
	})
}

// watchDir says what happens in a folder for as long as anybody listens.
func (v *vm) watchDir(w http.ResponseWriter, r *http.Request, user string) {
	var in watchRequest
	s, ok := openStream(w, r, &in)
	if !ok {
		return
	}
	watch, err := v.watch(user, in)
	if err != nil {
		s.end(asRPC(err))
		return
	}
	defer watch.close()
	var timeout <-chan time.Time
	if life := callTimeout(r); life > 0 {
		timeout = time.After(life)
	}
	ping := time.NewTicker(s.ping)
	defer ping.Stop()
	if s.send(watchEvent{Start: &struct{}{}}) != nil {
		return
	}
	for {
		e := watchEvent{Keepalive: &struct{}{}}
		select {
		case f := <-watch.events:
			e = watchEvent{Filesystem: &f}
		case <-ping.C:
		case <-timeout:
			s.end(rpcErrorf("deadline_exceeded", "context deadline exceeded"))
			return
		case <-watch.over:
			s.end(nil)
			return
		case <-r.Context().Done():
			return
		}
		if s.send(e) != nil {
			return
		}
	}
}

// createWatcher keeps what happens in a folder until it is asked for.
func (v *vm) createWatcher(user string, in watchRequest) (any, error) {
	w, err := v.watch(user, in)
	if err != nil {
		return nil, err
	}
	id := randomID("w", 8)
	v.mu.Lock()
	v.watchers[id] = w
	v.mu.Unlock()
	go func() {
		for {
			select {
			case e := <-w.events:
				w.mu.Lock()
				w.kept = append(w.kept, e)
				w.mu.Unlock()
			case <-w.over:
				return
			}
		}
	}()
	return map[string]string{"watcherId": id}, nil
}

type watcherRequest struct {
	WatcherID string `json:"watcherId"`
}

func (v *vm) watcherEvents(in watcherRequest) (any, error) {
	v.mu.Lock()
	w := v.watchers[in.WatcherID]
	v.mu.Unlock()
	if w == nil {
		return nil, rpcErrorf("not_found", "watcher with id %s not found", in.WatcherID)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	kept := w.kept
	w.kept = nil
	return map[string]any{"events": kept}, nil
}

func (v *vm) removeWatcher(in watcherRequest) (any, error) {
	v.mu.Lock()
	w := v.watchers[in.WatcherID]
	delete(v.watchers, in.WatcherID)
	v.mu.Unlock()
	if w == nil {
		return nil, rpcErrorf("not_found", "watcher with id %s not found", in.WatcherID)
	}
	w.close()
	return nil, nil
}
