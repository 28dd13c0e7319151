package main

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"time"
)

// describeMachine says in one paragraph what the figures were measured on.
func describeMachine(now time.Time) string {
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
