package orchestrator

import (
	"context"
	"errors"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// SetUpNamespace makes the namespace in the cluster of c when it is not there,
// keeping what has ended for as long as retention says, and gives it the
// [SearchAttributes] that it lacks. It reports whether it made the namespace,
// and which attributes it added. A second call changes nothing. Temporal Cloud
// refuses both to clients, with fault.Denied or fault.Unsupported.
func SetUpNamespace(ctx context.Context, c client.Client, namespace string, retention time.Duration) (made bool, added []string, err error) {
	const op = "set up namespace"
	_, err = c.WorkflowService().RegisterNamespace(ctx, &workflowservice.RegisterNamespaceRequest{
		Namespace: namespace, WorkflowExecutionRetentionPeriod: durationpb.New(retention),
	})
	var there *serviceerror.NamespaceAlreadyExists
	if made = err == nil; err != nil && !errors.As(err, &there) {
		return false, nil, fault.Wrap(op, namespaceFault(err))
	}
	err = await(ctx, func() error { // other services of the cluster hear of a new namespace later
		added, err = addAttributes(ctx, c, namespace)
		return err
	})
	if err == nil && len(added) > 0 {
		awaitAttributes(ctx, c, namespace)
	}
	return made, added, fault.Wrap(op, namespaceFault(err))
}

// knowsAttributes asks whether the namespace has all of [SearchAttributes]. A
// cluster that does not say has none: runs work without them.
func knowsAttributes(ctx context.Context, c client.Client, namespace string) bool {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	have, err := c.OperatorService().ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: namespace})
	if err != nil {
		return false
	}
	for name, kind := range SearchAttributes() {
		if got, ok := have.GetCustomAttributes()[name]; !ok || got != kind {
			return false
		}
	}
	return true
}

// awaitAttributes returns when lists can be asked by attributes that were just
// added: until then no run can be started with them. It gives up with ctx.
func awaitAttributes(ctx context.Context, c client.Client, namespace string) {
	for {
		_, err := c.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{
			Namespace: namespace, PageSize: 1, Query: attrStatus.GetName() + " = 'running' AND " + attrCost.GetName() + " > 0",
		})
		var unknown *serviceerror.InvalidArgument
		if !errors.As(err, &unknown) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond): // between two questions to another process
		}
	}
}

func addAttributes(ctx context.Context, c client.Client, namespace string) ([]string, error) {
	have, err := c.OperatorService().ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: namespace})
	if err != nil {
		return nil, err
	}
	var names []string
	lacking := map[string]enumspb.IndexedValueType{}
	for name, kind := range SearchAttributes() {
		switch got, ok := have.GetCustomAttributes()[name]; {
		case !ok:
			lacking[name] = kind
			names = append(names, name)
		case got != kind:
			return nil, fault.New("", fault.Conflict, "%s is a search attribute of type %v there, and not %v", name, got, kind)
		}
	}
	if len(lacking) == 0 {
		return nil, nil
	}
	_, err = c.OperatorService().AddSearchAttributes(ctx, &operatorservice.AddSearchAttributesRequest{Namespace: namespace, SearchAttributes: lacking})
	return names, err
}

// await repeats do while the cluster says that it does not know the namespace,
// until ctx ends.
func await(ctx context.Context, do func() error) error {
	for {
		err := do()
		var unknown *serviceerror.NamespaceNotFound
		if !errors.As(err, &unknown) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(200 * time.Millisecond): // between two questions to another process
		}
	}
}

func namespaceFault(err error) error {
	var unimplemented *serviceerror.Unimplemented
	if errors.As(err, &unimplemented) {
		err = fault.New("", fault.Unsupported, "%w", err)
	} else {
		err = Fault(err)
	}
	if kind := fault.KindOf(err); kind == fault.Denied || kind == fault.Unsupported {
		return &fault.Error{Kind: kind, Err: err, Hint: "On Temporal Cloud, make namespaces and search attributes with its web page or with tcld; see docs/operations.md."}
	}
	return err
}
