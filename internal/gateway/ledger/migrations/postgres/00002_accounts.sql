-- +goose Up
-- The schema of SQLite's version 2, where the comments stand; PostgreSQL begins
-- with it. Keys are ordered by their bytes, because they are locked in that order.

CREATE TABLE owners (
    num     BIGINT PRIMARY KEY,
    name    TEXT   NOT NULL,
    started BIGINT NOT NULL,
    seen    BIGINT NOT NULL,
    ended   BIGINT
);

CREATE TABLE days (
    day      TEXT COLLATE "C" PRIMARY KEY,
    budget   BIGINT NOT NULL DEFAULT 0 CHECK (budget >= 0),
    spent    BIGINT NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved BIGINT NOT NULL DEFAULT 0 CHECK (reserved >= 0)
) WITH (fillfactor = 50);

CREATE TABLE runs (
    run      TEXT COLLATE "C" PRIMARY KEY,
    repo     TEXT   NOT NULL DEFAULT '',
    budget   BIGINT NOT NULL DEFAULT 0 CHECK (budget >= 0),
    pause    BIGINT NOT NULL DEFAULT 0 CHECK (pause IN (0, 1)),
    spent    BIGINT NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved BIGINT NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    created  BIGINT NOT NULL
) WITH (fillfactor = 50);

CREATE TABLE forks (
    run          TEXT COLLATE "C" NOT NULL,
    fork         BIGINT NOT NULL CHECK (fork > 0),
    budget       BIGINT NOT NULL DEFAULT 0 CHECK (budget >= 0),
    spent        BIGINT NOT NULL DEFAULT 0 CHECK (spent >= 0),
    reserved     BIGINT NOT NULL DEFAULT 0 CHECK (reserved >= 0),
    calls        BIGINT NOT NULL DEFAULT 0,
    input        BIGINT NOT NULL DEFAULT 0,
    output       BIGINT NOT NULL DEFAULT 0,
    cache_read   BIGINT NOT NULL DEFAULT 0,
    cache_write  BIGINT NOT NULL DEFAULT 0,
    refused      BIGINT NOT NULL DEFAULT 0,
    token_sha256 TEXT   NOT NULL DEFAULT '',
    granted      BIGINT NOT NULL DEFAULT 0,
    held         TEXT   NOT NULL DEFAULT '',
    PRIMARY KEY (run, fork)
) WITH (fillfactor = 50);

CREATE UNIQUE INDEX forks_by_token ON forks (token_sha256) WHERE token_sha256 <> '';

CREATE TABLE calls (
    id             BIGINT PRIMARY KEY,
    owner          BIGINT NOT NULL,
    run            TEXT   NOT NULL,
    fork           BIGINT NOT NULL,
    day            TEXT   NOT NULL,
    model          TEXT   NOT NULL,
    path           TEXT   NOT NULL,
    prices         TEXT   NOT NULL,
    attempt        BIGINT NOT NULL,
    input          BIGINT NOT NULL DEFAULT 0,
    cache_write_5m BIGINT NOT NULL DEFAULT 0,
    cache_write_1h BIGINT NOT NULL DEFAULT 0,
    cache_read     BIGINT NOT NULL DEFAULT 0,
    output         BIGINT NOT NULL DEFAULT 0,
    web_searches   BIGINT NOT NULL DEFAULT 0,
    reserved       BIGINT NOT NULL CHECK (reserved >= 0),
    cost           BIGINT NOT NULL DEFAULT 0 CHECK (cost >= 0),
    state          TEXT   NOT NULL CHECK (state IN ('in_flight', 'settled', 'failed', 'crashed')),
    status         BIGINT NOT NULL DEFAULT 0,
    request_id     TEXT   NOT NULL DEFAULT '',
    note           TEXT   NOT NULL DEFAULT '',
    started        BIGINT NOT NULL,
    ended          BIGINT
) WITH (fillfactor = 80);

CREATE INDEX calls_by_fork ON calls (run, fork);
CREATE INDEX calls_by_time ON calls (started);
CREATE INDEX calls_in_flight ON calls (owner) WHERE state = 'in_flight';
