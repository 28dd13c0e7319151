// Package confine takes from a process what no agent needs: system calls,
// capabilities, places to write to, and the kernel's memory. What it takes is
// gone for everything the process ever starts.
package confine
