package sandbox

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// A Set is the providers that this process offers, by name.
type Set map[string]Provider

// NewSet panics on a duplicate name: the list is written in source.
func NewSet(providers ...Provider) Set {
	s := Set{}
	for _, p := range providers {
		if s[p.Name()] != nil {
			panic("sandbox: two providers named " + p.Name())
		}
		s[p.Name()] = p
	}
	return s
}

// Names returns the names users can write after --provider, sorted.
func (s Set) Names() []string { return slices.Sorted(maps.Keys(s)) }

// Get returns the named provider, or an error of kind fault.Invalid that says
// which ones there are.
func (s Set) Get(name string) (Provider, error) {
	if p, ok := s[name]; ok {
		return p, nil
	}
	return nil, &fault.Error{
		Op: "choose provider", Kind: fault.Invalid,
		Err:  fmt.Errorf("no provider %q", name),
		Hint: "Use one of: " + strings.Join(s.Names(), ", ") + ".",
	}
}

// Attach finds the provider that made ref and attaches to it.
func (s Set) Attach(ctx context.Context, ref Ref) (Sandbox, error) {
	p, err := s.Get(ref.Provider)
	if err != nil {
		return nil, err
	}
	return p.Attach(ctx, ref)
}
