package orchestrator

import (
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fork"
)

// The search attributes by which runs and forks can be filtered.
var (
	attrRun    = temporal.NewSearchAttributeKeyKeyword("SandboxRun")
	attrFork   = temporal.NewSearchAttributeKeyInt64("SandboxFork")
	attrStatus = temporal.NewSearchAttributeKeyKeyword("SandboxStatus")
	attrRepo   = temporal.NewSearchAttributeKeyKeyword("SandboxRepo")
	attrModel  = temporal.NewSearchAttributeKeyKeyword("SandboxModel")
	attrCost   = temporal.NewSearchAttributeKeyFloat64("SandboxCostUSD")
)

// SearchAttributes are the names and types that a namespace must know before
// runs in it can be filtered. Runs work without them.
func SearchAttributes() map[string]enumspb.IndexedValueType {
	m := map[string]enumspb.IndexedValueType{}
	for _, k := range []temporal.SearchAttributeKey{attrRun, attrFork, attrStatus, attrRepo, attrModel, attrCost} {
		m[k.GetName()] = k.GetValueType()
	}
	return m
}

// runAttributes are what a run starts with.
func runAttributes(run string, plan fork.Plan) temporal.SearchAttributes {
	return temporal.NewSearchAttributes(
		attrRun.ValueSet(run), attrStatus.ValueSet(string(fork.Running)), attrRepo.ValueSet(keyword(plan.Repo)), attrModel.ValueSet(keyword(plan.Model)))
}

// childAttributes are those of fork num. A run that was started without any
// has forks without: the namespace may not know them.
func childAttributes(ctx workflow.Context, num int) temporal.SearchAttributes {
	mine := workflow.GetTypedSearchAttributes(ctx)
	run, ok := mine.GetKeyword(attrRun)
	if !ok {
		return temporal.SearchAttributes{}
	}
	repo, _ := mine.GetKeyword(attrRepo)
	model, _ := mine.GetKeyword(attrModel)
	return temporal.NewSearchAttributes(attrRun.ValueSet(run), attrFork.ValueSet(int64(num)), attrStatus.ValueSet(string(fork.Running)),
		attrRepo.ValueSet(repo), attrModel.ValueSet(model))
}

// upsertEnd records how a run or a fork ended, where attributes are in use.
func upsertEnd(ctx workflow.Context, status fork.Status, cost fork.USD) {
	if _, ok := workflow.GetTypedSearchAttributes(ctx).GetKeyword(attrRun); ok {
		_ = workflow.UpsertTypedSearchAttributes(ctx, attrStatus.ValueSet(string(status)), attrCost.ValueSet(cost.Float()))
	}
}

// keyword cuts s to what SQL visibility stores in a keyword column
// (VARCHAR(255)).
func keyword(s string) string { return fork.Cut(s, 200) }
