package repo

import (
	"regexp"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// branchName checks what a user wrote after --branch by the rules of
// git-check-ref-format(1), and returns it without "refs/heads/".
func branchName(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	name = strings.TrimPrefix(name, "refs/heads/")
	if why := badRef(name); why != "" || strings.HasPrefix(name, "-") || name == "HEAD" || len(name) > 240 {
		if why == "" {
			why = "no name for a branch"
		}
		return "", fault.New("", fault.Invalid, "branch %q: %s", name, why).
			Hinted("Give the name of a branch as \"git branch\" lists it.")
	}
	return name, nil
}

// badRef says why git would not take name as a part of a ref, or "".
func badRef(name string) string {
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "":
			return "an empty part between slashes"
		case strings.HasPrefix(part, "."):
			return "a part that starts with a dot"
		case strings.HasSuffix(part, ".lock"):
			return "a part that ends with .lock"
		}
	}
	switch {
	case name == "@" || strings.Contains(name, "@{"):
		return "@ has a meaning of its own"
	case strings.Contains(name, ".."):
		return "two dots name a range"
	case strings.HasSuffix(name, "."):
		return "a dot at the end"
	case strings.ContainsAny(name, " ~^:?*[\\\x7f"):
		return "a character that git does not take"
	case strings.ContainsFunc(name, func(r rune) bool { return r < ' ' }):
		return "a control character"
	}
	return ""
}

// checkRun checks the id of a run: it becomes a file name and part of a ref.
func checkRun(run string, num int) error {
	ok := regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`).MatchString(run)
	if !ok || badRef(run) != "" || num < 1 {
		return fault.New("", fault.Invalid, "%q/%d is not the name of a fork", run, num).
			Hinted("Write it as <run>/<number>, for example sandbox-orch-0a1b2c3d/1.")
	}
	return nil
}

// checkCommit checks that id is a full commit id.
func checkCommit(id string) error {
	if !regexp.MustCompile(`^([0-9a-f]{40}|[0-9a-f]{64})$`).MatchString(id) {
		return fault.New("", fault.Invalid, "%q is not a full commit id", id)
	}
	return nil
}

// near returns up to five of names that look most like want, best first.
func near(want string, names []string) []string {
	type scored struct {
		name string
		dist int
	}
	var all []scored
	for _, n := range names {
		if len(n) > 240 || len(want) > 240 {
			continue
		}
		a, b := strings.ToLower(want), strings.ToLower(n)
		d := fault.Distance(a, b)
		if strings.Contains(a, b) || strings.Contains(b, a) {
			d = min(d, 1)
		}
		all = append(all, scored{n, d})
	}
	slices.SortStableFunc(all, func(a, b scored) int { return a.dist - b.dist })
	var out []string
	for _, c := range all[:min(5, len(all))] {
		out = append(out, c.name)
	}
	return out
}
