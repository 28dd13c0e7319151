package local

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestSmoke(t *testing.T) {
	p := New(testOptions(t.TempDir()))
	t0 := time.Now()
	ref, err := p.Create(t.Context(), sandbox.Spec{Key: "a", Deadline: time.Now().Add(time.Minute)})
	if err != nil {
		t.Fatal(err, fault.HintOf(err))
	}
	fmt.Println("create", time.Since(t0), ref)
	defer func() {
		t0 := time.Now()
		fmt.Println("destroy", p.Destroy(context.Background(), ref), time.Since(t0))
	}()
	sb, err := p.Attach(t.Context(), ref)
	if err != nil {
		t.Fatal(err)
	}
	t0 = time.Now()
	out, errb, exit, err := sandbox.Output(t.Context(), sb, "x", sandbox.Cmd{Args: []string{"sh", "-c", `id; pwd; env; ls -la / /etc /home /dev /workspace; cat /proc/self/status | grep -iE 'cap|nonew|secc|groups'; cat /proc/mounts; ps aux; git --version; ls -ln /proc/self/fd /usr| head -20; unshare -U true; mount -t tmpfs x /tmp; cat /proc/1/environ; ls -la /proc/1/; ip a`}}, 1<<20)
	fmt.Println(string(out), string(errb), exit, err, time.Since(t0))
	for _, f := range Check(t.Context(), testOptions(t.TempDir())) {
		fmt.Println(f, f.Hint)
	}
}
