// Package repo is git on the worker's side: it brings the commit that forks
// start from, and takes in the commits that they made.
//
// All work is done by the real git (2.39 or newer), run as a child process.
// The worker holds the credentials; a sandbox gets a bundle and gives one
// back, and what it gives back is treated as written by an enemy: no hook,
// filter, driver or configuration of a fork ever runs here, and every object
// is checked before it is stored.
//
// # State
//
//	mirrors/<hash>.git  one per repository, shared by all runs; never shown to a fork.
//	                    Uploads have one for all commits with the same first one
//	runs/<run>.git      one per run: its base, and a branch for every fork
//	tmp/                work in progress; what a killed process left is swept away
//
// A mirror only ever grows: it keeps every commit that a run started from
// under refs/bases/<commit>, is packed together now and then, and can be
// deleted at any time, since it is made again when it is needed. A run's
// repository is complete without it: it holds hard links to the mirror's
// packs, which cost no space while the mirror has the same packs and stay
// readable when the mirror is packed anew, found broken or deleted.
//
// Submodules are not fetched. Histories that are cut short (shallow or
// partial clones) are refused, because a fork gets the full history.
package repo

import (
	"context"
	"io"
	"log/slog"
	"path/filepath"
	"sync"

	"github.com/sandbox-temporal/sandbox-temporal/internal/fault"
)

// Options say where a Store keeps its things.
type Options struct {
	// Dir is the state folder. It is made, with mode 0700,
	// when it is first needed. Required.
	Dir string
	// Credentials is asked whenever a remote is about to be read. Nil, or a
	// zero Credential: git's own credential helpers are all there is.
	Credentials func(context.Context) (Credential, error)
	// Uploads opens what the store holds under a key of UploadKey's; an error
	// of the kind NotFound says that it holds nothing. Nil: there are none.
	Uploads func(ctx context.Context, key string) (io.ReadCloser, error)
	// MaxBundle bounds what Receive takes and what is uploaded, in bytes. 0: 2 GiB.
	MaxBundle int64
	// Logger hears of mirrors that had to be made again. Nil: nobody does.
	Logger *slog.Logger
}

// A Credential is a token for one server.
type Credential struct {
	// Server is scheme, host and port, as "https://github.com". The token is
	// sent there and nowhere else, whatever redirects say.
	Server string
	// User is the name that goes with the token. Empty: "x-access-token",
	// which GitHub wants and others take.
	User string
	// Token is the secret. Empty: no credential.
	Token string
}

// A Base is the commit that all forks of a run start from.
type Base struct {
	Source string // the repository, as it was asked for
	Upload string // the key under which the store holds it; Source is only a name then
	Mirror string // the mirror's folder on this worker; empty: not looked for yet
	Branch string // the branch or tag it was taken from; "HEAD" when there was none
	Commit string // its full id
}

// Ref returns the name under which a bundle of b holds the commit.
func (b Base) Ref() string {
	if b.Branch == "" || b.Branch == "HEAD" {
		return "refs/heads/base"
	}
	return "refs/heads/" + b.Branch
}

// A Store holds the mirrors and the branches of runs. Its methods may be
// called at the same time, also by several processes with one Dir.
type Store struct {
	dir         string
	credentials func(context.Context) (Credential, error)
	uploads     func(context.Context, string) (io.ReadCloser, error)
	maxBundle   int64
	log         *slog.Logger
	maxPacks    int // packs in a mirror before it is packed together

	mu      sync.Mutex
	checked bool // git was found and is new enough
}

// defaultMaxBundle bounds a bundle when Options do not.
const defaultMaxBundle = 2 << 30

// New makes a Store. It touches nothing yet.
func New(o Options) *Store {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		dir = o.Dir // there is no working folder: what uses dir will say so
	}
	s := &Store{
		dir:         dir,
		credentials: o.Credentials,
		uploads:     o.Uploads,
		maxBundle:   o.MaxBundle,
		log:         o.Logger,
		maxPacks:    32,
	}
	if s.maxBundle <= 0 {
		s.maxBundle = defaultMaxBundle
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s
}

// Resolve brings a branch's newest commit into the mirror of its repository
// and names it. An empty branch is "main", or else the repository's own
// default; a tag is taken too. A source is a URL (https, http, ssh, git,
// file), "user@host:path", or a local path that is absolute or starts with
// "~". Changes in a local work tree that are not committed are left out (see
// Dirty). A second call fetches only what is new.
//
// The kind of the error says what was wrong: Invalid (a name that git would
// not take, or a URL with a password in it), NotFound (no such repository or
// branch, or nothing committed yet), Denied (credentials, or a folder that
// belongs to somebody else), Unsupported (no git, or a shallow clone),
// Unavailable (the network) and Full.
func (s *Store) Resolve(ctx context.Context, source, branch string) (Base, error) {
	const op = "repo: resolve"
	if err := s.check(ctx); err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	src, err := s.locate(ctx, source)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	name, err := branchName(branch)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	tip, err := s.lookUp(ctx, src, name)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	mirror, commit, err := s.fetchTip(ctx, src, tip)
	if err != nil {
		return Base{}, fault.Wrap(op, err)
	}
	return Base{Source: source, Mirror: mirror, Branch: tip.branch, Commit: commit}, nil
}
