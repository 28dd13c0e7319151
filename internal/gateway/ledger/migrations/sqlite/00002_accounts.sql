-- +goose Up
-- Money is in nano-dollars, times are in Unix milliseconds, days are those of
-- UTC. The same version of the schema for PostgreSQL stands beside this folder.

-- A gateway that uses the ledger. Its calls are living ones for as long as it
-- is seen.
CREATE TABLE owners (
    num     INTEGER PRIMARY KEY,
    name    TEXT    NOT NULL, -- the same for every start of one gateway
    started INTEGER NOT NULL,
    seen    INTEGER NOT NULL, -- when it last said that it lives
    ended   INTEGER           -- NULL: it has not said that it ends
) STRICT;

-- What calls are paid from. Always: 0 <= spent, 0 <= reserved, and together
-- they are at most the budget, where there is one.
CREATE TABLE days (
    day      TEXT    PRIMARY KEY, -- as 2026-11-23
    budget   INTEGER NOT NULL DEFAULT 0 CHECK (budget >= 0), -- that the latest call was held to; 0: none
    spent    INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0)
) STRICT;

CREATE TABLE runs (
    run      TEXT    PRIMARY KEY,
    repo     TEXT    NOT NULL DEFAULT '',
    budget   INTEGER NOT NULL DEFAULT 0 CHECK (budget >= 0), -- 0: none
    pause    INTEGER NOT NULL DEFAULT 0 CHECK (pause IN (0, 1)), -- 1: calls that no budget covers are held
    spent    INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    created  INTEGER NOT NULL
) STRICT;

CREATE TABLE forks (
    run          TEXT    NOT NULL,
    fork         INTEGER NOT NULL CHECK (fork > 0),
    budget       INTEGER NOT NULL DEFAULT 0 CHECK (budget >= 0), -- 0: none
    spent        INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved     INTEGER NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    calls        INTEGER NOT NULL DEFAULT 0, -- that have ended
    input        INTEGER NOT NULL DEFAULT 0,
    output       INTEGER NOT NULL DEFAULT 0,
    cache_read   INTEGER NOT NULL DEFAULT 0,
    cache_write  INTEGER NOT NULL DEFAULT 0,
    refused      INTEGER NOT NULL DEFAULT 0,  -- calls answered 402
    token_sha256 TEXT    NOT NULL DEFAULT '', -- in hex; empty: no token is good
    granted      INTEGER NOT NULL DEFAULT 0,
    held         TEXT    NOT NULL DEFAULT '', -- why the latest call waits for more money; empty: it does not
    PRIMARY KEY (run, fork)
) STRICT;

CREATE UNIQUE INDEX forks_by_token ON forks (token_sha256) WHERE token_sha256 <> '';

ALTER TABLE calls ADD COLUMN owner INTEGER NOT NULL DEFAULT 0;
ALTER TABLE calls ADD COLUMN day TEXT NOT NULL DEFAULT '';
UPDATE calls SET day = date(started / 1000, 'unixepoch');

INSERT INTO days (day, spent, reserved)
    SELECT day, SUM(cost), SUM(CASE WHEN state = 'in_flight' THEN reserved ELSE 0 END) FROM calls GROUP BY day;

INSERT INTO runs (run, budget, spent, reserved, created)
    SELECT a.run,
        COALESCE((SELECT run_budget FROM grants g WHERE g.run = a.run ORDER BY id DESC LIMIT 1), 0),
        COALESCE((SELECT SUM(cost) FROM calls c WHERE c.run = a.run), 0),
        COALESCE((SELECT SUM(reserved) FROM calls c WHERE c.run = a.run AND state = 'in_flight'), 0),
        MIN(a.at)
    FROM (SELECT run, created AS at FROM grants UNION ALL SELECT run, started FROM calls) a GROUP BY a.run;

INSERT INTO forks (run, fork, budget, spent, reserved, calls, input, output, cache_read, cache_write, refused, token_sha256, granted)
    SELECT a.run, a.fork,
        COALESCE((SELECT fork_budget FROM grants g WHERE g.run = a.run AND g.fork = a.fork ORDER BY id DESC LIMIT 1), 0),
        COALESCE((SELECT SUM(cost) FROM calls c WHERE c.run = a.run AND c.fork = a.fork), 0),
        COALESCE((SELECT SUM(reserved) FROM calls c WHERE c.run = a.run AND c.fork = a.fork AND state = 'in_flight'), 0),
        (SELECT COUNT(*) FROM calls c WHERE c.run = a.run AND c.fork = a.fork AND state <> 'in_flight'),
        COALESCE((SELECT SUM(input) FROM calls c WHERE c.run = a.run AND c.fork = a.fork), 0),
        COALESCE((SELECT SUM(output) FROM calls c WHERE c.run = a.run AND c.fork = a.fork), 0),
        COALESCE((SELECT SUM(cache_read) FROM calls c WHERE c.run = a.run AND c.fork = a.fork), 0),
        COALESCE((SELECT SUM(cache_write_5m + cache_write_1h) FROM calls c WHERE c.run = a.run AND c.fork = a.fork), 0),
        COALESCE((SELECT SUM(refused) FROM grants g WHERE g.run = a.run AND g.fork = a.fork), 0),
        COALESCE((SELECT lower(hex(token_sha256)) FROM grants g WHERE g.run = a.run AND g.fork = a.fork AND revoked IS NULL ORDER BY id DESC LIMIT 1), ''),
        COALESCE((SELECT MAX(created) FROM grants g WHERE g.run = a.run AND g.fork = a.fork), 0)
    FROM (SELECT run, fork FROM grants UNION SELECT run, fork FROM calls) a;

DROP TABLE grants;

DROP INDEX calls_in_flight;
CREATE INDEX calls_in_flight ON calls (owner) WHERE state = 'in_flight';
