package ledger

import (
	"context"
	"database/sql"
	"errors"
	"net"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// postgresStore is what is said of PostgreSQL in a store.
func postgresStore() *store {
	return &store{
		dialect: goose.DialectPostgres, folder: "postgres", versions: "ledger_version", fault: postgresFault, missing: noPostgresTable,
		bulk: true, clock: "CAST(EXTRACT(EPOCH FROM clock_timestamp()) * 1000 AS bigint)", begin: []string{"BEGIN"},
	}
}

// session is what a connection is set to, whatever the server's own defaults
// are: a commit is durable when it is answered, and a gateway that hangs in the
// middle of a transaction does not keep its locks from the others.
const session = `SET synchronous_commit TO on; SET idle_in_transaction_session_timeout TO '20s'; SET lock_timeout TO '10s'`

// openPostgres connects to the database that the URL names.
func openPostgres(ctx context.Context, url string) (_ *store, err error) {
	const op = "open ledger"
	// What is wrong with the URL is not repeated: there may be a password in it.
	config, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fault.New(op, fault.Invalid, "SANDBOX_TEMPORAL_LEDGER_URL cannot be read").
			Hinted("Use an address such as postgres://user@host/database.")
	}
	set := stdlib.OptionAfterConnect(func(ctx context.Context, c *pgx.Conn) error {
		_, err := c.Exec(ctx, session)
		return err
	})
	s := postgresStore()
	defer func() {
		if err != nil {
			err = errors.Join(err, s.close())
		}
	}()
	s.write = stdlib.OpenDB(*config, set)
	s.read = stdlib.OpenDB(*config, set)
	s.read.SetMaxOpenConns(8)
	s.read.SetMaxIdleConns(4)
	if err := s.write.PingContext(ctx); err != nil {
		return nil, s.fault(op, err)
	}
	// The migrations need a second connection, for their lock; the writer needs
	// one.
	s.write.SetMaxOpenConns(2)
	s.write.SetMaxIdleConns(1)
	return s, nil
}

// postgresFault gives an error of PostgreSQL its kind. The classes are those of
// its manual, appendix A.
func postgresFault(op string, err error) error {
	kind, hint := fault.Internal, ""
	pg, said := errors.AsType[*pgconn.PgError](err)
	_, refused := errors.AsType[*pgconn.ConnectError](err)
	_, network := errors.AsType[net.Error](err)
	switch {
	case said:
		switch class := pg.Code[:min(len(pg.Code), 2)]; {
		case pg.Code == "53100":
			kind, hint = fault.Full, "Free some space on the disk of the ledger's database server."
		case class == "28", pg.Code == "42501":
			kind, hint = fault.Denied, "Check the user and the password of SANDBOX_TEMPORAL_LEDGER_URL, and what the user may do."
		case pg.Code == "3D000":
			kind, hint = fault.Invalid, "Create the database that SANDBOX_TEMPORAL_LEDGER_URL names: the tables in it are made by this program."
		case class == "40", pg.Code == "23505", pg.Code == "55P03":
			kind = fault.Conflict
		case class == "08", class == "53", class == "57", pg.Code == "25P03", pg.Code == "25006":
			kind = fault.Unavailable
		}
	case refused, network, pgconn.SafeToRetry(err), pgconn.Timeout(err), errors.Is(err, context.DeadlineExceeded), errors.Is(err, sql.ErrConnDone):
		kind = fault.Unavailable
	}
	if kind == fault.Unavailable {
		hint = "Is the PostgreSQL server of SANDBOX_TEMPORAL_LEDGER_URL running, and can this host reach it?"
	}
	return &fault.Error{Op: op, Kind: kind, Err: err, Hint: hint}
}

func noPostgresTable(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return ok && e.Code == "42P01"
}
