package egress

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

func TestPolicyAllowsWhatItNames(t *testing.T) {
	for _, row := range []struct {
		policy, repository, host string
		want                     bool
	}{
		{"none", "https://github.com/a/b", "github.com", false},
		{"", "", "example.com", false},
		{"open", "", "example.com", true},
		{"registries", "", "registry.npmjs.org", true},
		{"registries", "", "proxy.golang.org", true},
		{"registries", "", "github.com", false},
		{"registries", "", "evil-registry.npmjs.org", false},
		{"registries", "", "registry.npmjs.org.evil.com", false},
		{"registries", "https://github.com/a/b.git", "github.com", true},
		{"registries", "https://github.com/a/b.git", "codeload.github.com", true},
		{"registries", "git@gitlab.com:a/b.git", "gitlab.com", true},
		{"registries", "ssh://git@git.example.com:22/a/b", "git.example.com", true},
		{"registries", "https://key:secret@forge.example.com/a", "forge.example.com", true},
		{"registries", "/home/me/repo", "home", false},
		{"registries", "./a.b:c/d", "a.b", false},
		{"registries", "http://127.0.0.1:3000/a/b", "127.0.0.1", false},
		{"registries, Example.com", "", "example.com", true},
		{"*.example.com", "", "a.b.example.com", true},
		{"*.example.com", "", "example.com", false},
		{"*.example.com", "", "badexample.com", false},
	} {
		p, err := ParsePolicy(row.policy, row.repository)
		if row.policy == "" {
			p, err = Policy{}, nil
		}
		if err != nil {
			t.Errorf("%q: %v", row.policy, err)
			continue
		}
		if got := p.allows(row.host); got != row.want {
			t.Errorf("policy %q for repository %q: %s allowed %v, want %v", row.policy, row.repository, row.host, got, row.want)
		}
	}
}

func TestPolicyThatCannotBeIsInvalid(t *testing.T) {
	for _, s := range []string{"", ",", "none,open", "registries,none", "127.0.0.1", "[::1]", "0x7f.1", "127.1", "a b.com", "http://example.com", "example.com:443", "localhost", "*", "*.*.com", "exa\nmple.com"} {
		if _, err := ParsePolicy(s, ""); fault.KindOf(err) != fault.Invalid {
			t.Errorf("policy %q: %v, want an invalid one", s, err)
		}
	}
}

func TestOnlyPublicAddressesArePublic(t *testing.T) {
	public4 := []string{"8.8.8.8", "140.82.121.3", "2606:4700::1111", "::ffff:8.8.8.8"}
	for _, s := range slices.Concat(public4, []string{
		"127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "168.63.129.16", "0.0.0.0", "255.255.255.255", "224.0.0.1",
		"::1", "::", "fe80::1", "fd00:ec2::254", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "::127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::", "ff02::1", "2001:db8::1", "fe80::1%lo",
	}) {
		if got, want := public(netip.MustParseAddr(s)), slices.Contains(public4, s); got != want {
			t.Errorf("%s is public: %v, want %v", s, got, want)
		}
	}
}

func FuzzParsePolicy(f *testing.F) {
	f.Add("registries,example.com", "git@github.com:a/b")
	f.Add("*.a.b", "https://u:p@h.x/y")
	f.Fuzz(func(t *testing.T, s, repository string) {
		p, err := ParsePolicy(s, repository)
		if err != nil {
			return
		}
		for _, h := range []string{"127.0.0.1", "localhost", "", "169.254.169.254", "[::1]"} {
			if !p.open && p.allows(h) {
				t.Errorf("%q allows %q", s, h)
			}
		}
	})
}
