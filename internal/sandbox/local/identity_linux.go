package local

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Who people are inside a sandbox.
const (
	agentID = 1000
	nobody  = 65534
)

// hostIDs is the first of the host's ids that a sandbox of a root worker
// uses. It lies in a range that systemd's table of ids leaves unused
// (systemd.io/UIDS-GIDS: 1879048192 to 2147418111). All sandboxes share it,
// so the files of a base belong to the same agent in each.
const (
	hostIDs     = 1879048192
	hostIDCount = 65536
)

// identity says how the ids in a sandbox map to those of the host.
type identity struct {
	Root  bool `json:"root"`  // the worker is root: ids 0 to Count-1 map to First and on
	First int  `json:"first"` // Root: the host's id of 0; else: the host's uid of the agent
	Group int  `json:"group"` // not Root: the host's gid of the agent
	Count int  `json:"count"`
}

// agent returns the agent's uid on the host.
func (i identity) agent() int {
	if i.Root {
		return i.First + agentID
	}
	return i.First
}

// currentIdentity decides by who we are, and by which ids we may hand out.
func currentIdentity() identity {
	if os.Geteuid() == 0 {
		uids, err := os.ReadFile("/proc/self/uid_map")
		if err == nil && covers(uids, hostIDs, hostIDCount) {
			if gids, err := os.ReadFile("/proc/self/gid_map"); err == nil && covers(gids, hostIDs, hostIDCount) {
				return identity{Root: true, First: hostIDs, Count: hostIDCount}
			}
		}
		// Root of a container with ids of its own: the host's root is
		// somebody else, and what we can hand out is ourselves.
	}
	return identity{First: os.Geteuid(), Group: os.Getegid(), Count: 1}
}

// covers reports whether the ids first to first+count-1 exist in the user
// namespace with the given uid_map.
func covers(idMap []byte, first, count uint64) bool {
	for line := range bytes.Lines(idMap) {
		var inside, outside, n uint64
		if _, err := fmt.Sscan(string(line), &inside, &outside, &n); err != nil {
			return false
		}
		if inside <= first && first+count <= inside+n {
			return true
		}
	}
	return false
}

func newInstance() string {
	var b [8]byte
	// Not package crypto/rand, which would add to every supervisor. So few
	// bytes come whole, and without fail (getrandom(2)).
	_, _ = unix.Getrandom(b[:], 0)
	return hex.EncodeToString(b[:])
}

func bootID() (string, error) {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	return strings.TrimSpace(string(b)), err
}

// identify returns the lasting name of the process that has pid now.
func identify(pid int) (processID, error) {
	boot, err := bootID()
	if err != nil {
		return processID{}, err
	}
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return processID{}, err
	}
	start, err := startTime(b)
	return processID{PID: pid, Start: start, Boot: boot}, err
}

// startTime reads field 22 of a stat file. The second field is a name that
// may hold anything, so fields are counted from its last parenthesis.
func startTime(stat []byte) (uint64, error) {
	_, after, ok := cutLast(stat, ')')
	fields := bytes.Fields(after)
	if !ok || len(fields) < 20 {
		return 0, errors.New("malformed stat file of a process")
	}
	return strconv.ParseUint(string(fields[19]), 10, 64)
}

func cutLast(b []byte, sep byte) (before, after []byte, ok bool) {
	i := bytes.LastIndexByte(b, sep)
	if i < 0 {
		return b, nil, false
	}
	return b[:i], b[i+1:], true
}

// killProcess kills exactly the process that p names, when it still lives,
// and returns when it and, for the first process of a pid namespace,
// everything in it is dead.
func killProcess(ctx context.Context, p processID) error {
	if p.PID <= 1 {
		return nil
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if err != nil {
		if errors.Is(err, unix.ESRCH) {
			return nil
		}
		return os.NewSyscallError("pidfd_open", err)
	}
	f := os.NewFile(uintptr(fd), "pidfd")
	defer f.Close()
	// The descriptor holds on to whichever process has the number now; if
	// that is ours, no other can take its place any more.
	now, err := identify(p.PID)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	if now != p {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return os.NewSyscallError("pidfd_send_signal", err)
	}
	return waitReadable(ctx, fd)
}

// waitReadable returns when fd can be read, or ctx is done.
func waitReadable(ctx context.Context, fd int) error { return waitEvents(ctx, fd, unix.POLLIN) }

// waitEvents blocks in poll(2), with a pipe beside fd that ctx writes to.
func waitEvents(ctx context.Context, fd int, events int16) error {
	r, w, err := os.Pipe()
	if err != nil {
		return err
	}
	defer r.Close()
	stop := context.AfterFunc(ctx, func() { _ = w.Close() })
	defer func() {
		if stop() {
			_ = w.Close()
		}
	}()
	rfd := int(r.Fd())
	for {
		fds := []unix.PollFd{{Fd: int32(fd), Events: events}, {Fd: int32(rfd), Events: unix.POLLIN}}
		_, err := unix.Poll(fds, -1)
		switch {
		case errors.Is(err, unix.EINTR):
		case err != nil:
			return os.NewSyscallError("poll", err)
		case fds[0].Revents != 0:
			return nil
		case fds[1].Revents != 0:
			return context.Cause(ctx)
		}
	}
}

// readSmall reads a file that is ours but whose size nobody has checked.
func readSmall(f *os.File, limit int64) ([]byte, error) {
	if st, err := f.Stat(); err != nil || !st.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("%s is not a file", f.Name()))
	}
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("%s is larger than %d bytes", f.Name(), limit)
	}
	return b, err
}
