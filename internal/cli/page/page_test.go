package page_test

import (
	"testing"

	"github.com/sandbox-temporal/sandbox-temporal/internal/cli/page"
)

func TestOnlyPlainQuestionsGetAPage(t *testing.T) {
	for _, c := range []struct {
		args []string
		like []string // the same page; nil: the commands answer
	}{
		{nil, []string{"--help"}},
		{[]string{"help"}, []string{"--help"}},
		{[]string{"-h"}, []string{"--help"}},
		{[]string{"help", "fork"}, []string{"fork", "--help"}},
		{[]string{"fork", "-h"}, []string{"fork", "--help"}},
		{[]string{"help", "budget", "add"}, []string{"budget", "add", "--help"}},
		{[]string{"help", "exit-codes"}, []string{"help", "exit-codes"}},
		{[]string{"help", "frok"}, nil},
		{[]string{"help", ""}, nil},
		{[]string{"help", "--help"}, []string{"help", "help"}},
		{[]string{"help", "fork", "--help"}, nil},
		{[]string{"budget_add", "--help"}, nil},
		{[]string{"../page", "--help"}, nil},
		{[]string{"fork", "--prompt", "--help"}, nil},
		{[]string{"fork", "--home", "x", "--help"}, nil},
		{[]string{"fork"}, nil},
		{[]string{"--version"}, nil},
	} {
		text, ok := page.Asked(c.args)
		if ok != (c.like != nil) {
			t.Errorf("%q: page %v", c.args, ok)
		}
		if want, _ := page.Asked(c.like); c.like != nil && (len(want) == 0 || string(text) != string(want)) {
			t.Errorf("%q: not the page of %q:\n%s", c.args, c.like, text)
		}
	}
}
