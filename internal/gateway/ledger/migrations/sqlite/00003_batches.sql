-- +goose Up

-- A batch that the API has accepted. It goes on without a gateway, so its calls
-- stay reserved when that dies, until somebody settles the batch.
CREATE TABLE batches (
    id       TEXT    PRIMARY KEY,                           -- the API's name for it
    run      TEXT    NOT NULL,
    fork     INTEGER NOT NULL CHECK (fork > 0),
    requests INTEGER NOT NULL CHECK (requests > 0),         -- how many are in it
    state    TEXT    NOT NULL CHECK (state IN ('open', 'settled')),
    deleted  INTEGER NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)), -- 1: its fork has deleted it
    created  INTEGER NOT NULL,
    looked   INTEGER NOT NULL DEFAULT 0                     -- when the API was asked last what became of it
) STRICT;

CREATE INDEX batches_by_fork ON batches (run, fork, created);
CREATE INDEX batches_open ON batches (id) WHERE state = 'open';

-- Empty: the call is of no batch, or of one that the API has not accepted.
ALTER TABLE calls ADD COLUMN batch TEXT NOT NULL DEFAULT '';
CREATE INDEX calls_by_batch ON calls (batch) WHERE batch <> '';
