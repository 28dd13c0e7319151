package logs

import (
	"bytes"
	"encoding/json"
	"io"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// removed stands in the place of a secret.
const removed = "[redacted]"

// least is how long a known secret must be to be looked for: a shorter one
// would tear holes into words.
const least = 6

// A redactor takes secrets out of whole lines. It stands behind the handler
// that formats them, so that it does not matter how a secret came into the
// line: as a message, a value, an error, or deep in a structure.
type redactor struct {
	to      io.Writer
	secrets func() []string
}

// Write writes the line without its secrets. It reports the length of what it
// was given.
func (r *redactor) Write(line []byte) (int, error) {
	n := len(line)
	out := line
	if r.secrets != nil {
		out = scrub(out, r.secrets())
	}
	for _, p := range patterns {
		out = p.ReplaceAll(out, []byte("${1}"+removed+"${2}"))
	}
	if _, err := r.to.Write(out); err != nil {
		return 0, err
	}
	return n, nil
}

// scrub takes known secrets out, however they were written.
func scrub(line []byte, secrets []string) []byte {
	var all []string
	for _, s := range secrets {
		if len(s) < least {
			continue
		}
		quoted := strconv.Quote(s)
		all = append(all, s, quoted[1:len(quoted)-1], inJSON(s, true), inJSON(s, false), url.QueryEscape(s), url.PathEscape(s))
	}
	// The longest first: of two that overlap, none may leave its end.
	slices.SortFunc(all, func(a, b string) int { return len(b) - len(a) })
	for _, s := range slices.Compact(all) {
		line = bytes.ReplaceAll(line, []byte(s), []byte(removed))
	}
	return line
}

// inJSON returns how s stands between the quotes of a JSON string.
func inJSON(s string, html bool) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(html)
	if e.Encode(s) != nil { // a string: it cannot be
		return s
	}
	text := strings.TrimSpace(b.String())
	return text[1 : len(text)-1]
}

// patterns are what secrets look like, also those that nobody told us of. What
// is captured stays.
var patterns = compile(
	`sbxt-[A-Za-z0-9_-]{20,}`,                                   // the gateway's tokens of forks
	`\bsk-[A-Za-z0-9_-]{16,}`,                                   // Anthropic, OpenAI
	`gh[pousr]_[A-Za-z0-9]{16,}`,                                // GitHub
	`github_pat_[A-Za-z0-9_]{20,}`,                              // GitHub, fine-grained
	`glpat-[A-Za-z0-9_-]{16,}`,                                  // GitLab
	`e2b_[A-Za-z0-9]{16,}`,                                      // E2B
	`\b(?:AKIA|ASIA)[A-Z0-9]{16}\b`,                             // AWS
	`\beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`, // JSON web tokens, Temporal Cloud's API keys among them
	`-----BEGIN [A-Z ]*PRIVATE KEY-----[^"]*`,
	`(?i)(\bbearer )[A-Za-z0-9._~+/-]{8,}=*`,
	`(?i)(\bbasic )[A-Za-z0-9+/]{12,}=*`,
	`(://[^/\s:@"]*:)[^/\s@"]+(@)`, // a password in a URL
)

func compile(all ...string) []*regexp.Regexp {
	list := make([]*regexp.Regexp, len(all))
	for i, p := range all {
		list[i] = regexp.MustCompile(p)
	}
	return list
}
