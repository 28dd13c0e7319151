// Package e2btest is a server that speaks E2B's protocol and runs the
// sandboxes on this machine, so that a client of E2B can be tested without
// it: a control plane (both versions), and in every sandbox an agent process
// that starts real processes and keeps real files.
//
// Each sandbox has its own file tree and process numbers: the system of the
// host, read-only, and folders of its own for the rest, so that absolute
// paths mean what they mean in a sandbox of E2B. That needs Linux and root;
// [Supported] says whether it can be done here. The network is the host's,
// and nothing is a boundary against those who mean harm.
//
// # What is true to E2B
//
// Where E2B bites its clients, so does the server: the timeout of a call that
// starts a process is the process's, a signal reaches one process and not
// what it started, output that nobody listens to is lost, a listener that
// does not read holds up the process and its other listeners, one process
// among several cannot be found by its tag, exits are forgotten after a
// while, a wrong token is answered in another protocol than was spoken, an
// upload that breaks off leaves half a file, pause, snapshot and fork cut all
// connections, and a paused sandbox has no end.
//
// # What is not
//
// A sandbox made from a snapshot, or by a fork, has the files of its source
// and none of its processes; those of E2B have both. A sandbox cannot be
// paused without its memory. Volumes, secrets, events, logs, metrics and
// rules for the network are accepted or left out, and do nothing.
package e2btest
