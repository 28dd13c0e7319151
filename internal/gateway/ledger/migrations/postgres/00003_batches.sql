-- +goose Up
-- The schema of SQLite's version 3, where the comments stand.

CREATE TABLE batches (
    id       TEXT COLLATE "C" PRIMARY KEY,
    run      TEXT   NOT NULL,
    fork     BIGINT NOT NULL CHECK (fork > 0),
    requests BIGINT NOT NULL CHECK (requests > 0),
    state    TEXT   NOT NULL CHECK (state IN ('open', 'settled')),
    deleted  BIGINT NOT NULL DEFAULT 0 CHECK (deleted IN (0, 1)),
    created  BIGINT NOT NULL,
    looked   BIGINT NOT NULL DEFAULT 0
);

CREATE INDEX batches_by_fork ON batches (run, fork, created);
CREATE INDEX batches_open ON batches (id) WHERE state = 'open';

ALTER TABLE calls ADD COLUMN batch TEXT NOT NULL DEFAULT '';
CREATE INDEX calls_by_batch ON calls (batch) WHERE batch <> '';
