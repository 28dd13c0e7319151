package cli

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// reportColumns are those of the table of a run's forks.
var reportColumns = []column{
	{"FORK", true}, {"STATUS", false}, {"TURNS", true}, {"COST", true}, {"+/-", true}, {"FILES", true}, {"DURATION", true}, {"BRANCH", false},
}

// maxPending bounds how many rows say no more than that a fork waits.
const maxPending = 10

// printReport prints the run on standard output, as it stands or as it ended.
// Live tells of the forks that still run; nil when none does.
func printReport(env *Env, rep fork.Report, live map[int]fork.Live, output string) error {
	if output == "json" {
		if rep.Results == nil {
			rep.Results = []fork.Result{} // scripts find a list, not null
		}
		return writeJSON(env.Stdout, rep)
	}
	p := env.paintFor(env.Stdout)
	var b strings.Builder
	if err := writeTable(&b, p, reportColumns, reportRows(rep, live)); err != nil {
		return err
	}
	b.WriteString(totals(rep, live) + "\n")
	writeUncertain(&b, rep)
	writeHeld(&b, rep.Progress)
	writeFailures(&b, rep)
	writeUnverified(&b, rep)
	if _, err := io.WriteString(env.Stdout, b.String()); err != nil {
		return err
	}
	sayNext(env, rep)
	return nil
}

func reportRows(rep fork.Report, live map[int]fork.Live) [][]cell {
	var rows [][]cell
	ended := map[int]fork.Result{}
	for _, r := range rep.Results {
		ended[r.ForkNum] = r
	}
	pending := 0
	// A report of a later version may name more forks than it has statuses.
	for num := 1; num <= max(len(rep.Statuses), rep.Total) && num <= fork.MaxForks; num++ {
		if r, ok := ended[num]; ok {
			rows = append(rows, resultRow(r))
			continue
		}
		status := fork.Pending
		if num <= len(rep.Statuses) {
			status = rep.Statuses[num-1]
		}
		if status == fork.Pending {
			if pending++; pending > maxPending {
				continue
			}
		}
		l := live[num]
		row := []cell{{fmt.Sprint(num), plain}, {flat(string(status)), colourOf(status)}, {"", plain}, {"", plain}, {}, {}, {}, {}}
		if l.Turns > 0 {
			row[2].text = fmt.Sprint(l.Turns)
		}
		if l.Cost > 0 {
			row[3].text = dollars(l.Cost)
		}
		if what := doing(l); what != "" && status == fork.Running {
			row[7] = cell{"(" + fit(what, 50) + ")", dim}
		}
		rows = append(rows, row)
	}
	if pending > maxPending {
		rows = append(rows, []cell{{"…", dim}, {fmt.Sprintf("%d more pending", pending-maxPending), dim}, {}, {}, {}, {}, {}, {}})
	}
	return rows
}

func resultRow(r fork.Result) []cell {
	status := string(r.Status)
	if r.Verify != nil {
		if r.Verify.Status == fork.Success {
			status += ", verified"
		} else {
			status += ", not verified"
		}
	}
	change, files := "", ""
	if r.Commit != "" {
		change, files = fmt.Sprintf("+%d/-%d", r.Insertions, r.Deletions), fmt.Sprint(r.FilesChanged)
	}
	branch := flat(r.Branch)
	if branch == "" && r.Status == fork.Success {
		branch = "(nothing changed)"
	}
	return []cell{
		{fmt.Sprint(r.ForkNum), plain}, {flat(status), colourOf(r.Status)}, {fmt.Sprint(r.NumTurns), plain}, {dollars(r.Cost), plain},
		{change, plain}, {files, plain}, {seconds(r.Duration), plain}, {branch, plain},
	}
}

// writeUncertain says how much of the cost may turn out not to be one.
func writeUncertain(b *strings.Builder, rep fork.Report) {
	var sum fork.USD
	for _, r := range rep.Results {
		sum += r.Pending
	}
	if sum > 0 {
		fmt.Fprintf(b, "up to %s of the cost is that of message batches which had not ended: sandbox-temporal report has what they did cost\n", dollars(sum))
	}
}

// totals is the line below the table.
func totals(rep fork.Report, live map[int]fork.Live) string {
	s := sight{Progress: rep.Progress, Live: live}
	parts := []string{fmt.Sprintf("%d of %d succeeded", rep.Success, rep.Total)}
	for _, c := range []struct {
		n    int
		word string
	}{{rep.Failed, "did not"}, {rep.Running, "running"}, {rep.Pending, "pending"}} {
		if c.n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", c.n, c.word))
		}
	}
	if !rep.Status.Ended() && (rep.Paused || len(rep.Held) > 0) {
		parts = append(parts, rep.Words())
	}
	money := dollars(s.spent())
	if rep.Budget > 0 {
		money += " of " + dollars(rep.Budget)
	}
	return strings.Join(append(parts, money, seconds(rep.Duration)), " · ")
}

// reasons are the forks of a run by why something is so of them, in the order
// in which each reason was first met.
type reasons[K comparable] struct {
	order []K
	forks map[K][]string // their numbers
}

func (r *reasons[K]) add(why K, num int) {
	if r.forks == nil {
		r.forks = map[K][]string{}
	}
	if r.forks[why] == nil {
		r.order = append(r.order, why)
	}
	r.forks[why] = append(r.forks[why], fmt.Sprint(num))
}

// writeHeld says which forks wait for more money, each reason once.
func writeHeld(b *strings.Builder, p fork.Progress) {
	if p.Status.Ended() {
		return
	}
	var held reasons[string]
	for _, h := range p.Held {
		held.add(flat(h.Why), h.ForkNum)
	}
	for _, why := range held.order {
		fmt.Fprintf(b, "\n%s (paused): %s\n    Let it go on with: %s budget add %s USD\n", forksNamed(held.forks[why]), why, program, flat(p.Run))
	}
}

// forksNamed is "fork 1" or "forks 1, 2 and 10 more".
func forksNamed(nums []string) string {
	const most = 10
	switch n := len(nums); {
	case n == 1:
		return "fork " + nums[0]
	case n > most:
		return fmt.Sprintf("forks %s and %d more", strings.Join(nums[:most], ", "), n-most)
	}
	return "forks " + strings.Join(nums, ", ")
}

// writeFailures says why forks failed, each reason once.
func writeFailures(b *strings.Builder, rep fork.Report) {
	type reason struct{ status, text, hint string }
	var failed reasons[reason]
	for _, r := range rep.Results {
		if r.Status == fork.Success || r.Error == "" || r.Error == rep.Error {
			continue
		}
		failed.add(reason{flat(string(r.Status)), clean(strings.TrimSpace(r.Error)), flat(r.Hint)}, r.ForkNum)
	}
	if rep.Error != "" {
		fmt.Fprintf(b, "\nthe run: %s\n", indent(clean(strings.TrimSpace(rep.Error))))
		if rep.Hint != "" {
			fmt.Fprintf(b, "    %s\n", flat(rep.Hint))
		}
	}
	for _, why := range failed.order {
		fmt.Fprintf(b, "\n%s (%s): %s\n", forksNamed(failed.forks[why]), strings.ReplaceAll(why.status, "_", " "), indent(why.text))
		if why.hint != "" {
			fmt.Fprintf(b, "    %s\n", why.hint)
		}
	}
}

// writeUnverified says why work was not found good, each reason once.
func writeUnverified(b *strings.Builder, rep fork.Report) {
	var unverified reasons[string]
	for _, r := range rep.Results {
		if r.Verify == nil || r.Verify.Status == fork.Success {
			continue
		}
		why := strings.TrimSpace(clean(r.Verify.Output))
		if r.Verify.Outcome() == fork.VerifyFailed {
			why = fmt.Sprintf("--verify ended with status %d:\n%s", r.Verify.ExitCode, why)
		}
		unverified.add(why, r.ForkNum)
	}
	for _, why := range unverified.order {
		forks := unverified.forks[why]
		fmt.Fprintf(b, "\n%s (not verified): %s\n    See all of it with: %s logs %s/%s --verify\n", forksNamed(forks), indent(why), program, flat(rep.Run), forks[0])
	}
}

// indent puts the lines of s after the first under one another.
func indent(s string) string { return strings.ReplaceAll(s, "\n", "\n    ") }

// sayNext tells, on standard error, what can be done with a run's forks.
func sayNext(env *Env, rep fork.Report) {
	usable := func(r fork.Result) bool { return r.Status == fork.Success && r.Commit != "" }
	i := slices.IndexFunc(rep.Results, func(r fork.Result) bool {
		return usable(r) && r.Verify != nil && r.Verify.Status == fork.Success
	})
	if i < 0 {
		i = slices.IndexFunc(rep.Results, usable)
	}
	if i < 0 {
		return
	}
	id := fork.Spec{Run: rep.Run, Num: rep.Results[i].ForkNum}.ID()
	fmt.Fprintf(env.Stderr, "\nLook at one:  %s diff %s\nTake one:     %s apply %s\n", program, flat(id), program, flat(id))
}
