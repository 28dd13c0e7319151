//go:build !noembed

package engine

import (
	"context"
	"fmt"
	"math"
	"net"
	"strconv"
	"time"

	"go.temporal.io/server/common/authorization"
	"go.temporal.io/server/common/cluster"
	"go.temporal.io/server/common/config"
	"go.temporal.io/server/common/dynamicconfig"
	"go.temporal.io/server/common/headers"
	"go.temporal.io/server/common/membership/static"
	"go.temporal.io/server/common/persistence/sql/sqlplugin"
	sqliteplugin "go.temporal.io/server/common/persistence/sql/sqlplugin/sqlite"
	"go.temporal.io/server/common/primitives"
	sqliteschema "go.temporal.io/server/schema/sqlite"
	"go.temporal.io/server/temporal"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Embedded says whether this build holds the server.
const Embedded = true

// clusterName is upstream's own for a server that stands alone.
const clusterName = "active"

// builtSchema returns the schema that this build's server wants. Upstream does
// not export the statements, only a function that executes them, so that is
// given somewhere to execute them that writes them down.
func builtSchema() (schema, error) {
	rec := &recorder{}
	if err := sqliteschema.SetupSchemaOnDB(rec); err != nil {
		return schema{}, err
	}
	if len(rec.statements) == 0 {
		return schema{}, fmt.Errorf("the server has no schema")
	}
	return schema{server: headers.ServerVersion, statements: rec.statements}, nil
}

type recorder struct {
	sqlplugin.AdminDB // nil: anything but Exec would be a change upstream
	statements        []string
}

func (r *recorder) Exec(stmt string, args ...any) error {
	if len(args) > 0 {
		return fmt.Errorf("a statement of the schema takes arguments: %s", stmt)
	}
	r.statements = append(r.statements, stmt)
	return nil
}

// launch starts the server on a database that prepare has seen to. When ctx
// ends first it still waits until the server can be stopped, about a second.
func launch(ctx context.Context, o launchOptions) (interface{ Stop() error }, error) {
	store := sqlConfig(o.file)
	ns, err := sqliteschema.NewNamespaceConfig(clusterName, o.Namespace, false, o.SearchAttributes)
	if err != nil {
		return nil, fault.New("namespace", fault.Invalid, "%w", err)
	}
	ns.Detail.Config.Retention = durationpb.New(o.Retention)
	// Does nothing when the namespace is there: ready brings that one up to
	// date.
	if err := sqliteschema.CreateNamespaces(store, ns); err != nil {
		return nil, fault.New("namespace", fault.Internal, "%w", err)
	}

	dead := make(chan error, 1)
	logger := newServerLogger(o.logger, func(err error) {
		report(dead, err)
		report(o.failed, fault.New("engine", fault.Internal, "%w", err))
	})
	type result struct {
		server temporal.Server
		err    error
	}
	started := make(chan result, 1)
	// On a goroutine of its own, because the logger keeps the one that it is
	// called on when the server says that it cannot go on.
	go func() {
		server, err := temporal.NewServer(
			temporal.WithConfig(serverConfig(o, store)),
			temporal.ForServices(temporal.DefaultServices),
			temporal.WithStaticHosts(hosts(o)),
			temporal.WithLogger(logger),
			temporal.WithAuthorizer(authorization.NewNoopAuthorizer()),
			temporal.WithClaimMapper(func(*config.Config) authorization.ClaimMapper { return authorization.NewNoopClaimMapper() }),
			temporal.WithDynamicConfigClient(settings()),
		)
		if err == nil {
			err = server.Start()
		}
		started <- result{server, err}
	}()
	select {
	case r := <-started:
		if r.err != nil {
			return nil, fault.New("server", fault.Internal, "%w", r.err)
		}
		return r.server, nil
	case err := <-dead:
		return nil, fault.New("server", fault.Internal, "%w", err)
	case <-ctx.Done():
		// It cannot be told to stop half-way, and must not outlive the lock.
		select {
		case r := <-started:
			if r.err == nil {
				_ = r.server.Stop()
			}
		case <-dead:
		}
		return nil, fault.New("server", fault.Timeout, "%w", ctx.Err())
	}
}

// sqlConfig names the database. A transaction is on the disk before the server
// says so (synchronous=full), since the sandboxes that it accounts for outlive
// a crash of the machine. One connection, which is what MaxConns 0 gives: more
// of them fail each other with "database is locked".
func sqlConfig(file string) *config.SQL {
	return &config.SQL{
		PluginName:   sqliteplugin.PluginName,
		DatabaseName: escapePath(file),
		ConnectAttributes: map[string]string{
			"mode":         "rw",
			"journal_mode": "wal",
			"synchronous":  "full",
			"busy_timeout": "10000",
		},
	}
}

func serverConfig(o launchOptions, store *config.SQL) *config.Config {
	service := func(host string, port int) config.Service {
		return config.Service{RPC: config.RPC{GRPCPort: port, BindOnIP: host}}
	}
	disabled := "disabled"
	return &config.Config{
		Global: config.Global{Membership: config.Membership{MaxJoinDuration: 30 * time.Second, BroadcastAddress: loopback}},
		Persistence: config.Persistence{
			DefaultStore:     store.PluginName,
			VisibilityStore:  store.PluginName,
			NumHistoryShards: 1, // more gain nothing over one connection
			DataStores:       map[string]config.DataStore{store.PluginName: {SQL: store}},
		},
		ClusterMetadata: &cluster.Config{
			FailoverVersionIncrement: 10,
			MasterClusterName:        clusterName,
			CurrentClusterName:       clusterName,
			ClusterInformation: map[string]cluster.ClusterInformation{
				clusterName: {Enabled: true, InitialFailoverVersion: 1, RPCAddress: o.address},
			},
		},
		DCRedirectionPolicy: config.DCRedirectionPolicy{Policy: "noop"},
		Services: map[string]config.Service{
			string(primitives.FrontendService): service(o.Host, o.ports.frontend),
			string(primitives.HistoryService):  service(loopback, o.ports.history),
			string(primitives.MatchingService): service(loopback, o.ports.matching),
			string(primitives.WorkerService):   service(loopback, o.ports.worker),
		},
		Archival: config.Archival{
			History:    config.HistoryArchival{State: disabled},
			Visibility: config.VisibilityArchival{State: disabled},
		},
		PublicClient: config.PublicClient{HostPort: o.address},
		NamespaceDefaults: config.NamespaceDefaults{Archival: config.ArchivalNamespaceDefaults{
			History:    config.HistoryArchivalNamespaceDefaults{State: disabled},
			Visibility: config.VisibilityArchivalNamespaceDefaults{State: disabled},
		}},
	}
}

// hosts say where each service is, so that none goes looking for the others.
func hosts(o launchOptions) map[primitives.ServiceName]static.Hosts {
	one := func(address string) static.Hosts { return static.Hosts{All: []string{address}, Self: address} }
	local := func(port int) static.Hosts { return one(net.JoinHostPort(loopback, strconv.Itoa(port))) }
	return map[primitives.ServiceName]static.Hosts{
		primitives.FrontendService: one(o.address),
		primitives.HistoryService:  local(o.ports.history),
		primitives.MatchingService: local(o.ports.matching),
		primitives.WorkerService:   local(o.ports.worker),
	}
}

// settings are where we differ from the server's defaults.
func settings() dynamicconfig.StaticClient {
	return dynamicconfig.StaticClient{
		// Runs share the task queues: one of a thousand forks must not keep
		// the others waiting.
		dynamicconfig.MatchingEnableFairness.Key(): true,
		// The limits protect a database that many share.
		dynamicconfig.FrontendPersistenceMaxQPS.Key(): math.MaxInt32,
		dynamicconfig.HistoryPersistenceMaxQPS.Key():  math.MaxInt32,
		dynamicconfig.MatchingPersistenceMaxQPS.Key(): math.MaxInt32,
		// An attribute that was just added can be searched for at once.
		dynamicconfig.ForceSearchAttributesCacheRefreshOnRead.Key(): true,
		// The UI's pause button.
		dynamicconfig.WorkflowPauseEnabled.Key(): true,
	}
}
