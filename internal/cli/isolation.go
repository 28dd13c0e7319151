package cli

import (
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
)

// localProvider is the provider whose sandboxes come in tiers.
const localProvider = "local"

// A tier is one answer to how far sandboxes on the worker's own host are set
// apart from it. To the rest of the program it is a provider: the word of the
// user becomes that name before a plan is sent.
type tier struct {
	name     string // what users write after --isolation
	provider string
	text     string // what it is, a few words
	install  string // how to get it when this program has no such provider
}

// tiers has the one that is meant when nothing is said first.
var tiers = []tier{
	{"namespaces", localProvider, "the host's kernel, seen through namespaces and filters", ""},
	{"gvisor", "gvisor", "a kernel of its own, in user space, between agent and host",
		"Install gVisor's runsc on the worker's host (gvisor.dev/docs/user_guide/install) and a version of this program that can use it; or leave --isolation out."},
}

func tierNames() []string {
	var names []string
	for _, t := range tiers {
		names = append(names, t.name)
	}
	return names
}

// explainTiers describes every tier on a line of its own.
func explainTiers() string {
	var lines []string
	for _, t := range tiers {
		lines = append(lines, "  "+t.name+": "+t.text)
	}
	return strings.Join(lines, "\n")
}

// isolate turns the plan's tier into the provider that has it.
func isolate(env *Env, plan *fork.Plan) error {
	if plan.Isolation == "" {
		return nil
	}
	for _, t := range tiers {
		if t.name != plan.Isolation {
			continue
		}
		if plan.Provider != localProvider {
			return usage("Leave --isolation out, or use --provider local.", "--isolation %s is for the provider local, and the provider is %q", t.name, plan.Provider)
		}
		plan.Provider = t.provider
		if env.Providers == nil {
			return nil
		}
		set, err := env.Providers(env.Globals)
		if err != nil {
			return err
		}
		if _, err := set.Get(t.provider); err != nil && t.install != "" {
			return usage(t.install, "--isolation %s: this program has no provider %q", t.name, t.provider)
		}
		return nil
	}
	return usage("Use one of: "+strings.Join(tierNames(), ", ")+".", "--isolation: no tier %q", fork.Cut(flat(plan.Isolation), 60))
}

// tierOf returns the tier that a provider is, or "".
func tierOf(provider string) string {
	for _, t := range tiers {
		if t.provider == provider {
			return t.name
		}
	}
	return ""
}

// checkTiers says which tiers there are here.
func checkTiers(set sandbox.Set) Finding {
	var have, lack []string
	for _, t := range tiers {
		if _, err := set.Get(t.provider); err == nil {
			have = append(have, t.name)
		} else {
			lack = append(lack, t.name)
		}
	}
	f := Finding{Name: "isolation", Health: Good, Text: strings.Join(have, ", ")}
	if len(lack) > 0 {
		f.Text += "; not here: " + strings.Join(lack, ", ")
	}
	return f
}
