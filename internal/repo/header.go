package repo

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strings"
)

// A bundleHeader is the part of a bundle before its pack; see
// gitformat-bundle(5).
type bundleHeader struct {
	format   string // sha1 or sha256
	requires []string
	refs     map[string]string
	size     int64 // where the pack begins
}

const (
	maxHeader   = 1 << 20 // bytes
	maxRequires = 10_000  // commits that a bundle builds on
	maxRefs     = 100
)

// readHeader reads the header of a bundle that a stranger made.
func readHeader(r io.Reader) (bundleHeader, error) {
	h := bundleHeader{format: "sha1", refs: map[string]string{}}
	in := bufio.NewReader(io.LimitReader(r, maxHeader))
	line := func() (string, error) {
		s, err := in.ReadString('\n')
		h.size += int64(len(s))
		if err != nil {
			return "", errors.New("the header of the bundle has no end")
		}
		return s[:len(s)-1], nil
	}
	first, err := line()
	if err != nil {
		return h, err
	}
	capable := first == "# v3 git bundle"
	if !capable && first != "# v2 git bundle" {
		return h, errors.New("this is no git bundle")
	}
	for {
		s, err := line()
		if err != nil {
			return h, err
		}
		id, rest, spaced := strings.Cut(s, " ")
		switch {
		case s == "":
			return h, nil
		case capable && strings.HasPrefix(s, "@"):
			format, ok := strings.CutPrefix(s, "@object-format=")
			if !ok || format != "sha1" && format != "sha256" || len(h.requires)+len(h.refs) > 0 {
				return h, fmt.Errorf("the bundle wants %q, which is not known here", cut(s, 80))
			}
			h.format = format
		case strings.HasPrefix(s, "-"):
			if id = id[1:]; !h.names(id) || len(h.requires) == maxRequires || len(h.refs) > 0 {
				return h, errors.New("the bundle builds on something that is no commit id")
			}
			h.requires = append(h.requires, id)
		default:
			if _, twice := h.refs[rest]; !spaced || !h.names(id) || twice || len(h.refs) == maxRefs {
				return h, errors.New("a ref of the bundle cannot be understood")
			}
			h.refs[rest] = id
		}
	}
}

// names reports whether id is an id in the bundle's format.
func (h bundleHeader) names(id string) bool {
	return checkCommit(id) == nil && objectFormat(id) == h.format
}

func cut(s string, n int) string { return s[:min(n, len(s))] }
