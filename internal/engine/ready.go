package engine

import (
	"context"
	"log/slog"
	"maps"
	"slices"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	namespacepb "go.temporal.io/api/namespace/v1"
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/workflowservice/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// launchOptions are what the server itself is started with.
type launchOptions struct {
	Options
	file    string // the database
	address string // of the frontend, as its own parts dial it
	ports   ports
	logger  *slog.Logger
	failed  chan<- error // takes what the server cannot go on from
}

const (
	// readyWithin bounds the wait for the namespace; on an idle machine it
	// takes milliseconds.
	readyWithin = time.Minute
	// readyEvery is how often readiness is asked for.
	readyEvery = 5 * time.Millisecond
	// namespaceRefresh is how old a service's view of a namespace may be: the
	// default of the server's system.namespaceCacheRefreshInterval.
	namespaceRefresh = 2 * time.Second
)

// ready waits until the namespace can be worked in and brings its settings up
// to date. A server that has just started refuses calls as "not healthy yet"
// or does not know the namespace, whatever it has in its database.
func ready(ctx context.Context, address string, o Options) error {
	const op = "engine: wait for the namespace"
	ctx, cancel := context.WithTimeout(ctx, readyWithin)
	defer cancel()
	conn, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return fault.New(op, fault.Internal, "%w", err)
	}
	defer conn.Close()

	temporal := workflowservice.NewWorkflowServiceClient(conn)
	var ns *workflowservice.DescribeNamespaceResponse
	if err := until(ctx, func() (done bool, err error) {
		ns, err = temporal.DescribeNamespace(ctx, &workflowservice.DescribeNamespaceRequest{Namespace: o.Namespace})
		return err == nil, err
	}); err != nil {
		return fault.New(op, fault.Unreachable, "%w", err)
	}
	if got := ns.GetConfig().GetWorkflowExecutionRetentionTtl().AsDuration(); got != o.Retention {
		_, err := temporal.UpdateNamespace(ctx, &workflowservice.UpdateNamespaceRequest{
			Namespace: o.Namespace,
			Config:    &namespacepb.NamespaceConfig{WorkflowExecutionRetentionTtl: durationpb.New(o.Retention)},
		})
		if err != nil {
			return fault.New("engine: set the retention", fault.Internal, "%w", err)
		}
	}
	return searchAttributes(ctx, operatorservice.NewOperatorServiceClient(conn), o)
}

// searchAttributes adds those that are missing. A namespace that was made for
// this start has them already.
func searchAttributes(ctx context.Context, operator operatorservice.OperatorServiceClient, o Options) error {
	const op = "engine: search attributes"
	missing := func() (map[string]enumspb.IndexedValueType, error) {
		have, err := operator.ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: o.Namespace})
		if err != nil {
			return nil, err
		}
		todo := map[string]enumspb.IndexedValueType{}
		for name, want := range o.SearchAttributes {
			switch got, ok := have.GetCustomAttributes()[name]; {
			case !ok:
				todo[name] = want
			case got != want:
				return nil, fault.New(op, fault.Conflict, "%s is a %v in namespace %s, not a %v", name, got, o.Namespace, want)
			}
		}
		return todo, nil
	}
	if len(o.SearchAttributes) == 0 {
		return nil
	}
	todo, err := missing()
	if err == nil && len(todo) == 0 {
		return nil
	}
	if err == nil {
		_, err = operator.AddSearchAttributes(ctx, &operatorservice.AddSearchAttributesRequest{Namespace: o.Namespace, SearchAttributes: todo})
	}
	if err == nil {
		err = until(ctx, func() (bool, error) {
			todo, err := missing()
			if err == nil && len(todo) > 0 {
				err = fault.New(op, fault.Unavailable, "not there yet: %v", slices.Sorted(maps.Keys(todo)))
			}
			return err == nil, err
		})
	}
	if err != nil {
		return fault.Wrap(op, err)
	}
	// The frontend knows them now. The other services learn of them when they
	// look again, and until then refuse a workflow that sets one.
	return until(ctx, after(namespaceRefresh))
}

// after returns a condition that holds from d on.
func after(d time.Duration) func() (bool, error) {
	then := time.Now().Add(d)
	return func() (bool, error) { return time.Now().After(then), nil }
}

// until calls done every readyEvery until it says so or ctx ends; the error is
// then the last one of done, if it had any.
func until(ctx context.Context, done func() (bool, error)) error {
	tick := time.NewTicker(readyEvery)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok {
			return nil
		}
		select {
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return err
		case <-tick.C:
		}
	}
}
