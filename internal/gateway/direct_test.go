package gateway

import (
	"context"
	"testing"
	"time"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

func (r *rig) lend(a Account, attempt int) (Loan, error) {
	return r.Lend(r.t.Context(), a, "sonnet", attempt)
}

func TestWhatIsLentIsReservedUntilItIsRepaid(t *testing.T) {
	r := newRig(t)
	r.limits.wait = 50 * time.Millisecond // for a budget that is lent out whole
	a := Account{Run: "r", Fork: 1, RunBudget: fork.Dollar, ForkBudget: fork.Dollar / 2}
	loan, err := r.lend(a, 1)
	if err != nil || loan.APIKey != realKey || loan.BaseURL != r.up.URL || loan.Limit != fork.Dollar/2 {
		t.Fatalf("%v %v", loan.Limit, err)
	}
	// Another fork of the run gets what is left of the run's budget.
	b := Account{Run: "r", Fork: 2, RunBudget: fork.Dollar, ForkBudget: fork.Dollar}
	if loan, err := r.lend(b, 1); err != nil || loan.Limit != fork.Dollar/2 {
		t.Errorf("%v %v", loan.Limit, err)
	}
	if _, err := r.lend(Account{Run: "r", Fork: 3, RunBudget: fork.Dollar, ForkBudget: fork.Dollar}, 1); fault.KindOf(err) != fault.OverBudget {
		t.Errorf("a third fork: %v", err)
	}
	used := fork.Usage{Cost: fork.Dollar / 10, InputTokens: 1, OutputTokens: 2, CacheReadTokens: 3, CacheWriteTokens: 4}
	for range 2 { // an activity can be done twice
		if err := r.Repay(t.Context(), "r", 1, 1, used); err != nil {
			t.Fatal(err)
		}
	}
	if got := r.usage("r", 1); got.Usage != used || got.Calls != 1 {
		t.Errorf("%+v", got)
	}
	// What an attempt left over is the next one's.
	if loan, err := r.lend(a, 2); err != nil || loan.Limit != fork.Dollar*4/10 {
		t.Errorf("the second attempt: %v %v", loan.Limit, err)
	}
	// One that nobody can tell the cost of is charged whole.
	if err := r.WriteOff(t.Context(), "r", 1, 2); err != nil {
		t.Fatal(err)
	}
	if err := r.WriteOff(t.Context(), "r", 1, 1); err != nil { // it was repaid
		t.Fatal(err)
	}
	if got := r.usage("r", 1); got.Cost != fork.Dollar/2 {
		t.Errorf("%+v", got)
	}
	if err := r.Repay(t.Context(), "r", 9, 1, used); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a fork that nothing was lent to: %v", err)
	}
}

func TestALoanOutlivesACrash(t *testing.T) {
	dir, up := t.TempDir(), newUpstream(t)
	a := Account{Run: "r", Fork: 1, ForkBudget: fork.Dollar}
	t.Run("first", func(t *testing.T) {
		if _, err := openRig(t, dir, up).lend(a, 1); err != nil {
			t.Fatal(err)
		}
	})
	r := openRig(t, dir, up)
	if got := r.usage("r", 1); got.Cost != fork.Dollar {
		t.Errorf("charged %s until somebody tells", got.Cost)
	}
	if err := r.Repay(t.Context(), "r", 1, 1, fork.Usage{Cost: fork.Dollar / 4}); err != nil {
		t.Fatal(err)
	}
	if got := r.usage("r", 1); got.Cost != fork.Dollar/4 {
		t.Errorf("%+v", got)
	}
	// An attempt that was lent to and never began is lent to again.
	for range 2 {
		if loan, err := r.lend(a, 2); err != nil || loan.Limit != fork.Dollar*3/4 {
			t.Errorf("%v %v", loan.Limit, err)
		}
	}
}

func TestNothingIsLentThatNoBudgetHolds(t *testing.T) {
	r := newRig(t, func(o *Options) { o.Ledger.DayBudget = fork.Dollar })
	for _, a := range []Account{{Run: "r", Fork: 1}, {Run: "r", Fork: 1, RunBudget: fork.Dollar}} {
		if _, err := r.lend(a, 1); fault.KindOf(err) != fault.Invalid || fault.HintOf(err) == "" {
			t.Errorf("%+v: %v", a, err)
		}
	}
	if loan, err := r.lend(Account{Run: "r", Fork: 1, ForkBudget: 5 * fork.Dollar}, 1); err != nil || loan.Limit != fork.Dollar {
		t.Errorf("more than the day has: %v %v", loan.Limit, err)
	}
	free := newRig(t)
	if loan, err := free.lend(Account{Run: "r", Fork: 1}, 1); err != nil || loan.Limit != 0 {
		t.Errorf("without any budget: %v %v", loan.Limit, err)
	}
	keyless := newRig(t, func(o *Options) {
		o.Credentials = func(context.Context) (Credentials, error) { return Credentials{}, nil }
	})
	if _, err := keyless.lend(Account{Run: "r", Fork: 1}, 1); fault.KindOf(err) != fault.Denied {
		t.Errorf("without a key: %v", err)
	}
	if err := keyless.Ready(t.Context(), Anthropic); fault.KindOf(err) != fault.Denied {
		t.Errorf("ready without a key: %v", err)
	}
	if err := r.Ready(t.Context(), Anthropic); err != nil {
		t.Error(err)
	}
	if err := r.Ready(t.Context(), OpenAI); fault.KindOf(err) != fault.Denied {
		t.Errorf("ready without the other key: %v", err)
	}
}
