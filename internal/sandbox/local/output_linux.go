package local

import (
	"errors"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// maxOutput bounds what is kept of one stream of a process. What it writes
// beyond that is taken from it and dropped, so that it neither fills the disk
// nor stops.
const maxOutput = 1 << 30

// maxPipe is the most that a pipe holds when its owner makes it as large as
// an ordinary user may (fs.pipe-max-size, pipe(7)).
const maxPipe = 1 << 20

// An output carries what a program writes into the file of its stream. The
// program has a pipe and not the file: with the file it could, by opening
// /dev/stdout again, truncate what workers read. The file is made when there is
// a byte for it: most programs write nothing to one of their streams, and a
// file costs more than all else that a stream needs.
type output struct {
	pipe *os.File // the end that is read
	raw  syscall.RawConn
	make func() (*os.File, error)

	mu   sync.Mutex
	to   *os.File // nil before the first byte
	buf  []byte   // nil as long as the kernel moves the bytes by itself
	kept int64
	err  error // why nothing more is kept
	over bool
}

// newOutput starts to fill the file that make makes, and returns the end of the
// pipe that the program writes to. Its owner is the agent, who may open it
// again. It ends when all have closed their end.
func newOutput(make func() (*os.File, error), owner int) (*output, *os.File, error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, err
	}
	write := os.NewFile(uintptr(fds[1]), "output")
	err := unix.SetNonblock(fds[0], true) // the other end, a description of its own, stays as programs expect it
	read := os.NewFile(uintptr(fds[0]), "output")
	var raw syscall.RawConn
	if err == nil && os.Geteuid() == 0 {
		err = unix.Fchown(fds[1], owner, -1)
	}
	if err == nil {
		raw, err = read.SyscallConn()
	}
	if err != nil {
		return nil, nil, errors.Join(err, read.Close(), write.Close())
	}
	o := &output{pipe: read, raw: raw, make: make}
	go o.run()
	return o, write, nil
}

// run carries until the last writer is gone.
func (o *output) run() {
	_ = o.raw.Read(func(fd uintptr) bool { return o.carry(int(fd), 1<<62) }) // it ends with the pipe
	o.mu.Lock()
	if o.to != nil {
		_ = o.to.Close()
	}
	o.over = true
	o.mu.Unlock()
	// Not under the lock: it waits for a drain that is at the pipe, which may
	// be waiting for the lock.
	_ = o.pipe.Close()
}

// drain returns when what was written before the call is in the file.
func (o *output) drain() {
	// An error: the pipe is closed, and everything was carried.
	_ = o.raw.Control(func(fd uintptr) { o.carry(int(fd), maxPipe) })
}

// carry moves at most limit bytes and reports whether the last writer is gone.
func (o *output) carry(fd int, limit int64) (over bool) {
	for limit > 0 {
		// One piece at a time under the lock: a program that never stops
		// writing must not keep drain out.
		n, err := o.piece(fd)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EAGAIN):
			return false
		case err != nil || n == 0:
			return true
		}
		limit -= int64(max(n, 0))
	}
	return false
}

// piece moves what the pipe holds, or a part of it. Like read(2) it returns 0
// when the last writer is gone, and EAGAIN when the pipe is just empty.
func (o *output) piece(fd int) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.over {
		return 0, nil
	}
	if o.to == nil && o.err == nil {
		if full, err := readable(fd); !full || err != nil {
			return 0, err
		}
		o.to, o.err = o.make()
	}
	if room := maxOutput - o.kept; o.err == nil && o.buf == nil && room > 0 {
		n, err := unix.Splice(fd, nil, int(o.to.Fd()), nil, int(min(room, maxPipe)), unix.SPLICE_F_NONBLOCK)
		if err == nil || errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
			o.kept += max(n, 0) // -1 beside an error
			return int(n), err
		}
	}
	// The file can hold no more, is one that the kernel moves nothing to, or
	// could not be made.
	if o.buf == nil {
		o.buf = make([]byte, 32<<10)
	}
	n, err := unix.Read(fd, o.buf)
	if n > 0 && o.err == nil {
		part := o.buf[:min(int64(n), maxOutput-o.kept)]
		o.kept += int64(len(part))
		_, o.err = o.to.Write(part) // a full disk: the program goes on, its words are lost
	}
	return n, err
}

// readable reports whether the pipe holds anything. When it does not, the error
// is EAGAIN as long as somebody can still write to it.
func readable(fd int) (bool, error) {
	polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(polled, 0)
	if err == nil && n == 0 {
		err = unix.EAGAIN
	}
	return polled[0].Revents&unix.POLLIN != 0, err
}
