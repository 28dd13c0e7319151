package e2btest_test

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/e2b/e2btest"
)

// one makes a server and a sandbox.
func one(t *testing.T, opts e2btest.Options) *box {
	t.Helper()
	return client{t, serve(t, opts)}.create(plain)
}

// running returns how many processes of the sandbox have word in their
// command line.
func (b *box) running(word string) int {
	b.t.Helper()
	// The pattern does not match itself.
	out := b.run(fmt.Sprintf(`for f in /proc/[0-9]*/cmdline; do tr '\0' ' ' < $f; echo; done 2> /dev/null | grep -c '[%s]%s'; true`, word[:1], word[1:]))
	n, err := strconv.Atoi(strings.TrimSpace(out))
	if err != nil {
		b.t.Fatal(err)
	}
	return n
}

// Trap 1 of those that were measured on the real one.
func TestATimeoutOfTheCallKillsTheProcess(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("exec sleep 1234", "Connect-Timeout-Ms", "3000")
	s.pid()
	until(t, "it runs", func() bool { return b.running("sleep 1234") == 1 })
	_, _, code, last, err := s.rest()
	if err != nil || last.Error == nil || last.Error.Code != "deadline_exceeded" || code != -100 {
		t.Errorf("code %d, %+v, %v", code, last, err)
	}
	until(t, "the process to be gone", func() bool { return b.running("sleep 1234") == 0 })
}

func TestAProcessOutlivesTheCallThatStartedIt(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("exec sleep 1234")
	pid := s.pid()
	s.stop()
	again := b.open("process.Process/Connect", fmt.Sprintf(`{"process":{"pid":%d}}`, pid))
	if got := again.pid(); got != pid {
		t.Errorf("connected to %d, want %d", got, pid)
	}
	if a := b.call("process.Process/SendSignal", fmt.Sprintf(`{"process":{"pid":%d},"signal":"SIGNAL_SIGTERM"}`, pid)); a.status != http.StatusOK {
		t.Errorf("signal: %d: %s", a.status, a.body)
	}
	if _, _, code, _, err := again.rest(); err != nil || code != -1 {
		t.Errorf("code %d, %v", code, err)
	}
}

// Trap 2.
func TestOneOfSeveralTagsIsOftenNotFound(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	for i := range 4 {
		b.open("process.Process/Start", fmt.Sprintf(`{"process":{"cmd":"sleep","args":["1234"]},"tag":"t%d"}`, i)).pid()
	}
	found := 0
	const tries = 100
	for range tries {
		s := b.open("process.Process/Connect", `{"process":{"tag":"t2"}}`)
		if m, err := s.next(); err == nil && m.Event.Start != nil {
			found++
		}
		s.stop()
	}
	if found == 0 || found == tries {
		t.Errorf("found %d times of %d", found, tries)
	}
}

// Trap 3.
func TestASignalReachesOneProcessOnly(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("s=sleep; $s 2345 >/dev/null 2>&1 & $s 2346 >/dev/null 2>&1 & wait")
	pid := s.pid()
	until(t, "both run", func() bool { return b.running("sleep 234") == 2 })
	b.call("process.Process/SendSignal", fmt.Sprintf(`{"process":{"pid":%d},"signal":"SIGNAL_SIGKILL"}`, pid))
	if _, _, code, _, err := s.rest(); err != nil || code != -1 {
		t.Errorf("code %d, %v", code, err)
	}
	if n := b.running("sleep 234"); n != 2 {
		t.Errorf("%d children live on, want both", n)
	}
	if a := b.call("process.Process/SendSignal", fmt.Sprintf(`{"process":{"pid":%d},"signal":2}`, pid)); a.status != http.StatusNotFound {
		t.Errorf("signal to one that ended: %d: %s", a.status, a.body)
	}
}

// Trap 4.
func TestOutputThatNobodyHearsIsLost(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("echo heard; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo lost; touch /tmp/said; while [ ! -e /tmp/end ]; do sleep 0.01; done; echo again")
	pid := s.pid()
	if m, err := s.next(); err != nil || m.Event.Data == nil || string(m.Event.Data.Stdout) != "heard\n" {
		t.Fatalf("%+v, %v", m, err)
	}
	s.stop()
	// Until the server knows, the process might say it to the dead.
	until(t, "nobody listens", func() bool {
		b.write("/tmp/go", "")
		return b.read("/tmp/said", "").status == http.StatusOK
	})
	s = b.open("process.Process/Connect", fmt.Sprintf(`{"process":{"pid":%d}}`, pid))
	s.pid()
	b.write("/tmp/end", "")
	out, _, code, _, err := s.rest()
	if err != nil || code != 0 || !strings.HasSuffix(out, "again\n") || strings.Contains(out, "heard") {
		t.Errorf("%q, %d, %v", out, code, err)
	}
}

// Trap 5.
func TestAListenerThatDoesNotReadHoldsTheProcessUp(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("head -c 30000000 /dev/zero; touch /tmp/done")
	pid := s.pid()
	// Nothing can be waited for but that nothing happens.
	time.Sleep(300 * time.Millisecond)
	if b.read("/tmp/done", "").status == http.StatusOK {
		t.Error("30 MB fit into the buffers of a connection")
	}
	other := b.open("process.Process/Connect", fmt.Sprintf(`{"process":{"pid":%d}}`, pid))
	other.pid()
	s.stop()
	if _, _, code, _, err := other.rest(); err != nil || code != 0 {
		t.Errorf("once the first has gone, the other reads to the end: %d, %v", code, err)
	}
}

// Trap 6.
func TestAnExitIsForgottenAfterAWhile(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{ExitRetention: 2 * time.Second})
	s := b.start("exit 7")
	pid := s.pid()
	if _, _, code, _, _ := s.rest(); code != 7 {
		t.Errorf("code %d", code)
	}
	request := fmt.Sprintf(`{"process":{"pid":%d}}`, pid)
	if _, _, code, _, err := b.open("process.Process/Connect", request).rest(); err != nil || code != 7 {
		t.Errorf("code %d, %v", code, err)
	}
	until(t, "the exit to be forgotten", func() bool {
		_, _, _, last, err := b.open("process.Process/Connect", request).rest()
		return err == nil && last.Error != nil && last.Error.Code == "not_found"
	})
}

// Trap 7.
func TestAStreamEndsWhenNobodyHoldsTheOutput(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("(while [ ! -e /tmp/go ]; do sleep 0.01; done; echo late) & echo started; exit 3")
	pid := s.pid()
	if m, err := s.next(); err != nil || m.Event.Data == nil {
		t.Fatalf("%+v, %v", m, err)
	}
	if list := b.call("process.Process/List", "{}"); !strings.Contains(list.body, fmt.Sprintf(`"pid":%d`, pid)) {
		t.Errorf("it is not listed while its output is open: %s", list.body)
	}
	b.write("/tmp/go", "")
	if out, _, code, _, err := s.rest(); err != nil || code != 3 || out != "late\n" {
		t.Errorf("%q, %d, %v", out, code, err)
	}
	if list := b.call("process.Process/List", "{}"); list.body != "{}" {
		t.Errorf("list %s", list.body)
	}
}

// Trap 8.
func TestAfterACrashOfEnvdOnlyTheDetachedGoOn(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	attached := b.start("while echo x; do sleep 0.01; done; exit 1")
	pid := attached.pid()
	b.run(`setsid sh -c 'echo $$ > /tmp/pid; while [ ! -e /tmp/go ]; do sleep 0.01; done; echo 7 > /tmp/exit' > /tmp/log 2>&1 < /dev/null &`)
	if !b.s.RestartEnvd(b.ID) {
		t.Fatal("there is no such sandbox")
	}
	if _, _, _, _, err := attached.rest(); err == nil {
		t.Error("the stream ended well")
	}
	if list := b.call("process.Process/List", "{}"); list.body != "{}" {
		t.Errorf("envd knows of %s", list.body)
	}
	until(t, "the attached one to die of its pipe", func() bool {
		return b.run(fmt.Sprintf("[ -d /proc/%d ] && echo lives || echo gone", pid)) == "gone\n"
	})
	b.write("/tmp/go", "")
	until(t, "the detached one to end", func() bool { return b.read("/tmp/exit", "").body == "7\n" })
}

// Trap 9.
func TestAProgramThatIsNotThereExitsAndAFolderThatIsNotThereFails(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.open("process.Process/Start", `{"process":{"cmd":"/no/such/program","args":["x"]}}`)
	s.pid()
	if _, stderr, code, last, err := s.rest(); err != nil || code != 127 || stderr == "" || last.Error != nil {
		t.Errorf("%q, %d, %+v, %v", stderr, code, last, err)
	}
	_, _, _, last, err := b.open("process.Process/Start", `{"process":{"cmd":"true","cwd":"/not/there"}}`).rest()
	if err != nil || last.Error == nil || last.Error.Code != "invalid_argument" {
		t.Errorf("%+v, %v", last, err)
	}
}

func TestSignsOfLifeComeAsOftenAsAskedFor(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	s := b.start("exec sleep 1234", "Keepalive-Ping-Interval", "1")
	s.pid()
	begin := time.Now()
	for range 2 {
		if m, err := s.next(); err != nil || m.Event.Keepalive == nil {
			t.Fatalf("%+v, %v", m, err)
		}
	}
	if d := time.Since(begin); d < 1900*time.Millisecond {
		t.Errorf("two came within %v", d)
	}
}

func TestAWrongTokenIsAnsweredOutsideTheProtocol(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	for _, kind := range []string{"application/json", "application/connect+json"} {
		for _, token := range []string{"", "ea_00"} {
			req := b.data(http.MethodPost, "/process.Process/Start", "{}")
			req.Header.Set("Content-Type", kind)
			req.Header.Set("X-Access-Token", token)
			if a := b.send(req); a.status != http.StatusUnauthorized || !strings.Contains(a.body, `"code":401`) {
				t.Errorf("%s with token %q: %d: %s", kind, token, a.status, a.body)
			}
		}
	}
	if a := b.send(b.data(http.MethodGet, "/health", "")); a.status != http.StatusNoContent {
		t.Errorf("health: %d", a.status)
	}
	for _, path := range []string{"/init", "/freeze", "/upgrade"} {
		if a := b.send(b.data(http.MethodPost, path, "{}")); a.status != http.StatusNotFound {
			t.Errorf("%s: %d", path, a.status)
		}
	}
}

func TestAnUnknownUserIsUnauthenticated(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	req := b.data(http.MethodPost, "/filesystem.Filesystem/Stat", `{"path":"/"}`)
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Basic "+base64Of("stranger:"))
	if a := b.send(req); a.status != http.StatusUnauthorized || !strings.Contains(a.body, `"code":"unauthenticated"`) {
		t.Errorf("%d: %s", a.status, a.body)
	}
}

func TestPartsOfAFile(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	b.write("/tmp/file", "0123456789")
	for _, row := range []struct {
		part   string
		status int
		body   string
		header string // Content-Range
	}{
		{"", 200, "0123456789", ""},
		{"bytes=0-", 206, "0123456789", "bytes 0-9/10"},
		{"bytes=7-", 206, "789", "bytes 7-9/10"},
		{"bytes=2-4", 206, "234", "bytes 2-4/10"},
		{"bytes=10-", 416, "invalid range: failed to overlap\n", "bytes */10"},
	} {
		a := b.read("/tmp/file", row.part)
		if a.status != row.status || a.body != row.body || a.header.Get("Content-Range") != row.header {
			t.Errorf("%q: %d %q %q", row.part, a.status, a.body, a.header.Get("Content-Range"))
		}
	}
	// It may be read from while it is written to.
	s := b.start("while [ ! -e /tmp/go ]; do sleep 0.01; done; printf abc >> /tmp/file")
	s.pid()
	b.write("/tmp/go", "")
	until(t, "the file to grow", func() bool { return b.read("/tmp/file", "bytes=10-").body == "abc" })
	if a := b.send(b.data(http.MethodHead, "/files?path=/tmp/file", "")); a.status != http.StatusMethodNotAllowed {
		t.Errorf("HEAD: %d", a.status)
	}
}

func TestFilesThatAreNone(t *testing.T) {
	t.Parallel()
	b := one(t, e2btest.Options{})
	b.run("cd /tmp; mkdir dir; mkfifo pipe; ln -s nowhere dangling; ln -s loop loop; echo x > file; ln -s /tmp/file link; ln -s ../../../../../../etc/hostname up")
	for name, want := range map[string]int{
		"none": 404, "none/there": 404, "file/there": 404, "dangling": 404, "dir": 400, "pipe": 400, "loop": 500, "link": 200, "up": 200,
	} {
		if a := b.read("/tmp/"+name, ""); a.status != want {
			t.Errorf("%s: %d, want %d: %s", name, a.status, want, a.body)
		}
	}
	// A link that leaves the sandbox's tree ends in it.
	if got := b.read("/tmp/up", "").body; got != "e2b\n" {
		t.Errorf("a link leads to %q", got)
	}
	req := b.data(http.MethodPost, "/files?path=/tmp/dir", "x")
	req.Header.Set("Content-Type", "application/octet-stream")
	if a := b.send(req); a.status != http.StatusBadRequest {
		t.Errorf("write to a folder: %d: %s", a.status, a.body)
	}
}

func TestEachSandboxHasATreeOfItsOwn(t *testing.T) {
	t.Parallel()
	shared := t.TempDir()
	c := client{t, serve(t, e2btest.Options{Mounts: []e2btest.Mount{{Source: shared, Target: "/opt/shared"}}})}
	a, b := c.create(plain), c.create(plain)
	a.write("/workspace/sub/file", "a")
	if got := b.read("/workspace/sub/file", ""); got.status != http.StatusNotFound {
		t.Errorf("the other sandbox has it too: %d", got.status)
	}
	if got := a.run("cat /workspace/sub/file; stat -c %U /workspace/sub /workspace/sub/file"); got != "auser\nuser\n" {
		t.Errorf("%q", got)
	}
	// Processes have numbers of their own, and none sees another sandbox's.
	s := a.start("exec sleep 4321")
	pid := s.pid() // of the shell at first, and of nobody in between
	until(t, "its process to be the program", func() bool {
		return a.run(fmt.Sprintf("tr '\\0' ' ' < /proc/%d/cmdline", pid)) == "sleep 4321 "
	})
	if n := b.running("sleep 4321"); n != 0 {
		t.Errorf("the other sandbox sees %d of them", n)
	}
	// What is shown of the host cannot be changed, by root neither.
	req := a.data(http.MethodPost, "/files?path=/opt/shared/file&username=root", "x")
	req.Header.Set("Content-Type", "application/octet-stream")
	if got := a.send(req); got.status == http.StatusOK {
		t.Error("a file of the host was written")
	}
	if got := a.run("touch /usr/bin/x /opt/shared/x 2>/dev/null || echo no"); got != "no\n" {
		t.Errorf("%q", got)
	}
	if got := a.run("ls " + shared + " 2>/dev/null || echo hidden"); got != "hidden\n" {
		t.Errorf("the host's own folders can be seen: %q", got)
	}
}

func TestKillLeavesNobody(t *testing.T) {
	t.Parallel()
	c := client{t, serve(t, e2btest.Options{})}
	b := c.create(plain)
	// They ignore what can be ignored, and left their group and terminal.
	const word = "e2btest-kill-leaves-nobody"
	b.run(`trap '' TERM INT HUP; for i in 1 2 3; do setsid sh -c 'trap "" TERM; while :; do sleep 0.05; done' ` + word + ` > /dev/null 2>&1 & done`)
	until(t, "three run", func() bool { return b.running(word) == 3 })
	c.must(http.StatusNoContent, http.MethodDelete, b.path(""), "")
	// They are seen from another sandbox as little as from here: look at all.
	if alive := naming(t, word); len(alive) > 0 {
		t.Errorf("%v live on", alive)
	}
}
