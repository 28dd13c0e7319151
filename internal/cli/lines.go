package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// lineGap is the least time between two lines about one fork.
const lineGap = time.Second

// lines shows a run as plain lines, one for each thing that changed.
type lines struct {
	w         io.Writer
	forks     []lineState // by number - 1
	preparing bool        // was said
	paused    bool
	trouble   bool
}

// lineState is what is known of one fork and what was said of it.
type lineState struct {
	now, said string
	at        time.Time // when said was written
}

func newLines(w io.Writer) *lines { return &lines{w: w} }

// show takes one more sight of the run.
func (l *lines) show(s sight) {
	if s.Trouble != "" {
		if !l.trouble {
			fmt.Fprintf(l.w, "waiting for Temporal: %s\n", s.Trouble)
		}
		l.trouble = true
		return
	}
	if l.trouble {
		fmt.Fprintln(l.w, "Temporal answers again")
		l.trouble = false
	}
	if s.Progress.Preparing && !l.preparing {
		l.preparing = true
		fmt.Fprintln(l.w, "preparing the base that the forks start from")
	}
	if s.Progress.Paused != l.paused {
		l.paused = s.Progress.Paused
		if l.paused {
			fmt.Fprintln(l.w, "paused: no further fork starts")
		} else {
			fmt.Fprintln(l.w, "resumed")
		}
	}
	if n := len(s.Progress.Statuses); n > len(l.forks) {
		l.forks = append(l.forks, make([]lineState, n-len(l.forks))...)
	}
	for i := range l.forks {
		num := i + 1
		live, known := s.Live[num]
		f := &l.forks[i]
		status := s.status(num)
		switch {
		case status == fork.Pending:
			continue
		case status == fork.Running && !known && f.now != "":
			continue // between two phases; what it did last still stands
		case status == fork.Running:
			f.now = describe(status, live)
		default:
			f.now = flat(string(status))
		}
		if f.now != f.said && (f.at.IsZero() || s.At.Sub(f.at) >= lineGap) {
			l.say(num, s.At)
		}
	}
}

// flush says what was held back because it followed too soon.
func (l *lines) flush() {
	for i, f := range l.forks {
		if f.now != f.said {
			l.say(i+1, f.at)
		}
	}
}

func (l *lines) say(num int, at time.Time) {
	f := &l.forks[num-1]
	fmt.Fprintf(l.w, "fork %d: %s\n", num, f.now)
	f.said, f.at = f.now, at
}

// phases are the words for what a fork does before and after its agent. Live
// carries either the word or the name of the activity.
var phases = map[string]string{
	"create": "creating its sandbox", "create_sandbox": "creating its sandbox",
	"health": "checking its sandbox", "health_check": "checking its sandbox",
	"collect": "collecting its work", "collect_result": "collecting its work",
	"cleanup": "cleaning up", "cleanup_sandbox": "cleaning up",
	"pause": "being paused", "pause_sandbox": "being paused", "paused": "standing still",
	"resume": "being resumed", "resume_sandbox": "being resumed",
	"verify": "being verified", "verify_fork": "being verified",
}

// doing is what a running fork is doing.
func doing(l fork.Live) string {
	if phase, ok := phases[l.Phase]; ok {
		return phase
	}
	return flat(l.Action)
}

// describe says where a fork stands, on one line.
func describe(status fork.Status, l fork.Live) string {
	parts := []string{string(status)}
	if l.Turns > 0 {
		parts = append(parts, fmt.Sprintf("turn %d", l.Turns))
	}
	if l.Cost != 0 {
		parts = append(parts, dollars(l.Cost))
	}
	parts = append(parts, doing(l))
	return strings.Join(slices.DeleteFunc(parts, func(s string) bool { return s == "" }), " · ")
}
