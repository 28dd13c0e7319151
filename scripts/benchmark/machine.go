package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// describeMachine says in one paragraph what the figures were measured on. The
// folder is where the sandboxes lie; empty: where temporary files do.
func describeMachine(now time.Time, dir string) string {
	parts := []string{fmt.Sprintf("%d cores", runtime.NumCPU())}
	if model := fieldOf("/proc/cpuinfo", "model name"); model != "" {
		parts[0] += " (" + model + ")"
	}
	if kb := fieldOf("/proc/meminfo", "MemTotal"); kb != "" {
		var n int64
		if _, err := fmt.Sscan(kb, &n); err == nil {
			parts = append(parts, fmt.Sprintf("%.0f GiB of memory", float64(n)/(1<<20)))
		}
	}
	if b, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		parts = append(parts, "Linux "+strings.TrimSpace(string(b)))
	}
	if fs := fileSystem(dir); fs != "" {
		parts = append(parts, "sandboxes on "+fs)
	}
	if p := policy(); p != "" {
		parts = append(parts, p)
	}
	parts = append(parts, runtime.Version(), now.UTC().Format("2006-01-02 15:04 UTC"))
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) >= 3 {
			parts = append(parts, "load before it began "+strings.Join(f[:3], " "))
		}
	}
	if b, err := exec.Command("git", "describe", "--always", "--dirty").Output(); err == nil { //nolint:noctx // it ends by itself
		parts = append(parts, "commit "+strings.TrimSpace(string(b)))
	}
	return strings.Join(parts, " · ")
}

// fieldOf reads the first "name : value" of a file of the kernel's.
func fieldOf(file, name string) string {
	b, err := os.ReadFile(file)
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(b) {
		k, v, ok := strings.Cut(string(line), ":")
		if ok && strings.TrimSpace(k) == name {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

// fileSystem reads the type of the mount that the folder lies in.
func fileSystem(dir string) string {
	if dir == "" {
		dir = os.TempDir()
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return ""
	}
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return ""
	}
	best, found := "", ""
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) > 2 && len(f[1]) >= len(best) && (f[1] == "/" || dir == f[1] || strings.HasPrefix(dir, f[1]+"/")) {
			best, found = f[1], f[2]
		}
	}
	return found
}

// policy says when this program, and with it everything that it starts, runs
// before others.
func policy() string {
	b, err := os.ReadFile("/proc/self/sched")
	if err != nil {
		return ""
	}
	for line := range bytes.Lines(b) {
		f := strings.Fields(string(line))
		if len(f) == 3 && f[0] == "policy" && (f[2] == "1" || f[2] == "2") {
			return "all at real-time priority, before other work"
		}
	}
	return ""
}
