package local

import (
	"fmt"
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox"
	"github.com/sandbox-temporal/sandbox-temporal/internal/sandbox/conformance"
)

func TestConformance(t *testing.T) {
	o := testOptions(t.TempDir())
	p := New(o)
	checks := append(conformance.Checks[:len(conformance.Checks):len(conformance.Checks)],
		conformance.NewWorker(func() (sandbox.Provider, error) { return New(o), nil }))
	for i, check := range checks {
		t.Run(check.Name, func(t *testing.T) {
			if err := check.Run(t.Context(), p, fmt.Sprintf("c%d", i)); err != nil {
				t.Error(err)
			}
		})
	}
}
