package local

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Both sockets, worker to supervisor and supervisor to init, carry the same
// frames: four bytes of length, big-endian, then so many bytes of JSON. Files
// travel beside the first byte of a frame.
//
// protocol is the version of what the worker says to the supervisor. Fields
// are added, never re-meant, and a supervisor answers what it does not know
// with fault.Unsupported, so that each side can be the older one. Version 2
// added opPause, opResume, opTerminal and opDial.
const protocol = 2

const (
	maxRequest = 8 << 20   // arguments and environment, which the kernel bounds at 2 MiB, in base64
	maxReply   = 256 << 10 // what comes back is a sentence at most
	maxFiles   = 250       // the kernel takes 253 in one message
)

var errFrame = errors.New("malformed frame")

// decodeFrame reads one frame of at most limit bytes.
func decodeFrame(r io.Reader, v any, limit int) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if int64(n) > int64(limit) {
		return fmt.Errorf("%w: %d bytes, at most %d are read", errFrame, n, limit)
	}
	body := make([]byte, n)
	if _, err := io.ReadFull(r, body); err != nil {
		return errors.Join(errFrame, err)
	}
	if err := json.Unmarshal(body, v); err != nil {
		return errors.Join(errFrame, err)
	}
	return nil
}

// A link is one end of a socket that carries frames. It is not safe for
// concurrent use in one direction.
type link struct {
	conn  *net.UnixConn
	limit int // of a frame that comes in, in bytes
	files int // how many files may come with one

	got []*os.File
	oob []byte
}

func newLink(c *net.UnixConn, limit, files int) *link {
	return &link{conn: c, limit: limit, files: files, oob: make([]byte, unix.CmsgSpace(4*max(files, 1)))}
}

// Read implements io.Reader and keeps the files that come along.
func (l *link) Read(p []byte) (int, error) {
	n, oobn, flags, _, err := l.conn.ReadMsgUnix(p, l.oob)
	if oobn > 0 {
		l.got = append(l.got, receivedFiles(l.oob[:oobn])...)
	}
	if flags&unix.MSG_CTRUNC != 0 || len(l.got) > l.files {
		// Without the bytes: who has enough of them asks for no error.
		return 0, fmt.Errorf("%w: more files than expected", errFrame)
	}
	if err == nil && n == 0 && len(p) > 0 {
		err = io.EOF
	}
	return n, err
}

func receivedFiles(oob []byte) (files []*os.File) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		fds, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "received"))
		}
	}
	return files
}

// receive reads the next frame into v and returns the files that came with
// it, which the caller closes.
func (l *link) receive(v any) ([]*os.File, error) {
	err := decodeFrame(l, v, l.limit)
	files := l.got
	l.got = nil
	if err != nil {
		closeAll(files)
		return nil, err
	}
	return files, nil
}

// encodeFrame is the reverse of decodeFrame.
func encodeFrame(v any) ([]byte, error) {
	body, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	frame := make([]byte, 4, 4+len(body))
	binary.BigEndian.PutUint32(frame, uint32(len(body)))
	return append(frame, body...), nil
}

// send writes v and lends the files to the other side.
func (l *link) send(v any, fds ...int) error {
	frame, err := encodeFrame(v)
	if err != nil {
		return err
	}
	if len(fds) > 0 {
		n, _, err := l.conn.WriteMsgUnix(frame, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		frame = frame[n:]
	}
	if len(frame) == 0 {
		return nil
	}
	_, err = l.conn.Write(frame)
	return err
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close()
	}
}

// socketPair returns the two ends of a stream socket.
func socketPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "init socket")
	ours, err = fileConn(os.NewFile(uintptr(fds[0]), "init socket"))
	if err != nil {
		_ = theirs.Close()
		return nil, nil, err
	}
	return ours, theirs, nil
}

// fileConn takes f over.
func fileConn(f *os.File) (*net.UnixConn, error) {
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		c.Close()
		return nil, errors.New("not a unix socket")
	}
	return u, nil
}

// fdPath names name in the folder behind fd in a few bytes. The address of a
// unix socket holds 108 bytes and a string option of a mount 256, and state
// folders are deeper than that.
func fdPath(fd int, name string) string {
	return filepath.Join("/proc/self/fd", strconv.Itoa(fd), name)
}
