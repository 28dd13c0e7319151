package gvisor

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A packed is one file on its way from init to the guardian, who puts it into
// the image of a base. Its data follows. An empty chunk ends the whole.
type packed struct {
	Path  []byte `json:"path"`
	Mode  uint32 `json:"mode"`
	UID   uint32 `json:"uid,omitempty"`
	GID   uint32 `json:"gid,omitempty"`
	Sec   int64  `json:"sec"`
	Nsec  int64  `json:"nsec,omitempty"`
	Size  int64  `json:"size,omitempty"`
	Link  []byte `json:"link,omitempty"`
	Fault string `json:"fault,omitempty"` // why there is no more
}

// pack ends all processes and sends what is in the folders that can be written
// to, as it is seen: what comes from a base below is in it too. Extended
// attributes, sockets and devices are left out.
func (in *initProcess) pack(s *stream) (func(bool), error) {
	if err := in.programs.killAll(); err != nil {
		return nil, fault.Wrap("end all processes", err)
	}
	return func(ok bool) {
		if !ok {
			return
		}
		in.sendAll(s)
	}, nil
}

// sendAll sends what is in the folders that can be written to.
func (in *initProcess) sendAll(s *stream) {
	out := bufio.NewWriterSize(s, maxData)
	p := packer{to: out, names: map[[2]uint64]string{}, buf: make([]byte, 256<<10)}
	for _, m := range in.setUp.Mounts {
		p.skip = append(p.skip, m.Target)
	}
	var err error
	for _, l := range layers {
		if err = p.walk(l.target, "/"+l.name); err != nil {
			break
		}
	}
	if err != nil {
		err = writeMessage(out, packed{Fault: cut(err.Error())})
	} else {
		err = writeChunk(out, nil)
	}
	if err := errors.Join(err, out.Flush()); err != nil {
		_ = s.Close()
	}
}

// killAll returns when init is alone.
func (p *programs) killAll() error {
	for {
		if err := unix.Kill(-1, unix.SIGKILL); errors.Is(err, unix.ESRCH) {
			return nil
		} else if err != nil {
			return os.NewSyscallError("kill", err)
		}
		// The reaper takes them; between two looks something may fork.
		time.Sleep(time.Millisecond)
	}
}

type packer struct {
	to    io.Writer
	skip  []string             // the host's files
	names map[[2]uint64]string // of files that have several, by device and inode
	buf   []byte
}

// walk sends dir, which is called as in the image, and all below.
func (p *packer) walk(dir, as string) error {
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if slices.Contains(p.skip, name) {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		return p.send(name, path.Join(as, strings.TrimPrefix(name, dir)))
	})
}

func (p *packer) send(name, as string) error {
	var st unix.Stat_t
	if err := unix.Lstat(name, &st); err != nil {
		return &os.PathError{Op: "stat", Path: name, Err: err}
	}
	e := packed{Path: []byte(as), Mode: st.Mode, UID: st.Uid, GID: st.Gid, Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR, unix.S_IFIFO:
	case unix.S_IFLNK:
		to, err := os.Readlink(name)
		if err != nil {
			return err
		}
		e.Link = []byte(to)
	case unix.S_IFREG:
		if st.Nlink > 1 {
			id := [2]uint64{st.Dev, st.Ino}
			if same := p.names[id]; same != "" {
				e.Link = []byte(same)
				return writeMessage(p.to, e)
			}
			p.names[id] = as
		}
		e.Size = st.Size
		return p.sendFile(name, e)
	default:
		return nil
	}
	return writeMessage(p.to, e)
}

// sendFile does without package os, whose every file is first offered to the
// poller: a system call more for each of many small ones.
func (p *packer) sendFile(name string, e packed) error {
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: name, Err: err}
	}
	defer unix.Close(fd)
	if err := writeMessage(p.to, e); err != nil {
		return err
	}
	for left := e.Size; left > 0; {
		n, err := unix.Read(fd, p.buf[:min(left, int64(len(p.buf)))])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return &os.PathError{Op: "read", Path: name, Err: errors.Join(err, io.ErrUnexpectedEOF)}
		}
		if _, err := p.to.Write(p.buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
	}
	return nil
}

// unpack puts what init sends into an image. Init is as good as a stranger.
func unpack(from io.Reader, w *imageWriter) error {
	from = bufio.NewReaderSize(from, maxData)
	for {
		var e packed
		err := readMessage(from, &e, 64<<10)
		if errors.Is(err, errEmpty) {
			return w.finish()
		}
		if err == nil && e.Fault != "" {
			err = errors.New(cut(e.Fault))
		}
		if err != nil {
			return err
		}
		err = w.add(imageEntry{
			Path: string(e.Path), Mode: e.Mode, UID: e.UID, GID: e.GID, Time: time.Unix(e.Sec, e.Nsec), Size: e.Size, Link: string(e.Link),
		}, from)
		if err != nil {
			return fmt.Errorf("store a file of the sandbox: %w", err)
		}
	}
}
