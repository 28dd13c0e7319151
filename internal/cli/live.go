package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"

	tea "github.com/charmbracelet/bubbletea"

	"github.com/sandbox-temporal/sandbox-temporal/internal/cli/hush"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// Bubble Tea is initialised by now, in silence.
var _ = hush.Restore()

// liveModel draws a run on a terminal: a line about the run, one for each fork
// that there is room for, and how to let go.
type liveModel struct {
	paint         paint
	width, height int
	sight         sight
	seen          map[int]fork.Live // the last that was known of each fork
	looked        bool
	over          bool // the run has ended or cannot be followed: leave no trace
	detached      bool
}

// followed is the message that the watcher has nothing more to show.
type followed struct{ err error }

var _ tea.Model = liveModel{}

func newLiveModel(p paint) liveModel {
	return liveModel{paint: p, width: 80, height: 24, seen: map[int]fork.Live{}}
}

func (m liveModel) Init() tea.Cmd { return nil }

func (m liveModel) Update(msg tea.Msg) (tea.Model, tea.Cmd) {
	switch msg := msg.(type) {
	case tea.KeyMsg:
		switch msg.String() {
		case "q", "Q", "ctrl+c", "ctrl+d":
			m.detached = true
			return m, tea.Quit
		}
	case tea.InterruptMsg:
		m.detached = true
		return m, tea.Quit
	case tea.WindowSizeMsg:
		if msg.Width > 0 && msg.Height > 0 {
			m.width, m.height = msg.Width, msg.Height
		}
	case sight:
		m.sight, m.looked = msg, true
		for num, l := range msg.Live {
			m.seen[num] = l
		}
	case followed:
		m.over = true
		return m, tea.Quit
	}
	return m, nil
}

func (m liveModel) View() string {
	if m.over {
		return ""
	}
	if !m.looked {
		return m.paint.in(dim, fit("looking … · q detaches", m.width)) + "\n"
	}
	var b strings.Builder
	b.WriteString(m.headline() + "\n")
	nums, folded := m.rows()
	for _, num := range nums {
		b.WriteString(m.row(num) + "\n")
	}
	if folded != "" {
		b.WriteString(m.paint.in(dim, fit("  "+folded, m.width)) + "\n")
	}
	foot := "q detaches; the run goes on"
	colour := dim
	if t := m.sight.Trouble; t != "" {
		foot, colour = "waiting for Temporal: "+t, yellow
	}
	b.WriteString(m.paint.in(colour, fit(foot, m.width)))
	return b.String()
}

// headline says how the whole run stands.
func (m liveModel) headline() string {
	p := m.sight.Progress
	money := dollars(m.sight.spent())
	if p.Budget > 0 {
		money += " of " + dollars(p.Budget)
	}
	return m.paint.in(bold, fit(fmt.Sprintf("%s  %s · %d of %d done · %s · %s", flat(p.Run), flat(p.Words()), p.Success+p.Failed, p.Total, money, seconds(p.Duration)), m.width))
}

// rows chooses the forks that are shown, and counts the others. When not all
// fit, the running ones come first.
func (m liveModel) rows() (nums []int, folded string) {
	room := max(m.height-3, 1) // the headline, the foot, and the cursor's own line
	total := len(m.sight.Progress.Statuses)
	if total <= room {
		for num := 1; num <= total; num++ {
			nums = append(nums, num)
		}
		return nums, ""
	}
	room = max(room-1, 1) // the line of counts
	counts := map[fork.Status]int{}
	for num := 1; num <= total; num++ {
		s := m.sight.status(num)
		if s == fork.Running && len(nums) < room {
			nums = append(nums, num)
			continue
		}
		counts[s]++
	}
	var parts []string
	for _, s := range fork.Statuses {
		if n := counts[s]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, s))
		}
	}
	return nums, "and " + strings.Join(parts, ", ")
}

// row is one fork.
func (m liveModel) row(num int) string {
	s := m.sight.status(num)
	live := m.seen[num]
	turns, cost, action := "", "", ""
	if live.Turns > 0 {
		turns = fmt.Sprintf("turn %d", live.Turns)
	}
	if live.Cost != 0 {
		cost = dollars(live.Cost)
	}
	if s == fork.Running {
		action = doing(live)
	}
	digits := len(fmt.Sprint(m.sight.Progress.Total))
	left := fmt.Sprintf("%*d  ", digits, num)
	state := fmt.Sprintf("%-15s", flat(string(s))) // the longest status has 15 letters
	right := fmt.Sprintf("  %-8s  %9s  ", turns, cost)
	shown := fit(left+state+right+action, m.width)
	if !strings.HasPrefix(shown, left+state) {
		return shown
	}
	return left + m.paint.in(colourOf(s), state) + shown[len(left+state):]
}

// watchLive draws the run on the terminal behind Stderr until it has ended, or
// fails with errDetached.
func watchLive(ctx context.Context, env *Env, w *watcher) error {
	options := []tea.ProgramOption{tea.WithOutput(env.Stderr), tea.WithoutSignalHandler(), tea.WithFPS(10), tea.WithInput(nil)}
	// Keys are read only from a terminal that is ours to read: standard input
	// may be the prompt, or a script.
	if env.IsTerminal(env.Stdin) {
		options[len(options)-1] = tea.WithInput(env.Stdin)
	}
	prog := tea.NewProgram(newLiveModel(env.paintFor(env.Stderr)), options...)

	following, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() {
		_, err := w.follow(following, func(s sight) { prog.Send(s) })
		prog.Send(followed{err})
		done <- err
	}()
	model, err := prog.Run()
	stop()
	followErr := <-done
	if m, ok := model.(liveModel); ok && m.detached {
		return errDetached
	}
	if err != nil && !errors.Is(err, tea.ErrProgramKilled) {
		return fmt.Errorf("show progress: %w", err)
	}
	return followErr
}
