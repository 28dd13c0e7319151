package cli

import (
	"fmt"
	"strings"
	"testing"

	tea "github.com/charmbracelet/bubbletea"
	"github.com/charmbracelet/lipgloss"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// feed gives the model its messages and returns what it became.
func feed(t *testing.T, m liveModel, msgs ...tea.Msg) (liveModel, bool) {
	t.Helper()
	quit := false
	for _, msg := range msgs {
		next, cmd := m.Update(msg)
		m = next.(liveModel)
		if cmd != nil {
			_, quit = cmd().(tea.QuitMsg)
		}
	}
	return m, quit
}

func look(st step) sight { return sight{Progress: st.p, Live: st.live} }

func TestLiveViewShowsEveryFork(t *testing.T) {
	st := at(map[int]fork.Live{2: working(4, 12_300_000, "Bash go test ./...")}, fork.Success, fork.Running, fork.Pending)
	st.p.Cost, st.p.Budget = 30_000_000, fork.Dollar
	m, quit := feed(t, newLiveModel(false), tea.WindowSizeMsg{Width: 80, Height: 24},
		look(at(map[int]fork.Live{1: working(7, 30_000_000, "Write main.go")}, fork.Running, fork.Pending, fork.Pending)), look(st))
	want := `sandbox-orch-0123abcd  running · 1 of 3 done · $0.0423 of $1.0000 · 0s
1  success          turn 7      $0.0300  
2  running          turn 4      $0.0123  Bash go test ./...
3  pending                               
q detaches; the run goes on`
	if got := m.View(); got != want || quit {
		t.Errorf("quit %v, view:\n%s\nwant:\n%s", quit, got, want)
	}
}

func TestLiveViewFoldsWhatDoesNotFit(t *testing.T) {
	statuses := make([]fork.Status, 1000)
	live := map[int]fork.Live{}
	for i := range statuses {
		switch {
		case i < 300:
			statuses[i] = fork.Success
		case i < 350:
			statuses[i] = fork.Running
			live[i+1] = working(i, 1, "x")
		default:
			statuses[i] = fork.Pending
		}
	}
	st := at(live, statuses...)
	for _, height := range []int{1, 2, 4, 5, 24, 60, 1200} {
		m, _ := feed(t, newLiveModel(false), tea.WindowSizeMsg{Width: 60, Height: height}, look(st))
		view := m.View()
		if n := strings.Count(view, "\n") + 1; n > max(height-1, 4) {
			t.Errorf("%d lines on a terminal of %d", n, height)
		}
		if height == 24 && (!strings.Contains(view, "and 650 pending, 30 running, 300 success") || !strings.Contains(view, "\n 301  running")) {
			t.Errorf("view:\n%s", view)
		}
		if height == 60 && !strings.Contains(view, "and 650 pending, 300 success\n") {
			t.Errorf("view:\n%s", view)
		}
	}
}

func TestLiveViewStaysInItsColumns(t *testing.T) {
	st := at(map[int]fork.Live{1: working(4, 12_300_000, strings.Repeat("日本語 ", 50))}, fork.Running, fork.BudgetExceeded)
	for _, width := range []int{1, 5, 20, 33, 80} {
		for _, p := range []paint{false, true} {
			s := look(st)
			s.Trouble = strings.Repeat("trouble ", 20)
			m, _ := feed(t, newLiveModel(p), tea.WindowSizeMsg{Width: width, Height: 24}, s)
			for line := range strings.SplitSeq(m.View(), "\n") {
				if lipgloss.Width(line) > width {
					t.Errorf("width %d: %q has %d", width, line, lipgloss.Width(line))
				}
			}
		}
	}
}

func TestLiveViewDetachesOnItsKeys(t *testing.T) {
	key := func(s string) tea.KeyMsg { return tea.KeyMsg{Type: tea.KeyRunes, Runes: []rune(s)} }
	for name, msg := range map[string]tea.Msg{
		"q": key("q"), "ctrl+c": tea.KeyMsg{Type: tea.KeyCtrlC}, "ctrl+d": tea.KeyMsg{Type: tea.KeyCtrlD}, "a signal": tea.InterruptMsg{},
	} {
		m, quit := feed(t, newLiveModel(false), look(at(nil, fork.Running)), msg)
		if !quit || !m.detached || !strings.Contains(m.View(), "running") {
			t.Errorf("%s: quit %v, detached %v, view %q", name, quit, m.detached, m.View())
		}
	}
	for _, msg := range []tea.Msg{key("x"), key("c"), tea.KeyMsg{Type: tea.KeyEnter}, tea.KeyMsg{Type: tea.KeyEsc}} {
		if m, quit := feed(t, newLiveModel(false), msg); quit || m.detached {
			t.Errorf("%v ended it", msg)
		}
	}
}

func TestLiveViewLeavesNoTraceInTheEnd(t *testing.T) {
	m, quit := feed(t, newLiveModel(false), look(at(nil, fork.Success)), followed{})
	if !quit || m.detached || m.View() != "" {
		t.Errorf("quit %v, detached %v, view %q", quit, m.detached, m.View())
	}
}

func TestLiveViewShowsTroubleAndKeepsTheRest(t *testing.T) {
	s := look(at(nil, fork.Running))
	s.Trouble = "connection refused"
	m, _ := feed(t, newLiveModel(false), s)
	if v := m.View(); !strings.Contains(v, "waiting for Temporal: connection refused") || !strings.Contains(v, "1  running") {
		t.Errorf("view:\n%s", v)
	}
	m, _ = feed(t, m, look(at(nil, fork.Running)))
	if v := m.View(); strings.Contains(v, "waiting") {
		t.Errorf("view:\n%s", v)
	}
}

func TestLiveViewBeforeTheFirstLook(t *testing.T) {
	if v := newLiveModel(false).View(); !strings.Contains(v, "looking") {
		t.Errorf("view %q", v)
	}
	m, _ := feed(t, newLiveModel(false), sight{Trouble: "no"}, tea.WindowSizeMsg{})
	if v := m.View(); v == "" || fmt.Sprint(m.width) == "0" {
		t.Errorf("view %q", v)
	}
}
