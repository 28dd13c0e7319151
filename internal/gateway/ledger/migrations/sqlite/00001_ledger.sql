-- +goose Up
-- Money is in nano-dollars, times are in Unix milliseconds.

-- A token is known by its hash only: who reads the ledger cannot use it.
CREATE TABLE grants (
    id           INTEGER PRIMARY KEY, -- the latest grant of a run tells its budget
    token_sha256 BLOB    NOT NULL UNIQUE,
    run          TEXT    NOT NULL,
    fork         INTEGER NOT NULL CHECK (fork > 0),
    run_budget   INTEGER NOT NULL CHECK (run_budget >= 0),  -- 0: none
    fork_budget  INTEGER NOT NULL CHECK (fork_budget >= 0), -- 0: none
    refused      INTEGER NOT NULL DEFAULT 0,                -- calls answered 402
    created      INTEGER NOT NULL,
    revoked      INTEGER                                    -- NULL: the token is good
) STRICT;

CREATE INDEX grants_by_fork ON grants (run, fork);

CREATE TABLE calls (
    id             INTEGER PRIMARY KEY,
    run            TEXT    NOT NULL,
    fork           INTEGER NOT NULL,
    model          TEXT    NOT NULL, -- that was asked; once settled, that answered
    path           TEXT    NOT NULL,
    prices         TEXT    NOT NULL, -- version of the table that priced it
    attempt        INTEGER NOT NULL, -- the agent's own count of its retries
    input          INTEGER NOT NULL DEFAULT 0,
    cache_write_5m INTEGER NOT NULL DEFAULT 0,
    cache_write_1h INTEGER NOT NULL DEFAULT 0,
    cache_read     INTEGER NOT NULL DEFAULT 0,
    output         INTEGER NOT NULL DEFAULT 0,
    web_searches   INTEGER NOT NULL DEFAULT 0,
    reserved       INTEGER NOT NULL CHECK (reserved >= 0),
    cost           INTEGER NOT NULL DEFAULT 0 CHECK (cost >= 0),
    -- in_flight: reserved, and maybe forwarded; settled: answered and priced;
    -- failed: not answered, so at no cost or at a bound of it; crashed: was in
    -- flight when the gateway died, so charged at its reservation.
    state          TEXT    NOT NULL CHECK (state IN ('in_flight', 'settled', 'failed', 'crashed')),
    status         INTEGER NOT NULL DEFAULT 0, -- HTTP, of the upstream; 0: it did not answer
    request_id     TEXT    NOT NULL DEFAULT '',
    note           TEXT    NOT NULL DEFAULT '',
    started        INTEGER NOT NULL,
    ended          INTEGER
) STRICT;

CREATE INDEX calls_by_fork ON calls (run, fork);
CREATE INDEX calls_by_time ON calls (started);
CREATE INDEX calls_in_flight ON calls (id) WHERE state = 'in_flight';

-- +goose Down
DROP TABLE calls;
DROP TABLE grants;
