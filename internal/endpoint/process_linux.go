package endpoint

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

type process struct {
	start  uint64 // clock ticks since boot
	zombie bool   // it has ended and waits for its parent
}

// look reads what the kernel says of a process.
func look(pid int) (process, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return process{}, err
	}
	return parseStat(text)
}

// parseStat reads the third and the twenty-second field of /proc/<pid>/stat:
// see proc_pid_stat(5). The second field is the program's name in brackets,
// which may itself hold spaces and brackets, so counting starts behind the
// last one.
func parseStat(text []byte) (process, error) {
	fields := bytes.Fields(text[bytes.LastIndexByte(text, ')')+1:])
	if len(fields) < 20 {
		return process{}, fmt.Errorf("stat has %d fields behind the name, not 20 or more", len(fields))
	}
	start, err := strconv.ParseUint(string(fields[19]), 10, 64)
	if err != nil {
		return process{}, err
	}
	return process{start: start, zombie: fields[0][0] == 'Z' || fields[0][0] == 'X'}, nil
}

// bootID names this boot of the kernel, "" when the kernel does not say.
func bootID() string {
	text, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(text))
}
