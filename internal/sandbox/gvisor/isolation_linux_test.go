package gvisor

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// TestTheHostCannotBeReached runs probes inside. Each must fail, with a
// command of its own, and the last row shows that a probe can succeed.
func TestTheHostCannotBeReached(t *testing.T) {
	p := newProvider(t)
	host, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	name := newInstance()
	abstract, err := net.Listen("unix", "@sandbox-test-"+name)
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cret"), 0o666); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SANDBOX_TEST_SECRET", "s3cret")
	// A descriptor that a careless ancestor left open.
	stray, err := os.Open(filepath.Dir(secret))
	if err != nil {
		t.Fatal(err)
	}
	defer stray.Close()
	if _, _, errno := syscall.Syscall(syscall.SYS_FCNTL, stray.Fd(), syscall.F_SETFD, 0); errno != 0 {
		t.Fatal(errno)
	}
	_, sb := newSandbox(t, p, testSpec("probe"))
	rows := map[string]string{
		"be on the host's kernel":         "! dmesg | grep -q gVisor",
		"read a host file":                fmt.Sprintf("cat %q", secret),
		"see the state folder":            fmt.Sprintf("ls %q || grep -r %q /proc/mounts", p.dir, p.dir),
		"read shadow":                     "cat /etc/shadow",
		"see root's home":                 "ls -A /root | grep .",
		"see other homes":                 "ls -A /home | grep -vx agent",
		"see the host's var":              "ls -A /var/lib /var/log /var/cache | grep -v :$ | grep .",
		"see the host's run":              "ls -A /run | grep .",
		"find a docker socket":            "ls /var/run/docker.sock",
		"enter what is init's":            "ls /.sandbox/ || ls /.sandbox/upper",
		"see the worker's environment":    "env | grep s3cret",
		"see init's environment":          "cat /proc/1/environ | grep .",
		"see init's memory":               "head -c 1 /proc/1/mem",
		"see init's descriptors":          "ls /proc/1/fd/",
		"speak for init":                  "echo > /proc/1/fd/1",
		"see init's root":                 "ls /proc/1/root/",
		"see the host's processes":        fmt.Sprintf("ps axww -o args | grep -v grep | grep -e runsc -e %q", p.dir),
		"have stray descriptors":          "ls /proc/self/fd | grep -vx '[0123]'",
		"kill init":                       "kill -9 1",
		"trace init":                      `perl -e 'syscall(101, 16, 1, 0, 0) == 0 or exit 1'`,
		"listen in on a host port":        fmt.Sprintf("bash -c 'echo >/dev/tcp/127.0.0.1/%d'", host.Addr().(*net.TCPAddr).Port),
		"use an abstract socket":          fmt.Sprintf(`perl -MSocket -e 'socket($s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, pack("Sa*", AF_UNIX, "\0sandbox-test-%s")) or die'`, name),
		"have another network card":       "tail -n +3 /proc/net/dev | grep -v ' lo:'",
		"resolve a name":                  "getent hosts example.com",
		"mount":                           "mount -t tmpfs none /tmp",
		"become root":                     "su -c true",
		"change the host's name":          "hostname other",
		"write to the system":             "touch /usr/file || touch /etc/file || touch /file || touch /opt/file",
		"make a device":                   "mknod /tmp/null c 1 3",
		"open a raw socket":               `perl -MSocket -e 'socket($s, AF_INET, SOCK_RAW, 1) or exit 1'`,
		"open a packet socket":            `perl -e 'use Socket; socket($s, 17, SOCK_RAW, 0) or exit 1'`,
		"have a capability":               "grep -E 'Cap(Inh|Prm|Eff|Amb)' /proc/self/status | grep -v 0000000000000000",
		"gain privileges":                 "grep NoNewPrivs /proc/self/status | grep -v 1",
		"have groups":                     "test \"$(id -G)\" != 1000",
		"be somebody else":                "test $(id -u):$(id -g) != 1000:1000",
		"own a file of the system":        "find /usr/bin /etc/alternatives -user agent | grep .",
		"write through the program mount": "test -w /opt/sandbox/bin",
		"use io_uring":                    `perl -e '$p = "\0" x 120; syscall(425, 4, $p) >= 0 or exit 1'`,
		"load bpf":                        `perl -e '$p = "\0" x 120; syscall(321, 0, $p, 120) >= 0 or exit 1'`,
	}
	i := 0
	for what, probe := range rows {
		i++
		out, _, exit, err := sandbox.Output(t.Context(), sb, fmt.Sprintf("probe-%d", i), sandbox.Cmd{Args: []string{"sh", "-c", "exec 2>&1; " + probe}}, 4096)
		if err != nil {
			t.Fatal(err)
		}
		if exit.Code == 0 {
			t.Errorf("the agent can %s: %s", what, out)
		}
	}
	if out := script(t, sb, "control", "id -un && ls -d /proc/self && touch $HOME/x /tmp/x /dev/shm/x x && getent hosts localhost && git --version && head -c 1 /dev/zero | wc -c"); !strings.HasPrefix(out, "agent\n") {
		t.Errorf("nothing works: %s", out)
	}
}

func TestADiskLimitIsTheAgentsAndNotItsLogs(t *testing.T) {
	p := newProvider(t)
	s := testSpec("disk")
	s.Limits.DiskBytes = 20 << 20
	ref, sb := newSandbox(t, p, s)
	hog, err := sb.Start(t.Context(), "hog", sandbox.Cmd{Args: []string{"sh", "-c", "dd if=/dev/zero of=big bs=1M count=400; sleep 60"}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := hog.Wait(t.Context()); err != nil || exit.Limit != sandbox.DiskLimit {
		t.Fatalf("%+v, %v", exit, err)
	}
	// There is room to save the work in, and then the file system is full:
	// nothing gets beyond that.
	out := script(t, sb, "fill", "dd if=/dev/zero of=bundle bs=1M count=8 2>/dev/null && echo saved; dd if=/dev/zero of=more bs=1M count=400 || true; ! echo more > $HOME/more || true; seq 300000 | tail -n 1; head -c 3000000 /dev/zero | tr '\\0' x | wc -c")
	if !strings.HasPrefix(out, "saved\n") || !strings.Contains(out, "No space left on device") || !strings.HasSuffix(out, "300000\n3000000") {
		t.Errorf("%.300s", out)
	}
	if out := script(t, sb, "say", "seq 100000"); !strings.HasSuffix(out, "\n100000") {
		t.Error("what a process says on a full disk is lost")
	}
	if u, err := p.Usage(t.Context(), ref); err != nil || u.DiskBytes < 100<<20 || u.DiskBytes > 20<<20+2*reserve(20<<20) {
		t.Errorf("%+v, %v", u, err)
	}
	if out := script(t, sb, "again", "rm big more && echo fits > small && cat small"); out != "fits" {
		t.Error(out)
	}
}
