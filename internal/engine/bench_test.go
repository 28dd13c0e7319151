//go:build !noembed

package engine

import (
	"bytes"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	taskqueuepb "go.temporal.io/api/taskqueue/v1"
	"go.temporal.io/api/workflowservice/v1"
)

func pollRequest(identity string) *workflowservice.PollActivityTaskQueueRequest {
	return &workflowservice.PollActivityTaskQueueRequest{
		Namespace: DefaultNamespace,
		TaskQueue: &taskqueuepb.TaskQueue{Name: "deeds"},
		Identity:  identity,
	}
}

// BenchmarkStart is a start on a new folder, to readiness.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		e, err := Start(b.Context(), Options{Dir: stateDir(b)})
		if err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		if err := e.Stop(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
}

// BenchmarkProcess is an engine with UI in a process of its own, from exec to
// readiness, first on a new folder and then on the one that it left; and what
// it costs to do nothing.
func BenchmarkProcess(b *testing.B) {
	const settle, idle = 5 * time.Second, 20 * time.Second
	for _, again := range []bool{false, true} {
		b.Run(map[bool]string{false: "fresh", true: "again"}[again], func(b *testing.B) {
			for b.Loop() {
				b.StopTimer()
				dir := stateDir(b)
				if again {
					stop(b, launchIdle(b, dir))
				}
				b.StartTimer()
				p := launchIdle(b, dir)
				b.StopTimer()
				if !again {
					<-time.After(settle)
					before := cpu(b, p.Process.Pid)
					<-time.After(idle)
					b.ReportMetric(100*(cpu(b, p.Process.Pid)-before).Seconds()/idle.Seconds(), "idle-%core")
					b.ReportMetric(rss(b, p.Process.Pid), "RSS-MB")
				}
				stop(b, p)
				b.StartTimer()
			}
		})
	}
}

func launchIdle(b *testing.B, dir string) *process {
	p := spawn(b, dir, roleEnv+"_IDLE=1")
	p.line(b)
	return p
}

func stop(b *testing.B, p *process) {
	if err := p.Process.Kill(); err != nil {
		b.Fatal(err)
	}
	_ = p.Wait()
}

// cpu is what a process has used; the kernel counts in hundredths of a second.
func cpu(b *testing.B, pid int) time.Duration {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		b.Fatal(err)
	}
	f := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	sum := 0
	for _, s := range f[11:13] {
		n, err := strconv.Atoi(s)
		if err != nil {
			b.Fatal(err)
		}
		sum += n
	}
	return time.Duration(sum) * 10 * time.Millisecond
}

// rss is a process's resident memory in MB.
func rss(b *testing.B, pid int) float64 {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/status")
	if err != nil {
		b.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if s, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kb, err := strconv.Atoi(strings.Fields(s)[0])
			if err != nil {
				b.Fatal(err)
			}
			return float64(kb) / 1024
		}
	}
	b.Fatal("no VmRSS")
	return 0
}
