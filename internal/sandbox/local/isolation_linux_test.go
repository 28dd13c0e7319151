package local

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// TestTheHostCannotBeReached runs probes inside. Each must fail, with a
// command of its own, and the last row shows that a probe can succeed.
func TestTheHostCannotBeReached(t *testing.T) {
	p := newProvider(t)
	const word = "a-process-of-the-host"
	host, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()
	abstract, err := net.Listen("unix", "@sandbox-test-"+filepath.Base(filepath.Dir(p.dir)))
	if err != nil {
		t.Fatal(err)
	}
	defer abstract.Close()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("s3cret"), 0o666); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SANDBOX_TEST_SECRET", "s3cret")
	sleeper := self(t)
	sleeper.Path, sleeper.Args = "/bin/sh", []string{"sh", "-c", "read x", word}
	stdin, err := sleeper.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := sleeper.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		stdin.Close()
		_ = sleeper.Wait()
	}()
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
		"read a host file":                fmt.Sprintf("cat %q", secret),
		"see the state folder":            fmt.Sprintf("ls %q", p.dir),
		"read shadow":                     "cat /etc/shadow",
		"see root's home":                 "ls -A /root | grep .",
		"see other homes":                 "ls -A /home | grep -vx agent",
		"see the host's var":              "ls -A /var/lib /var/log /var/cache | grep -v :$ | grep .",
		"see the host's run":              "ls -A /run | grep .",
		"see sysfs":                       "ls -A /sys | grep .",
		"see cgroups":                     "ls -d /sys/fs/cgroup",
		"find a docker socket":            "ls /var/run/docker.sock",
		"see the worker's environment":    "env | grep s3cret",
		"see init's environment":          "cat /proc/1/environ",
		"see init's memory":               "head -c 1 /proc/1/mem",
		"see init's descriptors":          "ls /proc/1/fd",
		"see init's root":                 "ls /proc/1/root/",
		"see init's program":              "cat /proc/1/exe",
		"see the host's processes":        fmt.Sprintf("ps axww -o args | grep -v grep | grep %s", word),
		"see the supervisor":              fmt.Sprintf("ps axww -o args | grep -v grep | grep %q", p.dir),
		"have stray descriptors":          "ls /proc/self/fd | grep -vx '[0123]'",
		"kill init":                       "kill -9 1 && sleep 1 && ! kill -0 1",
		"listen in on a host port":        fmt.Sprintf("bash -c 'echo >/dev/tcp/127.0.0.1/%d'", host.Addr().(*net.TCPAddr).Port),
		"use an abstract socket":          fmt.Sprintf(`perl -MSocket -e 'socket($s, AF_UNIX, SOCK_STREAM, 0) or die; connect($s, pack("Sa*", AF_UNIX, "\0sandbox-test-%s")) or die'`, filepath.Base(filepath.Dir(p.dir))),
		"have another network card":       "tail -n +3 /proc/net/dev | grep -v ' lo:'",
		"have a route":                    "tail -n +2 /proc/net/route | grep .",
		"resolve a name":                  "getent hosts example.com",
		"mount":                           "mount -t tmpfs none /tmp",
		"unshare a user namespace":        "unshare -U true",
		"unshare another namespace":       "unshare -n true",
		"clone a user namespace":          `perl -e 'syscall(56, 0x10000000|17, 0, 0, 0, 0) >= 0 or exit 1'`,
		"enter a namespace":               "nsenter -t 1 -m true",
		"become root":                     "su -c true",
		"change the host's name":          "hostname other",
		"change a kernel setting":         "echo 1 > /proc/sys/vm/drop_caches",
		"set a core pattern":              "echo '|/tmp/x' > /proc/sys/kernel/core_pattern",
		"press a magic key":               "test -s /proc/sysrq-trigger || ! [ -c /proc/sysrq-trigger ] && echo h > /proc/sysrq-trigger",
		"read kernel symbols":             "grep . /proc/kallsyms",
		"read kernel messages":            "dmesg",
		"see keys":                        "grep . /proc/keys",
		"write to the system":             "touch /usr/file || touch /etc/file || touch /file || touch /dev/file",
		"make a device":                   "mknod /tmp/null c 1 3",
		"trace init":                      `perl -e 'syscall(101, 16, 1, 0, 0) == 0 or exit 1'`,
		"open a raw socket":               `perl -MSocket -e 'socket($s, AF_INET, SOCK_RAW, 1) or exit 1'`,
		"open a packet socket":            `perl -e 'use Socket; socket($s, 17, SOCK_RAW, 0) or exit 1'`,
		"open a vsock":                    `perl -e 'use Socket; socket($s, 40, SOCK_STREAM, 0) or exit 1'`,
		"have a capability":               "grep -E 'Cap(Inh|Prm|Eff|Bnd|Amb)' /proc/self/status | grep -v 0000000000000000",
		"gain privileges":                 "grep NoNewPrivs /proc/self/status | grep -v 1",
		"be unconfined":                   "grep Seccomp: /proc/self/status | grep -v 2",
		"have groups":                     "grep Groups: /proc/self/status | grep [0-9]",
		"dump core":                       "test $(ulimit -c) != 0",
		"be somebody else":                "test $(id -u):$(id -g) != 1000:1000",
		"own a file of the system":        "find /usr/bin /etc/alternatives -user agent | grep .",
		"write through the program mount": "test -w /opt/sandbox/bin",
		"use keyrings":                    `perl -e 'syscall(250, 0, -3, 0) >= 0 or exit 1'`,
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

func TestTheAgentIsNobodyOnTheHost(t *testing.T) {
	p := newProvider(t)
	_, sb := newSandbox(t, p, testSpec("who"))
	script(t, sb, "touch", "touch file")
	var st syscall.Stat_t
	if err := syscall.Stat(filepath.Join(p.boxPath("who"), fsDir, "workspace", "file"), &st); err != nil {
		t.Fatal(err)
	}
	want := uint32(os.Geteuid())
	if want == 0 {
		want = hostIDs + agentID
	}
	if st.Uid != want {
		t.Errorf("files of the agent belong to uid %d, want %d", st.Uid, want)
	}
}

func TestSignalsFromInsideDoNotHurtInit(t *testing.T) {
	p := newProvider(t)
	_, sb := newSandbox(t, p, testSpec("signals"))
	// With one id for both, nothing but init's own handlers stands between.
	script(t, sb, "all", "for s in $(seq 1 64); do kill -$s 1; kill -$s 1; done 2>/dev/null; true")
	if err := sb.Health(t.Context()); err != nil {
		t.Fatal(err)
	}
	// Init blocks signals whenever it starts something; what arrives then is
	// another matter to the kernel.
	storm, err := sb.Start(t.Context(), "storm", sandbox.Cmd{Args: []string{"sh", "-c", "while :; do for s in $(seq 1 64); do kill -$s 1; done; done 2>/dev/null"}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 30 {
		script(t, sb, fmt.Sprint("meanwhile-", i), "true")
	}
	if err := storm.Signal(t.Context(), sandbox.Kill); err != nil {
		t.Fatal(err)
	}
	// And what init handles, programs do not inherit.
	if out := script(t, sb, "ignored", "grep -E 'Sig(Ign|Blk)' /proc/self/status | grep -v 0000000000000000; true"); out != "" {
		t.Errorf("a program starts with signals ignored or blocked: %s", out)
	}
}

func TestLinksLeadNowhereOutsideTheSandbox(t *testing.T) {
	p := newProvider(t)
	_, sb := newSandbox(t, p, testSpec("links"))
	ctx := t.Context()
	host := filepath.Join(t.TempDir(), "host")
	if err := os.WriteFile(host, []byte("host"), 0o666); err != nil {
		t.Fatal(err)
	}
	script(t, sb, "make", fmt.Sprintf(`ln -s %q host; ln -s %q hostdir; ln -s /proc/self/environ env; ln -s /proc/1/mem mem; ln -s /proc/self proc; ln -s /proc/self/fd fds
		ln -s /proc/self/root/etc/passwd magic; ln -s /etc etc; ln -s /tmp tmp; ln -s loop loop; ln -s / root; mkfifo fifo; ln -s /dev/zero zero; echo in > /tmp/in; true`, host, filepath.Dir(host)))
	for name, kind := range map[string]fault.Kind{
		"host": fault.NotFound, "hostdir/host": fault.NotFound, "env": fault.Invalid, "mem": fault.Invalid, "proc/environ": fault.Invalid,
		"fds/0": fault.Invalid, "magic": fault.Invalid, "loop": fault.Invalid, "fifo": fault.Invalid, "zero": fault.Invalid, "root": fault.Invalid,
	} {
		f, err := sb.Download(ctx, sandbox.Workspace+"/"+name)
		if err == nil {
			f.Close()
		}
		if fault.KindOf(err) != kind {
			t.Errorf("download %s: %v, want %s", name, err, kind)
		}
	}
	f, err := sb.Download(ctx, sandbox.Workspace+"/tmp/in")
	if err != nil {
		t.Errorf("a link inside the sandbox is not followed: %v", err)
	} else {
		f.Close()
	}
	for _, name := range []string{"etc/file", "root/file", "proc/file", "fds/3/file", "loop/file", "zero/file", "root/usr/file", "root/opt/sandbox/bin/file"} {
		if err := sb.Upload(ctx, sandbox.Workspace+"/"+name, strings.NewReader("x")); fault.KindOf(err) != fault.Invalid {
			t.Errorf("upload %s: %v", name, err)
		}
	}
	for _, name := range []string{"host", "tmp/file", "env", "zero", "loop"} {
		if err := sb.Upload(ctx, sandbox.Workspace+"/"+name, strings.NewReader("x")); err != nil {
			t.Errorf("upload %s: %v", name, err)
		}
	}
	// A link that made folders would follow is made where it leads, inside.
	if err := sb.Upload(ctx, sandbox.Workspace+"/hostdir/host", strings.NewReader("x")); err == nil {
		t.Error("a folder was made through a dangling link")
	}
	if b, err := os.ReadFile(host); err != nil || string(b) != "host" {
		t.Errorf("the host's file holds %q, %v", b, err)
	}
	for _, name := range []string{"", "relative", "/", "/workspace/\x00"} {
		if err := sb.Upload(ctx, name, strings.NewReader("x")); fault.KindOf(err) != fault.Invalid {
			t.Errorf("upload to %q: %v", name, err)
		}
		if _, err := sb.Download(ctx, name); fault.KindOf(err) != fault.Invalid {
			t.Errorf("download of %q: %v", name, err)
		}
	}
}

func TestMountsAreReadOnlyAndNowhereElse(t *testing.T) {
	p := newProvider(t)
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"file": 0o666, "program": 0o777} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho run\n"), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(filepath.Join(dir, name), mode); err != nil {
			t.Fatal(err)
		}
	}
	s := testSpec("mounts")
	s.Mounts = []sandbox.Mount{
		{Source: dir, Target: "/home/agent/.tool/deep"}, {Source: filepath.Join(dir, "program"), Target: sandbox.ProgramDir + "/program"},
		{Source: dir, Target: "/data"}, {Source: filepath.Join(dir, "file"), Target: "/data/file"},
	}
	_, sb := newSandbox(t, p, s)
	out := script(t, sb, "look", `program; for f in /data/file ~/.tool/deep/file /opt/sandbox/bin/program; do echo x 2>/dev/null >> $f && echo wrote $f; done; touch /data/new ~/.tool/deep/new 2>/dev/null && echo made; touch ~/.tool/mine && echo mine`)
	if out != "run\nmine" {
		t.Errorf("%s", out)
	}
	for _, bad := range []sandbox.Mount{
		{Source: dir, Target: sandbox.Workspace + "/x"}, {Source: dir, Target: "/proc/x"}, {Source: dir, Target: "/"}, {Source: dir, Target: "relative"},
		{Source: dir, Target: "/a/../b"}, {Source: dir + "/missing", Target: "/x"}, {Source: "relative", Target: "/x"}, {Source: "/dev/null", Target: "/x"},
	} {
		s := testSpec("bad")
		s.Mounts = []sandbox.Mount{bad}
		ref, err := p.Create(t.Context(), s)
		if err == nil {
			_ = p.Destroy(t.Context(), ref)
		}
		if fault.KindOf(err) != fault.Invalid {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

// TestAMountCannotBeLedAstrayByABase mounts below a link that the agent of the
// base left: it is followed inside.
func TestAMountCannotBeLedAstrayByABase(t *testing.T) {
	p := newProvider(t)
	dir := t.TempDir()
	victim := t.TempDir()
	ref, sb := newSandbox(t, p, testSpec("one"))
	script(t, sb, "link", fmt.Sprintf("ln -s %q ~/.tool; ln -s /tmp ~/.other", victim))
	if err := p.Freeze(t.Context(), ref, "base"); err != nil {
		t.Fatal(err)
	}
	s := testSpec("two")
	s.Base = "base"
	s.Mounts = []sandbox.Mount{{Source: dir, Target: "/home/agent/.tool/x"}}
	if ref, err := p.Create(t.Context(), s); err == nil {
		t.Error("a mount was made through a link to nowhere")
		_ = p.Destroy(t.Context(), ref)
	}
	s.Mounts[0].Target = "/home/agent/.other/x"
	_, fork := newSandbox(t, p, s)
	if out := script(t, fork, "look", "ls -d /tmp/x"); out != "/tmp/x" {
		t.Error(out)
	}
	if entries, err := os.ReadDir(victim); err != nil || len(entries) > 0 {
		t.Errorf("the host's folder holds %v, %v", entries, err)
	}
}

func TestWithoutUserNamespacesCreateRefuses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	cmd := self(t, forbiddenWord, dir)
	var out bytes.Buffer
	cmd.Stdout = &out
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
	}
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	var got wireFault
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%s: %v", out.Bytes(), err)
	}
	if got.Kind != fault.Unsupported || !strings.Contains(got.Hint, "sysctl -w user.max_user_namespaces") {
		t.Errorf("%+v", got)
	}
	if boxes, err := os.ReadDir(filepath.Join(dir, sandboxesDir)); err != nil || len(boxes) > 0 {
		t.Errorf("left behind: %v, %v", boxes, err)
	}
}

// testForbidden runs in a user namespace that allows no further one.
func testForbidden(dir string) int {
	if err := os.WriteFile("/proc/sys/user/max_user_namespaces", []byte("0"), 0); err != nil {
		panic(err)
	}
	p := New(testOptions(dir))
	ref, err := p.Create(context.Background(), sandbox.Spec{Key: "forbidden", Deadline: time.Now().Add(time.Minute)})
	if err == nil {
		_ = p.Destroy(context.Background(), ref)
	}
	if err := json.NewEncoder(os.Stdout).Encode(toWire(err)); err != nil {
		panic(err)
	}
	return 0
}

// TestTimersAreExact: those of the supervisor and of init are not, and a
// program inherits what the thread has that starts it.
func TestTimersAreExact(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("timers"))
	if got := script(t, sb, "slack", "cat /proc/self/timerslack_ns"); got != fmt.Sprint(exactSlack) {
		t.Errorf("a program has a slack of %q", got)
	}
	h, err := readHandle("test", ref)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/timerslack_ns", h.Supervisor.PID))
	// Of another process only root may ask.
	if string(b) != fmt.Sprintln(lazySlack) && !errors.Is(err, os.ErrPermission) {
		t.Errorf("the supervisor has a slack of %q: %v", b, err)
	}
	if own, err := unix.PrctlRetInt(unix.PR_GET_TIMERSLACK, 0, 0, 0, 0); err != nil || own == lazySlack {
		t.Errorf("the worker has a slack of %d: %v", own, err)
	}
}
