// Package egress is the one door from a sandbox to the rest of the world: an
// HTTP proxy that opens connections to hosts on a list and to nobody else.
//
//	CONNECT host:port -> is the name allowed -> what are its addresses
//	  -> are they all public -> dial one of them -> does the TLS hello name the host
//
// The name is looked up here and the address that was judged is the one that
// is dialled, so a name that changes its mind between the two gains nothing.
// What travels through a tunnel is encrypted and is not read: a host that is
// allowed is a host that data can be sent to.
package egress

import (
	"net/netip"
	"net/url"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// The policies that are words.
const (
	None       = "none"       // no way out
	Registries = "registries" // package registries and the forge of the repository
	Open       = "open"       // every public address
)

// registries are where package managers fetch from by default.
var registries = []string{
	"registry.npmjs.org", "registry.yarnpkg.com", "npm.jsr.io", // npm, yarn, pnpm
	"pypi.org", "files.pythonhosted.org", // pip, uv, poetry
	"proxy.golang.org", "sum.golang.org", // go
	"index.crates.io", "static.crates.io", "crates.io", // cargo
	"rubygems.org", "index.rubygems.org", // gem, bundler
	"repo.maven.apache.org", "repo1.maven.org", "plugins.gradle.org", "plugins-artifacts.gradle.org", // maven, gradle
	"repo.packagist.org", "packagist.org", // composer
	"api.nuget.org",         // dotnet
	"repo.hex.pm", "hex.pm", // mix
	"deb.debian.org", "security.debian.org", "archive.ubuntu.com", "security.ubuntu.com", "dl-cdn.alpinelinux.org", // the system's own
}

// companions serve files of a forge under another name.
var companions = map[string][]string{
	"github.com": {"api.github.com", "codeload.github.com", "raw.githubusercontent.com", "objects.githubusercontent.com", "release-assets.githubusercontent.com"},
}

// A Policy says which hosts a sandbox may reach. The zero value: none.
type Policy struct {
	open  bool
	hosts []string // lower case; "*.example.com" stands for what is below example.com
	word  string   // as the user wrote it
}

// ParsePolicy reads none, registries, open, or host names with commas between
// them, of which one may be the word registries. A name may begin with "*."
// for all names below it. repository is the URL that the run's repository was
// given by, or a path, which has no forge. The error is of kind Invalid.
func ParsePolicy(s, repository string) (Policy, error) {
	p := Policy{word: strings.TrimSpace(s)}
	for _, word := range strings.Split(p.word, ",") {
		switch word = strings.ToLower(strings.TrimSpace(word)); word {
		case None, Open:
			if strings.Contains(p.word, ",") {
				return Policy{}, fault.New("read egress policy", fault.Invalid, "%q stands alone, not in a list", word)
			}
			p.open = word == Open
		case Registries:
			p.hosts = append(p.hosts, registries...)
			if forge := forgeOf(repository); forge != "" {
				p.hosts = append(append(p.hosts, forge), companions[forge]...)
			}
		default:
			if !hostName(strings.TrimPrefix(word, "*.")) {
				return Policy{}, fault.New("read egress policy", fault.Invalid, "%q is no host name", word).
					Hinted("Use none, registries, open, or names such as registries,example.com,*.example.org. Addresses and ports cannot be named.")
			}
			p.hosts = append(p.hosts, word)
		}
	}
	slices.Sort(p.hosts)
	p.hosts = slices.Compact(p.hosts)
	return p, nil
}

// String returns the policy as the user wrote it.
func (p Policy) String() string {
	if p.word == "" {
		return None
	}
	return p.word
}

// Hosts returns the names that are allowed, in order; none when the policy is
// none or open.
func (p Policy) Hosts() []string { return slices.Clone(p.hosts) }

// Closed reports whether nothing at all can be reached.
func (p Policy) Closed() bool { return !p.open && len(p.hosts) == 0 }

// allows judges a name in lower case without its last dot.
func (p Policy) allows(host string) bool {
	if p.open {
		return true
	}
	for _, h := range p.hosts {
		if below, wild := strings.CutPrefix(h, "*."); h == host || wild && strings.HasSuffix(host, "."+below) {
			return true
		}
	}
	return false
}

// forgeOf returns the host of a repository's URL, in any of git's forms.
func forgeOf(repository string) string {
	host := ""
	if u, err := url.Parse(repository); err == nil && u.Scheme != "" && u.Scheme != "file" {
		host = u.Hostname()
	} else if before, _, ok := strings.Cut(repository, ":"); ok && !strings.Contains(before, "/") {
		_, host, ok = strings.Cut(before, "@") // git@host:path
		if !ok {
			host = before
		}
	}
	host = strings.ToLower(host)
	if !hostName(host) {
		return ""
	}
	return host
}

// hostName accepts a name of the DNS that has a dot in it and is no address.
func hostName(s string) bool {
	if len(s) > 253 || !strings.Contains(s, ".") {
		return false
	}
	if _, err := netip.ParseAddr(s); err == nil {
		return false
	}
	labels := strings.Split(s, ".")
	for _, l := range labels {
		if l == "" || len(l) > 63 || l[0] == '-' || strings.Trim(l, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return false
		}
	}
	// A last label of digits is how 0x7f.1 and 127.1 begin to be an address.
	return strings.Trim(labels[len(labels)-1], "0123456789") != "" && !strings.HasPrefix(labels[len(labels)-1], "0x")
}
