package gvisor

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// How fast a sandbox is taken to fill memory or disk at most, in bytes a
// second: the nearer it is to a limit, the sooner init looks again.
const fillRate = 4 << 30

// Bounds of the time between two looks.
const (
	lookSoonest = 10 * time.Millisecond
	lookLatest  = time.Second
)

// A bar is the use at which everything is ended.
type bar struct {
	limit sandbox.Limit
	at    int64
	use   func() int64
}

// limitTo makes the limits those of the sandbox, and from then on watches
// those that gVisor's kernel does not enforce by itself.
func (in *initProcess) limitTo(l sandbox.Limits) {
	var now unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NPROC, &now); err == nil && l.Processes > 0 {
		// The agent's processes inherit it. Init is root, and root is not
		// held to it; it counts as the parent of every command's first.
		most := min(uint64(l.Processes-1), now.Max)
		_ = unix.Setrlimit(unix.RLIMIT_NPROC, &unix.Rlimit{Cur: most, Max: most}) // it only lowers
	}
	in.mu.Lock()
	first := in.bars == nil
	if in.base == 0 {
		in.base = memoryUse()
	}
	own := in.base
	in.bars = []bar{
		{sandbox.MemoryLimit, l.MemoryBytes, func() int64 { return max(0, memoryUse()-own) }},
		{sandbox.DiskLimit, l.DiskBytes, diskUse},
	}
	in.mu.Unlock()
	if first {
		go in.watch()
	}
}

// watch ends all processes whenever a bar is passed.
func (in *initProcess) watch() {
	for n := 0; ; n++ {
		wait := lookLatest
		// What goes on in the background is not forgotten.
		if in.programs.running() || n%5 == 0 {
			in.mu.Lock()
			bars := in.bars
			in.mu.Unlock()
			for i := range bars {
				left := bars[i].at - bars[i].use()
				if bars[i].at > 0 && left < 0 {
					in.exceeded(bars[i].limit)
					if bars[i].limit == sandbox.DiskLimit {
						// What is started to save the agent's work has that
						// room, and no more: the file system has a size.
						_ = os.Remove(ballast) // once; an error: it was removed
						bars[i].at += 2 * reserve(bars[i].at)
					}
					continue
				}
				if bars[i].at > 0 {
					wait = min(wait, time.Duration(float64(left)/fillRate*float64(time.Second)))
				}
			}
		}
		time.Sleep(max(wait, lookSoonest))
	}
}

// exceeded ends everything that runs, and has it say why.
func (in *initProcess) exceeded(limit sandbox.Limit) {
	in.still.Lock() // nothing is being started
	defer in.still.Unlock()
	in.programs.mark(limit)
	_ = in.programs.killAll() // an error: gVisor has no such
}

// mark has every program that runs say that the limit ended it.
func (p *programs) mark(limit sandbox.Limit) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, g := range p.ids {
		if g.limit == "" {
			g.limit = limit
		}
	}
}

// running reports whether a program has not ended.
func (p *programs) running() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.ids) > 0
}

// memoryUse is what gVisor's kernel has given out that is no copy of a file:
// memory of processes, and files in memory.
func memoryUse() int64 {
	b, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	var sum int64
	for line := range bytes.Lines(b) {
		f := bytes.Fields(line)
		if len(f) < 2 || string(f[0]) != "AnonPages:" && string(f[0]) != "Shmem:" {
			continue
		}
		if kb, err := strconv.ParseInt(string(f[1]), 10, 64); err == nil {
			sum += kb << 10
		}
	}
	return sum
}

// diskUse is what is in the file system that the agent writes to.
func diskUse() int64 {
	var st unix.Statfs_t
	if unix.Statfs(insideUpper, &st) != nil {
		return 0
	}
	used := int64(st.Blocks-st.Bfree) * st.Bsize
	if held, err := os.Stat(ballast); err == nil {
		used -= held.Size()
	}
	return used
}

// ballast is a file that keeps room on the disk, and takes none on the host's:
// it has pages, and nothing was written to them.
const ballast = insideUpper + "/ballast"

func makeBallast(bytes int64) error {
	f, err := os.OpenFile(ballast, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	for {
		// A signal that the kernel goes on after elsewhere ends it here
		// (fallocate(2), EINTR), and the runtime sends itself many.
		if err = unix.Fallocate(int(f.Fd()), 0, 0, bytes); !errors.Is(err, unix.EINTR) {
			return errors.Join(os.NewSyscallError("fallocate", err), f.Close())
		}
	}
}

// usage is what init knows of it.
func (in *initProcess) usage() *sandbox.Usage {
	in.mu.Lock()
	own := in.base
	in.mu.Unlock()
	u := &sandbox.Usage{MemoryBytes: max(0, memoryUse()-own), DiskBytes: diskUse()}
	tasks, err := filepath.Glob("/proc/[0-9]*/task/[0-9]*")
	if err != nil {
		return u
	}
	self := "/proc/" + strconv.Itoa(os.Getpid()) + "/"
	for _, t := range tasks {
		if !bytes.HasPrefix([]byte(t), []byte(self)) {
			u.Processes++
		}
	}
	return u
}
