package local
import ("testing";"syscall";"time";"fmt";"context";"os")
func TestDbg(t *testing.T) {
	p := newProvider(t)
	ref, sb := newSandbox(t, p, testSpec("stopped"))
	h, _ := readHandle("test", ref)
	syscall.Kill(h.Supervisor.PID, syscall.SIGSTOP)
	b,_ := os.ReadFile(fmt.Sprintf("/proc/%d/status", h.Supervisor.PID))
	fmt.Println(string(b[:200]))
	t0 := time.Now()
	ctx, c := context.WithTimeout(t.Context(), time.Second)
	defer c()
	s, err := sb.hello(ctx, "x")
	fmt.Println(s, err, time.Since(t0))
	fmt.Println(killProcess(t.Context(), h.Supervisor), time.Since(t0))
}
