package local

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

// usage adds up what init sees in its /proc: everything in the sandbox but
// itself. Pages that processes share are counted for each of them, unless the
// sum is larger than most: then, which takes longer, each is given its part.
// CPU time is that of init's children that have ended and of those that live.
func usage(most int64) (*sandbox.Usage, error) {
	names, err := processNames()
	if err != nil {
		return nil, err
	}
	var u sandbox.Usage
	for _, name := range names {
		u.MemoryBytes += resident(name)
		threads, ticks := threadsAndTicks(name)
		u.Processes += threads
		u.CPU += time.Duration(ticks) * (time.Second / clockTicks)
	}
	if most > 0 && u.MemoryBytes > most {
		u.MemoryBytes = 0
		for _, name := range names {
			u.MemoryBytes += proportional(name)
		}
	}
	var children unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_CHILDREN, &children); err != nil {
		return nil, os.NewSyscallError("getrusage", err)
	}
	u.CPU += time.Duration(unix.TimevalToNsec(children.Utime) + unix.TimevalToNsec(children.Stime))
	return &u, nil
}

// clockTicks is the unit of times in /proc, USER_HZ: 100 on every
// architecture that Go runs Linux on.
const clockTicks = 100

func processNames() ([]string, error) {
	f, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	all, err := f.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	names := all[:0]
	for _, name := range all {
		if pid, err := strconv.Atoi(name); err == nil && pid > 1 {
			names = append(names, name)
		}
	}
	return names, nil
}

// resident is cheap, and readable of everybody.
func resident(name string) int64 {
	f := bytes.Fields(readProc(name, "statm"))
	if len(f) < 2 {
		return 0 // it has ended
	}
	pages, err := strconv.ParseInt(string(f[1]), 10, 64)
	if err != nil {
		return 0
	}
	return pages * int64(os.Getpagesize())
}

// proportional falls back on resident where a process keeps us out.
func proportional(name string) int64 {
	for line := range bytes.Lines(readProc(name, "smaps_rollup")) {
		if f := bytes.Fields(line); len(f) == 3 && string(f[0]) == "Pss:" {
			if kb, err := strconv.ParseInt(string(f[1]), 10, 64); err == nil {
				return kb << 10
			}
		}
	}
	return resident(name)
}

// threadsAndTicks reads fields 20, and 14 to 17, of a stat file.
func threadsAndTicks(name string) (threads, ticks int64) {
	_, after, _ := cutLast(readProc(name, "stat"), ')')
	f := bytes.Fields(after)
	if len(f) < 18 {
		return 0, 0
	}
	for i := 11; i <= 14; i++ {
		n, err := strconv.ParseInt(string(f[i]), 10, 64)
		if err == nil {
			ticks += n
		}
	}
	threads, err := strconv.ParseInt(string(f[17]), 10, 64)
	if err != nil {
		return 0, ticks
	}
	return threads, ticks
}

func readProc(name, file string) []byte {
	b, err := os.ReadFile(filepath.Join("/proc", name, file))
	if err != nil {
		return nil
	}
	return b
}

// ignoreNobody is for a kill that finds nobody.
func ignoreNobody(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	return err
}
